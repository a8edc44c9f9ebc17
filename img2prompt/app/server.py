"""Serves the page to this machine and to nobody else: by its address, by the host that is asked, and by what asks."""

import os
import socket
from collections.abc import Callable
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

import gradio
import uvicorn
from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse

from img2prompt.app.page import PAGE_STYLE
from img2prompt.data.decoding import MAX_BYTES

ADDRESS = "127.0.0.1"
_HOSTS = (ADDRESS, "localhost")
# What the page and its client ask for; of Gradio's other doors some fetch addresses, and some write files.
_FOLDERS = ("", "assets", "config", "favicon.ico", "gradio_api", "manifest.json", "static", "svelte", "theme.css")
_CALLS = ("call", "cancel", "file=", "heartbeat", "info", "queue", "reset", "startup-events", "upload")
_HEADERS = {
    # The page has its parts from here. That nothing an image brings becomes a script is for the cards, which escape it.
    "content-security-policy": "default-src 'none'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; "
    "worker-src 'self' blob:; manifest-src 'self'; base-uri 'self'; form-action 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
_SHUTDOWN_S = 1


def bound(port: int) -> socket.socket:
    """A socket of this machine's own address; port 0 takes any that is free. ValueError when it is in use."""
    opened = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    if os.name != "nt":
        # Or the port would stay taken for a minute after the last page.
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        opened.bind((ADDRESS, port))
        opened.listen()
    except OSError as error:
        opened.close()
        raise ValueError(
            f"port={port}: not to be had ({error.strerror}); choose another, or port=0 for any that is free"
        ) from None
    return opened


def serve(build: Callable[[], gradio.Blocks], listening: socket.socket) -> None:
    """Builds the page and serves it until it is interrupted; what was uploaded is removed then."""
    with TemporaryDirectory(prefix="img2prompt-app-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = os.path.realpath(folder)
        # Errors of answers are Gradio's to print; here it would be those of streams that are cut at the end.
        config = uvicorn.Config(
            guarded(build()),
            log_level="critical",
            timeout_graceful_shutdown=_SHUTDOWN_S,
            server_header=False,
            ws="none",
        )
        port = listening.getsockname()[1]
        print(f"http://{ADDRESS}:{port} for this machine alone; Ctrl-C ends it", flush=True)
        uvicorn.Server(config).run(sockets=[listening])


def guarded(page: gradio.Blocks) -> Any:
    """The page as an ASGI application that refuses strangers."""
    whole = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    gradio.mount_gradio_app(
        whole,
        page,
        path="/",
        server_name=ADDRESS,
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=MAX_BYTES,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=PAGE_STYLE,
    )
    return Guard(whole)


class Guard:
    """Lets requests through that this page makes, and says on all answers where a page may load from."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        reason = refusal(scope["path"], Headers(scope=scope)) if scope["type"] == "http" else "no such protocol here"

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        answer = self.app if reason is None else PlainTextResponse(reason, 403)
        await answer(scope, receive, send_with_headers)


def refusal(path: str, headers: Headers) -> str | None:
    """Why a request is refused; None for those of the page. A name that a stranger's page has for this machine's
    address shows in `Host`, and the stranger's page itself in `Origin`.
    """
    host, origin = headers.get("host", ""), headers.get("origin")
    try:
        asked, asks = urlsplit(f"//{host}").hostname, urlsplit(origin or "").netloc
    except ValueError:
        return "no such host"
    if asked not in _HOSTS:
        return f"this page is served to {' and '.join(_HOSTS)} alone"
    if origin is not None and asks != host:
        return "this page answers to no other page"
    first, _, rest = path.strip("/").partition("/")
    is_call = rest.startswith(_CALLS) and not rest.startswith("file=http")
    if first not in _FOLDERS or (first == "gradio_api" and not is_call):
        return "no such door here"
    return None
