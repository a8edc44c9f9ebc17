"""What the predictors of an evaluation say of its images, each placed at its image."""

import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from img2prompt.cache import cache_folder
from img2prompt.commands.choices import Choice, choices_of
from img2prompt.commands.predictor import check_numbers, made
from img2prompt.data.prompts import prompt_key
from img2prompt.data.targets import TextModel, embeddings_of, locate
from img2prompt.hub import describe
from img2prompt.predictions import Prediction, joined, read_predictions
from img2prompt.predictors.corrupted import Corrupted
from img2prompt.predictors.predictor import Item, Setting, predict_items
from img2prompt.predictors.trained import pick_device
from img2prompt.provenance import header_of
from img2prompt.refine.confidence import NEIGHBOURS, read_confidence

_SHOWN = 5


@dataclass
class Answer:
    """What one predictor says of the images: NaN where it says nothing."""

    name: str
    embeddings: Float[Tensor, "N D"]
    constant: Float[Tensor, " D"] | None = None  # the mean of what it was made from
    snapped: Float[Tensor, "N D"] | None = None  # the nearest prompt of a bank
    snapped_to: str = "its bank"
    seconds_per_image: float | None = None
    memory_gib: float | None = None
    confidence: Float[Tensor, " N"] | None = None  # the cosine that it expects each prediction to have
    corrupted: dict[str, Float[Tensor, "N D"]] = field(default_factory=dict)  # what it says of corrupted images
    skipped: Sequence[tuple[str, str]] = ()  # what it could not predict, and why
    seen: int | None = None  # how many images have a prompt of its bank, where it has one


@dataclass(frozen=True)
class Questions:
    """Who is asked, and how; `model` embeds the prompts, `text_model` is what the user named."""

    chosen: Sequence[Choice]
    model: TextModel
    text_model: str | None
    device: str
    precision: str
    batch_size: int
    threads: int
    cache: Path

    def setting(self, items: Sequence[Item] = ()) -> Setting:
        return Setting(self.device, self.precision, self.model.name, self.cache, NEIGHBOURS, 0, items)

    def embeddings(self, prompts: Sequence[str]) -> Float[Tensor, "N D"]:
        """Of prompts, in the space of the predictions."""
        return torch.from_numpy(embeddings_of(prompts, self.model, "fp32", self.device, self.cache))


def asked(
    predictors: list[Any],
    out: str,
    text_model: str | None,
    device: str,
    batch_size: int,
    precision: str,
    threads: int,
    cache_dir: str | None,
) -> Questions:
    """Who is asked, by the settings of a command; ValueError says what is wrong with them."""
    check_numbers(batch_size, threads, 0, 0, precision)
    if Path(out).is_file():
        raise ValueError(f"out={out}: a file; give a folder")
    chosen = choices_of(predictors)
    model = _target(chosen, text_model)
    for choice in chosen:
        _check(choice, model.name, text_model)
    where = pick_device(device)
    return Questions(chosen, model, text_model, where, precision, batch_size, threads, cache_folder(cache_dir))


def answers_of(
    questions: Questions,
    items: Sequence[Item],
    dimension: int,
    corruptions: Sequence[str] = (),
    prompts: Sequence[str] = (),
) -> tuple[list[int], list[Answer]]:
    """The rows of `items` that all predictors can predict, for only these can be compared, and what each says of them.
    Of their `prompts`, where they have any, those are counted that a predictor has seen. ValueError where there are no
    such rows, and for embeddings of another dimension.
    """
    lasting = [one.name for one in questions.chosen if one.saved is not None]
    if corruptions and len(lasting) == len(questions.chosen):
        raise ValueError("robustness=true: saved predictions cannot be made again of other pictures; name a predictor")
    if corruptions and lasting:
        print(f"robustness: not of {', '.join(lasting)}, which is saved", file=sys.stderr)
    name = questions.model.name
    setting = questions.setting(items)
    # What is wrong with one is said before another one predicts.
    ids = [item.id for item in items]
    saved = {choice.name: _saved(choice, ids) for choice in questions.chosen if choice.saved is not None}
    answers = [
        saved.get(one.name) or _answer(one, setting, questions, corruptions, prompts) for one in questions.chosen
    ]
    for one in answers:
        if one.embeddings.shape[1] != dimension:
            raise ValueError(
                f"predictors: {one.name} predicts {one.embeddings.shape[1]} numbers, {name} has {dimension}; give the "
                "text encoder of its target as text_model="
            )
    everywhere = torch.stack([one.embeddings.isfinite().all(1) for one in answers]).all(0)
    rows = everywhere.nonzero()[:, 0].tolist()
    if not rows:
        raise ValueError("no image was predicted by all of the predictors")
    if len(rows) < len(items):
        told = f"{len(items) - len(rows)} of {len(items)} images are left out: not all could predict them"
        print(told, file=sys.stderr)
    for one in answers:
        one.embeddings = one.embeddings[rows]
        one.confidence = None if one.confidence is None else one.confidence[rows]
        one.snapped = None if one.snapped is None else one.snapped[rows]
        one.corrupted = {name: some[rows] for name, some in one.corrupted.items()}
    return rows, answers


