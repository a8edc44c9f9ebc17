"""The page as it is served: asked by Gradio's client, and by those who are to be refused."""

import html
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import pytest
import torch
from conftest import ROOT
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image, PngImagePlugin
from starlette.datastructures import Headers
from test_imports import imports_of, modules

from img2prompt import load
from img2prompt.app.server import bound, refusal
from img2prompt.commands import app as command
from img2prompt.commands import door
from img2prompt.commands.settings import compose
from img2prompt.data.targets import TextEncoder, locate
from img2prompt.predictions import read_predictions

HOSTILE = "<img src=x onerror=alert(1)> ${alert(2)} {{value}}"
# With other names than this machine's resolved to nothing, and none of its own calls home.
CHROMIUM = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"),
]
_connect = socket.socket.connect


def loopback_only(self, address, *args):
    if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] != "127.0.0.1":
        raise AssertionError(f"a test tried to connect to {address}")
    return _connect(self, address, *args)


@pytest.fixture(autouse=True)
def to_this_machine(monkeypatch, no_connections):
    monkeypatch.setattr(socket.socket, "connect", loopback_only)


@dataclass
class Served:
    """The command in a process of its own, which may connect to nothing at all, not even to this machine."""

    process: subprocess.Popen
    address: str
    folder: Path

    def connections(self) -> str:
        log = self.folder / "connections"
        return log.read_text() if log.exists() else ""


@pytest.fixture(scope="module")
def served(finished_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    checkpoint = finished_run / "checkpoints" / "finetune.safetensors"
    process = subprocess.Popen(
        [sys.executable, "-m", "img2prompt", "app", f"ckpt={checkpoint}", "port=0", "device=cpu", "top_k=3"],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'offline'}",
            "TMPDIR": str(folder),
            "CONNECTIONS": str(folder / "connections"),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        lines = iter(process.stdout.readline, "")
        found = next((match for line in lines if (match := re.match(r"http://127\.0\.0\.1:\d+", line))), None)
        assert found, process.communicate()[1]
        yield Served(process, found[0], folder)
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def address(served) -> str:
    return served.address


@pytest.fixture(scope="module")
def images(tmp_path_factory, pairs_folder) -> list[Path]:
    """Two drawings, the first with its prompt inside, and a file that is no image."""
    folder = tmp_path_factory.mktemp("dropped")
    drawings = sorted((pairs_folder / "images").iterdir())[:2]
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "a red star\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 32x32")
    paths = [folder / "out (1), seed=3.png", folder / "été.png", folder / "broken.png"]
    Image.open(drawings[0]).save(paths[0], pnginfo=info)
    Image.open(drawings[1]).save(paths[1])
    paths[2].write_bytes(b"no image")
    return paths


@pytest.fixture
def client(address, tmp_path):
    with_own_files = Client(address, verbose=False, analytics_enabled=False, download_files=tmp_path / "downloads")
    yield with_own_files
    with_own_files.close()


def answered(client: Client, images: list[Path]):
    """The text of the cards, and the downloads."""
    shown, *files = client.predict([handle_file(path) for path in images], api_name="/answer")
    return shown, [Path(one["value"]) for one in files]


def test_images_are_answered_by_what_predict_says_of_them_and_the_embeddings_are_downloaded(
    client, images, finished_run
):
    shown, files = answered(client, images)
    expected = load(finished_run / "checkpoints" / "finetune.safetensors", device="cpu").predict(images)
    assert [path.suffix for path in files] == [".parquet", ".npz"]
    for path in files:
        found = read_predictions(path)
        assert found.ids == ["out (1), seed=3", "été"] and {"nearest_prompts", "composed_prompt"} <= set(found.columns)
        assert np.allclose(found.embeddings, expected.embeddings, atol=1e-5)
    texts = [html.unescape(text) for text in re.findall(r"<bdi>(.*?)</bdi>", shown)]
    for prompts, cosines in zip(expected.columns["nearest_prompts"], expected.columns["nearest_cosines"], strict=True):
        assert set(prompts[:3]) <= set(texts) and prompts[3] not in texts
        assert f"{cosines[0]:.3f}" in shown
    assert "broken.png" in texts and "not an image of a known format (PNG, JPEG, WEBP, BMP, GIF, TIFF, AVIF)" in texts
    # Its own prompt, with the cosine of its embedding.
    target = torch.from_numpy(TextEncoder(locate()).embed(["a red star"]))[0]
    own = re.search(r'Prompt in its metadata \(A1111\).*?class="value">([-\d.]+)<.*?<bdi>a red star</bdi>', shown)
    assert own and float(own[1]) == pytest.approx(float(expected.embeddings[0] @ target.numpy()), abs=2e-3)


