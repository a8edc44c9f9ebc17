"""Pixels of rows at the size that the encoder wants, decoded once and kept in memory where they fit."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from jaxtyping import UInt8
from torch import Tensor

from img2prompt.data.images import ImageError, decode, fit
from img2prompt.data.sample import Sample


class Pixels:
    """uint8 [3, S, S] of each sample; decoded once, into memory, if that takes at most `keep_gib`.

    What cannot be decoded is in `bad`, by row, with the reason.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        image_size_px: int,
        interpolation: str,
        resize_mode: str,
        keep_gib: float,
        threads: int = 4,
    ) -> None:
        self.samples = samples
        self.shape = (3, image_size_px, image_size_px)
        self.bad: dict[int, str] = {}
        self._fit = (image_size_px, interpolation, resize_mode)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="pixels")
        self._kept: Tensor | None = None
        self.keeps = self.gib <= keep_gib

    @property
    def gib(self) -> float:
        """What keeping all of them takes."""
        return len(self.samples) * self.shape[0] * self.shape[1] * self.shape[2] / 2**30

    def fill(self, advance: Callable[[], object]) -> None:
        """Decodes every sample, to keep it or only to know which are bad; `advance` is called after each."""
        kept = torch.zeros(len(self.samples), *self.shape, dtype=torch.uint8) if self.keeps else None

        def place(row: int) -> None:
            try:
                pixels = self._decoded(row)
                if kept is not None:
                    kept[row] = pixels
            except ImageError as error:
                self.bad[row] = str(error)

        for _ in self._pool.map(place, range(len(self.samples))):
            advance()
        self._kept = kept

    def of(self, rows: Sequence[int]) -> tuple[list[int], UInt8[Tensor, "B 3 S S"]]:
        """The rows that can be decoded, and their pixels."""
        if self._kept is not None:
            good = [row for row in rows if row not in self.bad]
            return good, self._kept[good]
        good, pixels = [], []
        for row, future in [(row, self._pool.submit(self._decoded, row)) for row in rows]:
            try:
                pixels.append(future.result())
                good.append(row)
            except ImageError as error:
                self.bad[row] = str(error)
        return good, torch.stack(pixels) if pixels else torch.zeros(0, *self.shape, dtype=torch.uint8)

    def _decoded(self, row: int) -> Tensor:
        sample = self.samples[row]
        return fit(decode(sample.source.read(sample.location)), *self._fit)
