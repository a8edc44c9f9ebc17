"""`evaluate`: predictors on data whose prompts are known, beside floors and beside each other."""

import resource
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from img2prompt.cache import cache_folder
from img2prompt.commands.arguments import typed
from img2prompt.commands.choices import Choice, choices_of
from img2prompt.commands.evaluation_report import Answer, write_evaluation
from img2prompt.commands.predictor import made
from img2prompt.commands.settings import chosen_config, compose
from img2prompt.commands.sources import find
from img2prompt.data.cleaning import cleaned
from img2prompt.data.corruptions import CORRUPTIONS
from img2prompt.data.sample import Sample
from img2prompt.data.targets import TextModel, embeddings_of, locate
from img2prompt.hub import describe
from img2prompt.predictions import joined, read_predictions
from img2prompt.predictors.corrupted import Corrupted
from img2prompt.predictors.predictor import Item, Setting, predict_items
from img2prompt.predictors.trained import PRECISIONS, checkpoint_of, pick_device
from img2prompt.regressor import read_header
from img2prompt.training.pairs import select

_SHOWN = 5
_MOST_IN_MATRIX = 64


def main(arguments: list[str]) -> None:
    chosen = chosen_config("evaluate", arguments)
    settings = compose(chosen, arguments)
    if chosen != "evaluate":
        from img2prompt.commands.evaluate_variations import evaluate_variations

        evaluate_variations(**settings)
        return
    evaluate(**settings, overrides=[*map(typed, arguments)])