def test_texts_are_ranked_against_the_images_that_were_dropped(client, images):
    assert client.predict("a red star", api_name="/rank") == '<p class="subdued"><bdi>Drop images first.</bdi></p>'
    _, files = answered(client, images)
    shown = client.predict("a red star\na boat on the sea", api_name="/rank")
    found = read_predictions(files[0])
    values = TextEncoder(locate()).embed(["a red star", "a boat on the sea"]) @ found.embeddings.T
    first, second, of_images = shown.split("</section>")[:3]
    for block, row in ((first, values[0]), (second, values[1])):
        numbers = [float(one) for one in re.findall(r'class="value">([-\d.]+)<', block)]
        assert numbers == pytest.approx(sorted(row.tolist(), reverse=True), abs=2e-3)
    assert "The nearest text to each image" in of_images
    # Another visitor has no images.
    assert client.predict("", api_name="/rank") == ""
    client.reset_session()
    assert "Drop images first" in client.predict("a red star", api_name="/rank")


def test_when_the_images_are_taken_away_so_is_what_was_said_of_them(client, images):
    answered(client, images[:1])
    shown, *files = client.predict([], api_name="/answer")
    assert "Drop images above" in shown and all(one["value"] is None for one in files)
    assert "Drop images first" in client.predict("a red star", api_name="/rank")


def test_what_is_wrong_is_said_in_a_sentence(client, images, monkeypatch):
    with pytest.raises(AppError, match="201 texts are more than the page takes at once, 100"):
        client.predict("\n".join(map(str, range(201))), api_name="/rank")
    with pytest.raises(AppError, match="101 images are more than the page takes at once, 100"):
        client.predict([handle_file(images[0])] * 101, api_name="/answer")


def fetched(address: str, path: str, body: object = None, **headers: str):
    """Status, headers and text of what a door says."""
    data = None if body is None else json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    request = Request(f"{address}{path}", data, {"content-type": "application/json", **named})
    try:
        with urlopen(request, timeout=30) as answer:
            return answer.status, answer.headers, answer.read().decode()
    except HTTPError as error:
        with error:
            return error.code, error.headers, error.read().decode()


@pytest.mark.parametrize("name", ["answer", "rank"])
@pytest.mark.parametrize("other", ["a file", "http://93.184.216.34/a.png", "https://127.0.0.1:1/a.png"])
def test_only_what_was_uploaded_is_read_and_no_address_is_fetched(served, other, name, tmp_path):
    own = tmp_path / "a.png"
    Image.new("RGB", (8, 8), "red").save(own)
    path = str(own) if other == "a file" else other
    file = {"path": path, "orig_name": "a.png", "meta": {"_type": "gradio.FileData"}}
    # Where text is expected, too.
    given = [[file]] if name == "answer" else [file]
    status, _, event = fetched(served.address, f"/gradio_api/call/{name}", {"data": given})
    assert status == 200
    said = fetched(served.address, f"/gradio_api/call/{name}/{json.loads(event)['event_id']}")[2]
    assert "event: error" in said and "event: complete" not in said
    assert fetched(served.address, f"/gradio_api/file={path}")[0] == 403
    assert served.connections() == "" and not list(served.folder.glob("img2prompt-app-*/*/a.png"))


def test_the_folder_of_the_run_is_not_served(address, finished_run):
    for path in (finished_run / "config.yaml", finished_run / "bank.parquet", ROOT / "README.md"):
        assert path.is_file() and fetched(address, f"/gradio_api/file={path}")[0] == 403


