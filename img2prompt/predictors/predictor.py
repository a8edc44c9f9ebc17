"""Predictors turn images into predictions: decode and fit in threads, embed on the device, batch by batch."""

import sys
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from torch import Tensor

from img2prompt.bank import Bank
from img2prompt.data.decoding import ImageError
from img2prompt.data.images import decode
from img2prompt.data.listing import ImageFile, list_images, printable, read_bytes
from img2prompt.data.targets import DEFAULT_MODEL, TextModel, embeddings_of, locate
from img2prompt.hub import describe
from img2prompt.predictions import Prediction, joined
from img2prompt.regressor import Target


@dataclass(frozen=True)
class Item:
    """An image that is to be predicted: its id, its name for people, and its bytes, which `read` fetches, or says why
    not (OSError or ValueError).
    """

    id: str
    name: str
    read: Callable[[], bytes]


@dataclass(frozen=True)
class Setting:
    """What a predictor is used with, besides its own options. `items` are the images that are to be predicted."""

    device: str
    precision: str
    text_model: str | None
    cache: Path
    top_k: int
    top_words: int
    items: Sequence[Item]

    @cached_property
    def text(self) -> TextModel:
        """The text encoder whose embeddings are predicted, where the predictor has none of its own."""
        found = locate(DEFAULT_MODEL if self.text_model is None else self.text_model)
        if found.download is not None:
            print(f"downloading {describe(found.download)}", file=sys.stderr)
        return found

    def embeddings(self, prompts: Sequence[str]) -> Float[np.ndarray, "N D"]:
        """Of prompts, by that text encoder; unit length."""
        return embeddings_of(prompts, self.text, "fp32", self.device, self.cache)

    def text_files(self) -> list[Path]:
        """The files of that text encoder, where they are here."""
        location = Path(locate(self.text.name, self.text.revision).location)
        return sorted(path for path in location.rglob("*") if path.is_file()) if location.is_dir() else []

    def target(self, dimension: int) -> Target:
        return Target(self.text.name, self.text.revision, dimension)


class Predictor(ABC):
    """What turns images into embeddings. `prepare` runs in several threads, `predict_batch` on the device."""

    dimension: int
    target: Target
    # The prompts that it knows, where it knows any.
    bank: Bank | None = None
    # The mean of the embeddings that it was made from, and what these are: what it must beat.
    mean: Float[Tensor, " D"] | None = None
    mean_of: str = ""
    # The files that it was made from: with others its predictions may be others.
    files: Sequence[Path] = ()

    def controls(self) -> "Mapping[str, Predictor]":
        """Others that are scored beside it where the prompts are known."""
        return {}

    @abstractmethod
    def prepare(self, image: UInt8[Tensor, "3 H W"]) -> Any:
        """One RGB image at its native size, made ready for a batch."""

    @abstractmethod
    def predict_batch(self, ids: list[str], prepared: list[Any]) -> Prediction:
        """Unit embeddings [B, D] of prepared images, with the columns that this predictor has."""

    def predict(self, images: str | Path | Sequence[str | Path], batch_size: int = 32, threads: int = 4) -> Prediction:
        """Predicts the images that `images` names: a file, a folder, a glob, or a list of these.

        What cannot be read is in the result's `skipped` with the reason. ValueError when nothing can be read.
        """
        listing = list_images(images)
        batches = list(predict_files(self, listing.files, batch_size, threads))
        predicted = joined(batches) if batches else None
        skipped = listing.skipped + ([] if predicted is None else predicted.skipped)
        if predicted is None or not len(predicted):
            first = f" (first: {skipped[0][0]}: {skipped[0][1]})" if skipped else ""
            raise ValueError(f"images={images}: no readable image among {len(skipped)} files{first}")
        predicted.skipped = skipped
        return predicted


def items_of(files: Sequence[ImageFile]) -> list[Item]:
    return [Item(file.id, printable(file.path), partial(read_bytes, file.path)) for file in files]


def text_model_of(predictor: Predictor, setting: Setting) -> TextModel:
    """The text encoder whose embeddings it predicts, or the setting's; what it costs to fetch is said first."""
    target, chosen = predictor.target, setting.text_model
    # The name in a checkpoint is its author's.
    found = locate(chosen) if chosen is not None else locate(target.model, target.revision)
    if found.download is not None:
        print(f"downloading {describe(found.download)}", file=sys.stderr)
    return found


def predict_files(
    predictor: Predictor, files: Sequence[ImageFile], batch_size: int = 32, threads: int = 4
) -> Iterator[Prediction]:
    """Predictions of `files`; see `predict_items`."""
    return predict_items(predictor, items_of(files), batch_size, threads)


def predict_items(
    predictor: Predictor, items: Sequence[Item], batch_size: int = 32, threads: int = 4
) -> Iterator[Prediction]:
    """Predictions of images, one per `batch_size` of them and in their order, with a column `path`.

    Memory is bounded by two batches, however many images there are. Unreadable ones are in `skipped`.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    remaining = iter(items)
    waiting: deque[tuple[Item, Future[Any]]] = deque()
    with ThreadPoolExecutor(max(1, threads), thread_name_prefix="decode") as pool:
        while True:
            # While the device works on one batch, the threads prepare the next.
            for item in islice(remaining, 2 * batch_size - len(waiting)):
                waiting.append((item, pool.submit(_prepared, predictor, item)))
            if not waiting:
                return
            yield _predict_waiting(predictor, [waiting.popleft() for _ in range(min(batch_size, len(waiting)))])


def nearest_columns(bank: Bank | None, embeddings: Float[Tensor, "B D"], top_k: int) -> dict[str, list[Any]]:
    """The `top_k` nearest prompts of each prediction, and their cosines; nothing without a bank."""
    if bank is None or top_k < 1:
        return {}
    prompts, cosines = bank.nearest(embeddings.to(bank.embeddings.device), top_k)
    return {"nearest_prompts": prompts, "nearest_cosines": cosines}


def _predict_waiting(predictor: Predictor, batch: list[tuple[Item, Future[Any]]]) -> Prediction:
    good: list[Item] = []
    prepared: list[Any] = []
    skipped: list[tuple[str, str]] = []
    for item, future in batch:
        try:
            prepared.append(future.result())
            good.append(item)
        except ImageError as error:
            skipped.append((item.name, str(error)))
    predicted = predictor.predict_batch([item.id for item in good], prepared)
    predicted.columns = {"path": [item.name for item in good], **predicted.columns}
    predicted.skipped = skipped
    return predicted


def _prepared(predictor: Predictor, item: Item) -> Any:
    try:
        data = item.read()
    except (OSError, ValueError) as error:
        raise ImageError(str(error)) from None
    image = decode(data)
    try:
        return predictor.prepare(image)
    except (OSError, ValueError) as error:
        # A library's, or what becomes of a strange shape.
        raise ImageError(str(error)) from None