def evaluate(
    predictors: list[Any],
    out: str,
    data: dict[str, Any],
    text_model: str | None,
    device: str,
    batch_size: int,
    precision: str,
    threads: int,
    cache_dir: str | None,
    robustness: bool = False,
    overrides: list[str] | None = None,
) -> None:
    """Scores the predictors on the data, prints the tables and writes them to `out`, with the `overrides` that gave the
    settings, where they are known. ValueError says what is wrong.
    """
    if batch_size < 1 or threads < 1:
        raise ValueError(f"batch_size and threads must be at least 1, got {batch_size} and {threads}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    chosen = choices_of(predictors)
    goal = Path(out)
    if goal.is_file():
        raise ValueError(f"out={out}: a file; give a folder")
    samples = _samples(data)
    items = [Item(one.id, one.id, partial(one.source.read, one.location)) for one in samples]
    model = _target(chosen, text_model)
    setting = Setting(pick_device(device), precision, model.name, cache_folder(cache_dir), 1, 0, items)
    corruptions = CORRUPTIONS if robustness else ()
    prompts = [sample.prompt for sample in samples]
    targets = torch.from_numpy(embeddings_of(prompts, model, "fp32", setting.device, setting.cache))
    # What is wrong with one is said before another one predicts.
    ids = [item.id for item in items]
    saved = {choice.name: _saved(choice, ids) for choice in chosen if choice.saved is not None}
    for choice in chosen:
        _check(choice, model.name, text_model)
    answers = [
        saved[choice.name] if choice.name in saved else _answer(choice, setting, batch_size, threads, corruptions)
        for choice in chosen
    ]
    for one in answers:
        if one.embeddings.shape[1] != targets.shape[1]:
            raise ValueError(
                f"predictors: {one.name} predicts {one.embeddings.shape[1]} numbers, {model.name} has "
                f"{targets.shape[1]}; give the text encoder of its target as text_model="
            )
    # Only what all have predicted can be compared.
    everywhere = torch.stack([one.embeddings.isfinite().all(1) for one in answers]).all(0)
    rows = everywhere.nonzero()[:, 0].tolist()
    if not rows:
        raise ValueError("no image was predicted by all of the predictors")
    if len(rows) < len(samples):
        print(
            f"{len(samples) - len(rows)} of {len(samples)} images are left out: not all could predict them",
            file=sys.stderr,
        )
    kept = [samples[row] for row in rows]
    for one in answers:
        one.embeddings = one.embeddings[rows]
        one.snapped = None if one.snapped is None else one.snapped[rows]
        one.corrupted = {name: some[rows] for name, some in one.corrupted.items()}
    write_evaluation(goal, kept, targets[rows], answers, model.name, overrides)


def _target(chosen: Sequence[Choice], text_model: str | None) -> TextModel:
    """The text encoder of the prompts: the one that was named, else the first checkpoint's, else the usual one."""
    headers = [read_header(checkpoint_of(Path(choice.ckpt))) for choice in chosen if choice.ckpt is not None]
    found = locate(text_model) if text_model is not None else None
    if found is None:
        found = locate(headers[0].target.model, headers[0].target.revision) if headers else locate()
    if found.download is not None:
        print(f"downloading {describe(found.download)}", file=sys.stderr)
    return found


def _check(choice: Choice, model: str, text_model: str | None) -> None:
    """ValueError for a checkpoint of other embeddings, and for banks that are not there."""
    if choice.ckpt is not None:
        own = read_header(checkpoint_of(Path(choice.ckpt))).target.model
        if own != model:
            told = f"predictors: {choice.name} predicts embeddings of {own}, and the prompts are embedded by {model}"
            if text_model is None:
                raise ValueError(f"{told}; they cannot be compared")
            print(told, file=sys.stderr)
    bank = choice.settings.get("bank")
    for path in [] if bank is None else [bank] if isinstance(bank, str) else bank:
        if not Path(path).is_file():
            raise ValueError(f"predictors: {choice.name}: bank={path}: no such file")


def _samples(data: dict[str, Any]) -> list[Sample]:
    if data.get("root") is None and "sources" not in data and data["name"] != "demo":
        raise ValueError("data.root must be given: the images and their prompts")
    found = find(data)
    samples, empty = cleaned(found.samples) if data["clean"] else (found.samples, [])
    left_out = [*found.skipped, *empty]
    samples = select(samples, left_out, data["count"], least=0)
    if left_out:
        print(f"{len(left_out)} are left out (first: {left_out[0][0]}: {left_out[0][1]})", file=sys.stderr)
    if not samples:
        raise ValueError(f"data.root={data.get('root')}: no image with a prompt there")
    return samples


def _answer(choice: Choice, setting: Setting, batch_size: int, threads: int, corruptions: Sequence[str]) -> Answer:
    predictor = made(choice.settings, choice.ckpt, setting, choice.views)
    if setting.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(setting.device)
    began = time.monotonic()
    found = joined(list(predict_items(predictor, setting.items, batch_size, threads)))
    seconds = time.monotonic() - began
    for name, reason in found.skipped[:_SHOWN]:
        print(f"{choice.name}: {name}: {reason}", file=sys.stderr)
    ids = [item.id for item in setting.items]
    embeddings = _placed(found.ids, torch.from_numpy(found.embeddings), ids)
    answer = Answer(choice.name, embeddings, predictor.mean)
    answer.seconds_per_image = seconds / max(1, len(found))
    answer.memory_gib = _memory_gib(setting.device)
    if predictor.bank is not None and len(found):
        rows = predictor.bank.rows_of(torch.from_numpy(found.embeddings))
        answer.snapped = _placed(found.ids, rows, ids)
    for name in corruptions:
        changed = joined(list(predict_items(Corrupted(predictor, name), setting.items, batch_size, threads)))
        answer.corrupted[name] = _placed(changed.ids, torch.from_numpy(changed.embeddings), ids)
    return answer


def _saved(choice: Choice, ids: Sequence[str]) -> Answer:
    found = read_predictions(str(choice.saved))
    embeddings = _placed(found.ids, torch.from_numpy(found.embeddings), ids)
    if not embeddings.isfinite().any():
        raise ValueError(
            f"{choice.saved}: none of its ids (first: {found.ids[0]}) is an image of the data (first: {ids[0]})"
        )
    return Answer(choice.name, embeddings)


def _placed(own: Sequence[str], rows: Float[Tensor, "M D"], ids: Sequence[str]) -> Float[Tensor, "N D"]:
    """The rows of these ids, in this order; NaN where there is none."""
    place = {one: number for number, one in enumerate(own)}
    found = torch.full((len(ids), rows.shape[1]), torch.nan)
    for number, one in enumerate(ids):
        if one in place:
            found[number] = rows[place[one]]
    return found


def _memory_gib(device: str) -> float:
    """The peak: of the GPU for this predictor, else of the process so far."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2**30
    # Bytes on a Mac, kilobytes elsewhere.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