def test_a_page_elsewhere_can_neither_read_nor_ask(address):
    assert fetched(address, "/")[0] == 200
    assert fetched(address, "/", Host="evil.example")[0] == 403
    assert fetched(address, "/config", Origin="http://evil.example")[0] == 403
    status, headers, _ = fetched(address, "/gradio_api/call/rank", {"data": ["a"]}, Origin="null")
    assert status == 403 and headers["access-control-allow-origin"] is None
    assert fetched(address, "/gradio_api/call/rank", {"data": ["a"]}, Origin=address)[0] == 200


def test_all_answers_say_that_a_page_may_load_from_nowhere_else(address):
    for path in ("/", "/theme.css", "/nowhere"):
        policy = fetched(address, path)[1]["content-security-policy"]
        assert "default-src 'none'" in policy and "connect-src 'self'" in policy and "http" not in policy


@pytest.mark.parametrize(
    ("path", "headers", "reason"),
    [
        ("/", {"host": "127.0.0.1:7860"}, None),
        ("/gradio_api/queue/join", {"host": "localhost:9", "origin": "http://localhost:9"}, None),
        ("/", {"host": "localhost.evil.example"}, "127.0.0.1 and localhost alone"),
        ("/", {"host": "127.0.0.1@evil.example"}, "alone"),
        ("/", {}, "alone"),
        ("/", {"host": "127.0.0.1:7860", "origin": "http://127.0.0.1:80"}, "no other page"),
        ("/", {"host": "127.0.0.1:7860", "origin": "http://localhost:7860"}, "no other page"),
        ("/gradio_api/file=https://example.com", {"host": "127.0.0.1"}, "no such door"),
        ("/gradio_api/proxy=https://x.hf.space", {"host": "127.0.0.1"}, "no such door"),
        ("/gradio_api/deep_link", {"host": "127.0.0.1"}, "no such door"),
        ("/monitoring/summary", {"host": "127.0.0.1"}, "no such door"),
        ("//gradio_api/vibe-edit", {"host": "127.0.0.1"}, "no such door"),
    ],
)
def test_strangers_are_refused_with_a_reason(path, headers, reason):
    found = refusal(path, Headers(headers))
    assert found is None if reason is None else reason in found


def test_a_port_in_use_is_one_sentence():
    with bound(0) as taken:
        port = taken.getsockname()[1]
        assert taken.getsockname()[0] == "127.0.0.1"
        with pytest.raises(ValueError, match=f"port={port}: not to be had .*port=0"):
            bound(port)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"ckpt": None}, "ckpt must be given"),
        ({"ckpt": "nowhere.safetensors"}, "nowhere.safetensors"),
        ({"port": 70000}, "port must be between 0 and 65535, got 70000"),
        ({"port": -1}, "port must be between"),
        ({"batch_size": 0}, "batch_size and threads must be at least 1"),
        ({"views": ["up"]}, "up is none; choose of flip, crops, sizes"),
        ({"compose_beams": 0}, "compose_beams must be at least 1"),
        ({"predictor": {"name": "sdipc_ft"}, "ckpt": None}, "it predicts nothing"),
        ({"text_model": "./nowhere"}, "no such folder"),
    ],
)
def test_wrong_settings_are_one_sentence_before_a_page_is_served(given, sentence, finished_run, monkeypatch):
    monkeypatch.setattr(command, "serve", lambda *_: pytest.fail("it was served"))
    settings = compose("app", [f"ckpt={finished_run}", "port=0", "device=cpu"])
    with pytest.raises((ValueError, OSError), match=sentence):
        command.app(**{**settings, **given})


def test_what_needs_another_text_encoder_than_the_one_that_is_given_is_refused(finished_run, monkeypatch, tmp_path):
    class Narrow:
        dimension = 7

        def __init__(self, model, device):
            self.model = model

    monkeypatch.setattr(command, "TextEncoder", Narrow)
    settings = compose("app", [f"ckpt={finished_run}", "port=0", "device=cpu"])
    with pytest.raises(ValueError, match="has dimension 7, the predictions 384"):
        command.app(**settings)


