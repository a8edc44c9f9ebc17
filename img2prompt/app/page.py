"""The page: images are dropped, answers appear; texts are typed and ranked; embeddings are downloaded."""

import html
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gradio

from img2prompt.app.answers import Answers, Encode, Upload, likeness, lines_of
from img2prompt.app.cards import STYLE, cards, note, ranking
from img2prompt.predictions import WRITERS

DOWNLOADS = (".parquet", ".npz")
# What was uploaded is removed after an hour, looked for every ten minutes.
_CLEARED_EVERY_S, _KEPT_S = 600, 3600
_EMPTY = "Drop images above: one or several, of any size."

# Files to what is said of them: at once, and again when more is known.
Answer = Callable[[list[Upload]], Iterator[Answers]]

PAGE_STYLE = f"{STYLE}\n.gradio-container {{ max-width: 1100px !important; margin: 0 auto; }}"


def build_page(about: str, answer: Answer, encode: Encode) -> gradio.Blocks:
    """The page of a predictor: `about` names it, `answer` asks it, and `encode` embeds what is typed."""
    with gradio.Blocks(title="img2prompt", analytics_enabled=False, delete_cache=(_CLEARED_EVERY_S, _KEPT_S)) as page:
        gradio.HTML(f"<h1>img2prompt</h1>{note(about)}")
        dropped = gradio.File(file_count="multiple", label="Images", height=150)
        known = gradio.State(None, time_to_live=_KEPT_S)
        with gradio.Tab("Prompts of the images"):
            said = gradio.HTML(note(_EMPTY))
            with gradio.Row():
                files = [
                    gradio.DownloadButton(f"Download the embeddings ({ending})", visible=False, size="sm")
                    for ending in DOWNLOADS
                ]
        with gradio.Tab("Text against image"):
            with gradio.Row(equal_height=True):
                typed = gradio.Textbox(label="Texts, one a line", lines=3, max_lines=12, scale=6)
                asked = gradio.Button("Rank the images", variant="primary", scale=1, min_width=170)
            ranked = gradio.HTML("")
        _keep_names(dropped)

        def answered(uploads: list[Upload] | None) -> Iterator[tuple[Any, ...]]:
            nothing = [gradio.DownloadButton(value=None, visible=False) for _ in DOWNLOADS]
            if not uploads:
                yield None, note(_EMPTY), *nothing
                return
            with _in_words():
                for found in answer(uploads):
                    if not len(found.prediction):
                        yield found, cards(found), *nothing
                        continue
                    with TemporaryDirectory() as folder:
                        paths = [Path(folder, f"embeddings{ending}") for ending in DOWNLOADS]
                        for path in paths:
                            WRITERS[path.suffix](path, [found.prediction])
                        # Gradio copies them before it goes on.
                        yield found, cards(found), *(gradio.DownloadButton(value=path, visible=True) for path in paths)

        def compared(found: Answers | None, text: str | None) -> str:
            with _in_words():
                texts = lines_of(text or "")
            if found is None or not len(found.prediction):
                return note("Drop images first.") if texts else ""
            return ranking(texts, likeness(texts, found, encode), found) if texts else ""

        # One at a time: neither a model nor a tokenizer wants two threads.
        one_by_one: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model"}
        ranks: dict[str, Any] = {"fn": compared, "inputs": [known, typed], "outputs": ranked, **one_by_one}
        dropped.change(answered, dropped, [known, said, *files], api_name="answer", **one_by_one).then(
            **ranks, api_visibility="private"
        )
        asked.click(**ranks, api_name="rank")
    # A request may name a file wherever it is to give anything, even a text.
    for component in {component for door in page.fns.values() for component in door.inputs}:
        _take_uploads_only(component)
    return page


def _take_uploads_only(component: Any) -> None:
    """Gradio would fetch an address that a request names as a file, and take any file of this machine for one that was
    uploaded; it looks only where it launched the page itself, and at no address.
    """
    assert hasattr(component, "async_move_resource_to_block_cache"), "this version of Gradio guards its files otherwise"
    folder = Path(component.GRADIO_CACHE).resolve()

    async def uploaded(path: str | Path | None) -> str:
        found = Path(path or "").resolve()
        if not found.is_relative_to(folder):
            raise gradio.Error("that file was not uploaded", print_exception=False)
        component.temp_files.add(str(found))
        return str(found)

    # On this one alone: Gradio writes a file beside the module of every class that is derived from its own.
    vars(component)["async_move_resource_to_block_cache"] = uploaded


def _keep_names(component: gradio.File) -> None:
    """Gradio's own names of files have lost all characters that it holds to be special."""

    def uploads(payload: Any) -> list[Upload]:
        return [Upload(Path(one.orig_name or one.path).name, Path(one.path)) for one in payload or []]

    vars(component)["preprocess"] = uploads


@contextmanager
def _in_words() -> Iterator[None]:
    """What is wrong is shown; the page takes it for HTML."""
    try:
        yield
    except ValueError as error:
        raise gradio.Error(html.escape(str(error)), print_exception=False) from None
