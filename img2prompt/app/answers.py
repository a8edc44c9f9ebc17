"""What the web page says of images and of texts: plain functions that know nothing of a page.

# N = images, T = texts, D = width of an embedding
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, count
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from img2prompt.data.cleaning import clean
from img2prompt.data.decoding import ImageError
from img2prompt.data.images import small_jpeg
from img2prompt.data.listing import read_bytes
from img2prompt.data.metadata import Label, read_label
from img2prompt.metrics import cosines
from img2prompt.predictions import Prediction, joined
from img2prompt.predictors.predictor import Item, Predictor, predict_items

# More are work for `predict`.
MOST_IMAGES, MOST_TEXTS = 100, 100
THUMBNAIL_PX = 256
# A prompt takes seconds, and whoever waits wants to see it.
_COMPOSED_AT_ONCE = 8

# Texts to their unit embeddings, float32 [T, D].
Encode = Callable[[list[str]], np.ndarray]


@dataclass(frozen=True)
class Upload:
    """A file that somebody gave, and the name that it had there, which may be any text."""

    name: str
    path: Path


@dataclass(frozen=True)
class OwnPrompt:
    """What an image's own metadata say of its prompt: a label and the cosine of its embedding with the prediction, or
    the reason why they cannot be trusted, or nothing.
    """

    label: Label | None = None
    cosine: float | None = None
    reason: str = ""


@dataclass
class Answers:
    """What is said of N images: `prediction` has the ids, the columns, and in `skipped` the name and the reason of each
    file that could not be read.
    """

    prediction: Prediction
    thumbnails: list[bytes]  # JPEG
    own_prompts: list[OwnPrompt]


def answers_of(
    uploads: Sequence[Upload], predictor: Predictor, encode: Encode, batch_size: int, threads: int
) -> Answers:
    """What `predictor` says of each of these files. ValueError for none, and for more than `MOST_IMAGES`."""
    if not uploads:
        raise ValueError("no image was given")
    if len(uploads) > MOST_IMAGES:
        raise ValueError(
            f"{len(uploads)} images are more than the page takes at once, {MOST_IMAGES}; img2prompt predict takes "
            "whole folders"
        )
    names = [sound(one.name) for one in uploads]
    ids = ids_of(names)
    items = [
        Item(image_id, name, partial(read_bytes, one.path))
        for image_id, name, one in zip(ids, names, uploads, strict=True)
    ]
    prediction = joined(list(predict_items(_WithThumbnails(predictor), items, batch_size, threads)))
    thumbnails = prediction.columns.pop("thumbnail")
    paths = dict(zip(ids, (one.path for one in uploads), strict=True))
    labels = [_label(paths[image_id]) for image_id in prediction.ids]
    return Answers(prediction, thumbnails, _compared(labels, prediction.embeddings, encode))


def with_composed(answers: Answers, compose: Callable[[Prediction], object]) -> Iterator[Answers]:
    """The same answers as more and more images get the columns that `compose` adds, `composed_prompt` and
    `composed_cosine`; those that are yet to come are empty.
    """
    whole = answers.prediction
    prompts, values = [""] * len(whole), [0.0] * len(whole)
    for start in range(0, len(whole), _COMPOSED_AT_ONCE):
        few = slice(start, start + _COMPOSED_AT_ONCE)
        part = Prediction(whole.ids[few], whole.embeddings[few])
        compose(part)
        prompts[few], values[few] = part.columns["composed_prompt"], part.columns["composed_cosine"]
        whole.columns |= {"composed_prompt": prompts, "composed_cosine": values}
        yield answers


def lines_of(text: str) -> list[str]:
    """The distinct lines that say something. ValueError for more than `MOST_TEXTS`."""
    lines = list(dict.fromkeys(line for one in sound(text).splitlines() if (line := one.strip())))
    if len(lines) > MOST_TEXTS:
        raise ValueError(f"{len(lines)} texts are more than the page takes at once, {MOST_TEXTS}")
    return lines


def likeness(texts: list[str], answers: Answers, encode: Encode) -> Float[np.ndarray, "T N"]:
    """The cosine of each text with what is predicted of each image."""
    return encode(texts) @ answers.prediction.embeddings.T


def ids_of(names: Sequence[str]) -> list[str]:
    """An id for each file, none twice: its name without the ending, or more of it where an earlier one has that."""
    taken: dict[str, None] = {}
    for name in names:
        choices = chain((PurePosixPath(name).stem or name, name), (f"{name} ({number})" for number in count(2)))
        taken[next(one for one in choices if one not in taken)] = None
    return list(taken)


def sound(text: str) -> str:
    """The text as it can be written and embedded: JSON may bring halves of characters."""
    return text.encode("utf-8", "backslashreplace").decode()


class _WithThumbnails(Predictor):
    """A predictor with a column `thumbnail`, so that an image is decoded once."""

    def __init__(self, inner: Predictor) -> None:
        self.inner = inner

    def prepare(self, image: UInt8[Tensor, "3 H W"]) -> tuple[Any, bytes]:
        return self.inner.prepare(image), small_jpeg(image, THUMBNAIL_PX)

    def predict_batch(self, ids: list[str], prepared: list[tuple[Any, bytes]]) -> Prediction:
        found = self.inner.predict_batch(ids, [one for one, _ in prepared])
        found.columns["thumbnail"] = [small for _, small in prepared]
        return found


def _label(path: Path) -> OwnPrompt:
    try:
        label = read_label(read_bytes(path))
    except (ImageError, ValueError) as error:
        return OwnPrompt(reason=str(error))
    if label is None:
        return OwnPrompt()
    return OwnPrompt(Label(sound(label.prompt), sound(label.negative_prompt), label.tool))


def _compared(found: list[OwnPrompt], embeddings: Float[np.ndarray, "N D"], encode: Encode) -> list[OwnPrompt]:
    """With the cosines: of the prompt as training would clean it, because that is what is predicted."""
    texts = {row: clean(one.label.prompt) for row, one in enumerate(found) if one.label is not None}
    rows = [row for row, text in texts.items() if text]
    if not rows:
        return found
    targets = torch.from_numpy(encode([texts[row] for row in rows]))
    values = dict(zip(rows, cosines(torch.from_numpy(embeddings[rows]), targets).tolist(), strict=True))
    return [OwnPrompt(one.label, values.get(row), one.reason) for row, one in enumerate(found)]
