"""`app`: a predictor behind a web page of this machine."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from img2prompt.app.answers import Answers, Upload, answers_of, with_composed
from img2prompt.app.page import build_page
from img2prompt.app.server import bound, serve
from img2prompt.cache import cache_folder
from img2prompt.commands.composing import Composer, Composing
from img2prompt.commands.predict import introduce
from img2prompt.commands.predictor import TRAINED, check_numbers, check_use, made
from img2prompt.commands.sentences import sentence_of
from img2prompt.commands.settings import compose as composed_settings
from img2prompt.data.targets import TextEncoder
from img2prompt.predictors.predictor import Setting, text_model_of
from img2prompt.predictors.trained import pick_device
from img2prompt.provenance import located

_MOST_PORT = 65_535


def main(arguments: list[str]) -> None:
    app(**composed_settings("app", arguments))


def app(
    ckpt: str | None,
    text_model: str | None,
    device: str,
    batch_size: int,
    precision: str,
    top_k: int,
    top_words: int,
    compose: bool,
    compose_beams: int,
    compose_phrases: int,
    threads: int,
    port: int,
    cache_dir: str | None = None,
    predictor: Mapping[str, Any] = TRAINED,
    views: Sequence[str] = (),
    confidence: str | None = "auto",
) -> None:
    """Serves the page until it is interrupted. ValueError says what is wrong, before anything is loaded if it can."""
    check_use(predictor, ckpt, views)
    check_numbers(batch_size, threads, top_k, top_words, precision)
    if not 0 <= port <= _MOST_PORT:
        raise ValueError(f"port must be between 0 and {_MOST_PORT}, got {port}")
    how = Composing(compose_beams, compose_phrases)
    with bound(port) as listening:
        if ckpt is not None:
            ckpt = located(ckpt)
            introduce(ckpt)
        setting = Setting(pick_device(device), precision, text_model, cache_folder(cache_dir), top_k, top_words, ())
        chosen = made(predictor, ckpt, setting, views, confidence)
        has_bank = chosen.bank is not None and len(chosen.bank.prompts) > 0
        if not has_bank and (compose or top_k > 0):
            print("no bank of prompts: nearest and composed prompts are left out", file=sys.stderr)
        encoder = TextEncoder(text_model_of(chosen, setting), setting.device)
        if encoder.dimension != chosen.dimension:
            raise ValueError(
                f"{encoder.model.name} has dimension {encoder.dimension}, the predictions {chosen.dimension}"
            )
        composer = Composer(how, chosen, setting, encoder) if compose and has_bank else None

        def answer(uploads: list[Upload]) -> Iterator[Answers]:
            try:
                found = answers_of(uploads, chosen, encoder.embed, batch_size, threads)
                yield found
                if composer is not None:
                    yield from with_composed(found, composer.add_to)
            except Exception as error:
                sentence = sentence_of("app", error)
                if sentence is None:
                    raise
                raise ValueError(sentence) from None

        about = str(ckpt) if ckpt is not None else f"predictor={predictor['name']}"
        serve(lambda: build_page(about, answer, encoder.embed), listening)