def test_without_gradio_the_error_says_how_to_install_it(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith(("img2prompt.app.", "img2prompt.commands.app"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit) as ended:
        door.main("app", ["ckpt=x"])
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith("app: gradio is not installed; pip install 'img2prompt[app]'\n")


def test_other_commands_do_not_wait_for_gradio():
    imported = {name: path.read_text() for name, path in modules().items()}
    users = {
        name for name, text in imported.items() if re.search(r"^(import|from) (gradio|uvicorn|fastapi)", text, re.M)
    }
    assert users == {"app.page", "app.server"}
    behind = {name for name, path in modules().items() if {"app.page", "app.server"} & imports_of(path)}
    assert behind == {"app.server", "commands.app"}
    assert not any("commands.app" in imports_of(path) for path in modules().values())


@pytest.mark.slow
def test_a_browser_shows_the_answers_and_loads_from_nowhere_else(served, pairs_folder, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("there is no Chromium to show the page")
    drawings = sorted((pairs_folder / "images").iterdir())[:2]
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", f"{HOSTILE}\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 32x32")
    paths = [tmp_path / "été.png", tmp_path / f"{HOSTILE.replace('/', '')}.png", tmp_path / "broken.png"]
    for drawing, path in zip(drawings, paths, strict=False):
        Image.open(drawing).save(path, pnginfo=info)
    paths[2].write_bytes(b"no image")
    asked, wrong = [], []

    def failed(request):
        # A stream that the page has done with is aborted.
        if request.failure != "net::ERR_ABORTED":
            wrong.append(f"{request.url}: {request.failure}")

    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=CHROMIUM)
        page = browser.new_page(viewport={"width": 1200, "height": 1000})
        page.on("request", lambda request: asked.append(request.url))
        page.on("requestfailed", failed)
        page.on("response", lambda answer: wrong.append(answer.url) if answer.status >= 400 else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
        page.goto(served.address)
        page.locator("input[type=file]").set_input_files(paths)
        page.get_by_text("Composed prompt").first.wait_for(timeout=60_000)
        page.get_by_role("button", name="Download the embeddings (.npz)").wait_for()
        cards = page.locator(".card").all_inner_texts()
        problems = page.locator(".problems").inner_text()
        page.screenshot(path=tmp_path / "answers.png", full_page=True)
        with page.expect_download() as download:
            page.get_by_role("button", name="Download the embeddings (.parquet)").click()
        download.value.save_as(tmp_path / "embeddings.parquet")
        page.get_by_role("tab", name="Text against image").click()
        page.get_by_label("Texts, one a line").fill(f"a red star\n{HOSTILE}")
        page.get_by_role("button", name="Rank the images").click()
        page.locator(".rank").first.wait_for()
        ranked = page.locator(".rank h3").all_inner_texts()
        page.screenshot(path=tmp_path / "ranking.png", full_page=True)
        links = page.eval_on_selector_all("link, script, img, iframe", "all => all.map(one => one.href || one.src)")
        browser.close()
    # What came with the images is read as it was written, and nothing of it was run.
    assert cards[0].startswith("été.png") and cards[1].startswith(paths[1].name) and HOSTILE in cards[1]
    assert "broken.png: not an image of a known format" in problems
    assert ranked == ["a red star", HOSTILE, "The nearest text to each image"]
    assert wrong == []
    assert asked and all(
        url.startswith((f"{served.address}/", "data:", "blob:")) for url in [*asked, *filter(None, links)]
    )
    assert len(read_predictions(tmp_path / "embeddings.parquet")) == 2
    for name in ("answers.png", "ranking.png"):
        with Image.open(tmp_path / name) as shown:
            assert shown.width == 1200 and len(shown.convert("RGB").getcolors(1 << 24)) > 200


def test_the_command_has_connected_to_nothing_and_ends_on_ctrl_c(served, client, images):
    answered(client, images)
    assert list(served.folder.glob("img2prompt-app-*/*/*.png"))
    began = time.monotonic()
    # The client still listens, as an open page does.
    served.process.send_signal(signal.SIGINT)
    _, said = served.process.communicate(timeout=30)
    assert served.process.returncode == 130 and said.strip().splitlines()[-1] == "interrupted", said
    assert time.monotonic() - began < 15 and "Cancel" not in said
    assert served.connections() == "" and not list(served.folder.glob("img2prompt-app-*"))
