"""Pairs become batches: which rows, in which order, with which pixels and targets."""

import copy
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from jaxtyping import Float
from lightning import LightningDataModule
from torch import Tensor

from img2prompt import ranks
from img2prompt.data.labels import Labels
from img2prompt.data.order import Draws, batch_rows, place_of, steps_per_epoch
from img2prompt.data.pixels import Pixels
from img2prompt.data.prompts import may_be_mirrored
from img2prompt.data.sample import Batch, Sample
from img2prompt.training.kept import Kept

# Images that are encoded at once where nothing is learnt, however large the batches are.
_MOST_SCORED = 256


class PairData(LightningDataModule):
    """A table of samples with targets [N, D] and pixels; `train_rows` and `val_rows` say which row is for what, and
    `draws` what an epoch over the training rows is; `labels` are the words of all rows where the head has any.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        targets: Float[Tensor, "N D"],
        pixels: Pixels,
        train_rows: np.ndarray,
        val_rows: np.ndarray,
        draws: Draws,
        batch_size: int,
        accumulated: int,
        seed: int,
        labels: Labels | None = None,
    ) -> None:
        super().__init__()
        self.samples = samples
        self.targets = targets
        self.pixels = pixels
        self.train_rows = train_rows
        self.val_rows = val_rows
        self.draws = draws
        self.mirrorable = torch.tensor([may_be_mirrored(sample.prompt) for sample in samples])
        self.batch_size = batch_size
        self.accumulated = accumulated  # batches in a step
        self.seed = seed
        self.labels = labels
        self.kept: Kept | None = None  # stands for the pixels

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(self.draws.count, self.batch_size * self.accumulated)

    def is_epoch_end(self, step: int) -> bool:
        """Whether so many steps are whole epochs."""
        size = self.batch_size * self.accumulated
        return step > 0 and place_of(self.draws.count, size, self.draws.stages, step)[1] == 0

    @property
    def images_per_step(self) -> int:
        return min(self.batch_size * self.accumulated, self.draws.count)

    def train_batches(self, stage: str, start: int, total: int) -> "TrainBatches":
        """The batches of steps start..total-1 of a stage."""
        return TrainBatches(self, stage, start * self.accumulated, total * self.accumulated)

    def ids_of(self, stage: str, step: int) -> list[str]:
        """The ids of the images of a step."""
        places = batch_rows(self.draws, self.batch_size * self.accumulated, self.seed, stage, step)
        return [self.samples[row].id for row in self.train_rows[places]]

    def with_kept(self, kept: Kept) -> "PairData":
        """The same with what an encoder said of the good rows for their pixels."""
        return self._changed(self.pixels, kept)

    def with_pixels(self, pixels: Pixels) -> "PairData":
        """The same with other pixels of the same rows."""
        return self._changed(pixels, None)

    def with_draws(self, draws: Draws) -> "PairData":
        """The same with other epochs."""
        changed = copy.copy(self)
        changed.draws = draws
        return changed

    def _changed(self, pixels: Pixels, kept: Kept | None) -> "PairData":
        changed = copy.copy(self)
        changed.pixels, changed.kept = pixels, kept
        return changed

    def batches_of(self, rows: Sequence[int] | np.ndarray, first: int = 0, every: int = 1) -> Iterator[Batch]:
        """Batches of these rows in their order, from the `first` of them one in `every`; rows whose image is bad are
        left out.
        """
        rows = [int(row) for row in rows]
        size = min(self.batch_size, _MOST_SCORED)
        for start in range(first * size, len(rows), every * size):
            good, inputs = self._inputs(rows[start : start + size])
            if good:
                yield self._batch(good, inputs)

    def train_batch(self, stage: str, number: int) -> Batch:
        """Batch `number` of a stage, a part of step number // accumulated; of several ranks, this one's share of it.

        A bad image is replaced by the next good row of the table, always the same.
        """
        step, part = divmod(number, self.accumulated)
        places = batch_rows(self.draws, self.batch_size * self.accumulated, self.seed, stage, step)
        places = ranks.share_of(np.array_split(places, self.accumulated)[part])
        rows, inputs = self._inputs([int(row) for row in self.train_rows[places]])
        if len(rows) < len(places):
            there = set(rows)
            bad = [place for place in places if int(self.train_rows[place]) not in there]
            rows, inputs = self._inputs(rows + [self._next_good(int(place)) for place in bad])
        return self._batch(rows, inputs)

    def _inputs(self, rows: list[int]) -> tuple[list[int], dict[str, Tensor]]:
        """The rows whose image is good, and what the encoder is given for them."""
        if self.kept is not None:
            return self.kept.of(rows)
        good, images = self.pixels.of(rows)
        return good, {"images": images}

    def _next_good(self, place: int) -> int:
        for step in range(1, len(self.train_rows)):
            row = int(self.train_rows[(place + step) % len(self.train_rows)])
            if self._inputs([row])[0]:
                return row
        raise ValueError("no training image can be decoded")

    def _batch(self, rows: list[int], inputs: dict[str, Tensor]) -> Batch:
        numbers = torch.tensor(rows)
        ids = [self.samples[row].id for row in rows]
        labels = None if self.labels is None else self.labels.of(rows)
        return Batch(inputs, numbers, self.targets[numbers], ids, self.mirrorable[numbers], labels)


class TrainBatches:
    """The batches start..total-1 of a stage; those that must be decoded are prepared while the model works."""

    def __init__(self, data: PairData, stage: str, start: int, total: int, ahead: int = 2) -> None:
        self.data, self.stage, self.start, self.total, self.ahead = data, stage, start, total, ahead

    def __len__(self) -> int:
        return self.total - self.start

    def __iter__(self) -> Iterator[Batch]:
        if self.data.kept is not None or self.data.pixels.is_ready:
            # A copy from memory is short, and a second thread's OpenMP team would spin on the model's cores.
            for number in range(self.start, self.total):
                yield self.data.train_batch(self.stage, number)
            return
        waiting: deque[Future[Batch]] = deque()
        with ThreadPoolExecutor(1, thread_name_prefix="batches") as thread:
            for number in range(self.start, self.total):
                waiting.append(thread.submit(self.data.train_batch, self.stage, number))
                if len(waiting) > self.ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