def _target(chosen: Sequence[Choice], text_model: str | None) -> TextModel:
    """The text encoder of the prompts: the one that was named, else the first checkpoint's, else the usual one."""
    headers = [header_of(choice.ckpt) for choice in chosen if choice.ckpt is not None]
    found = locate(text_model) if text_model is not None else None
    if found is None:
        found = locate(headers[0].target.model, headers[0].target.revision) if headers else locate()
    if found.download is not None:
        print(f"downloading {describe(found.download)}", file=sys.stderr)
    return found


def _check(choice: Choice, model: str, text_model: str | None) -> None:
    """ValueError for a checkpoint of other embeddings, and for banks that are not there."""
    if choice.ckpt is not None:
        own = header_of(choice.ckpt).target.model
        if own != model:
            told = f"predictors: {choice.name} predicts embeddings of {own}, and the prompts are embedded by {model}"
            if text_model is None:
                raise ValueError(f"{told}; they cannot be compared")
            print(told, file=sys.stderr)
    bank = choice.settings.get("bank")
    for path in [] if bank is None else [bank] if isinstance(bank, str) else bank:
        if not Path(path).is_file():
            raise ValueError(f"predictors: {choice.name}: bank={path}: no such file")


def _answer(
    choice: Choice, setting: Setting, questions: Questions, corruptions: Sequence[str], prompts: Sequence[str]
) -> Answer:
    batch_size, threads = questions.batch_size, questions.threads
    predictor = made(choice.settings, choice.ckpt, setting, choice.views, choice.confidence)
    if setting.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(setting.device)
    began = time.monotonic()
    found = joined(list(predict_items(predictor, setting.items, batch_size, threads)))
    seconds = time.monotonic() - began
    for name, reason in found.skipped[:_SHOWN]:
        print(f"{choice.name}: {name}: {reason}", file=sys.stderr)
    if len(found.skipped) > _SHOWN:
        print(f"{choice.name}: … and {len(found.skipped) - _SHOWN} more", file=sys.stderr)
    ids = [item.id for item in setting.items]
    embeddings = _placed(found.ids, torch.from_numpy(found.embeddings), ids)
    answer = Answer(choice.name, embeddings, predictor.mean)
    answer.seconds_per_image = seconds / max(1, len(found))
    answer.memory_gib = _memory_gib(setting.device)
    answer.confidence, answer.skipped = _confidence(found, ids), found.skipped
    if predictor.bank is not None and len(found):
        rows = predictor.bank.rows_of(torch.from_numpy(found.embeddings))
        answer.snapped = _placed(found.ids, rows, ids)
    if predictor.bank is not None and prompts:
        keys = {prompt_key(text) for text in prompts}
        known = {key for text in predictor.bank.prompts if (key := prompt_key(text)) in keys}
        answer.seen = sum(prompt_key(text) in known for text in prompts)
        if answer.seen:
            told = f"{answer.seen} of {len(prompts)} images have a prompt of its bank: its score is too good"
            print(f"{choice.name}: {told}", file=sys.stderr)
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
    if choice.confidence is None:
        found.columns.pop("confidence", None)
    elif choice.confidence != "auto":
        found.columns["confidence"] = read_confidence(Path(choice.confidence))(found).tolist()
    if not np.isfinite(np.array(found.columns.get("confidence", []), dtype=np.float64)).all():
        raise ValueError(f"{choice.saved}: the confidence of some images is no number")
    there = set(found.ids)
    lacking = [(one, "not among the saved predictions") for one in ids if one not in there]
    return Answer(choice.name, embeddings, confidence=_confidence(found, ids), skipped=lacking)


def _confidence(found: Prediction, ids: Sequence[str]) -> Float[Tensor, " N"] | None:
    if "confidence" not in found.columns:
        return None
    return _placed(found.ids, torch.tensor(found.columns["confidence"], dtype=torch.float32)[:, None], ids)[:, 0]


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
