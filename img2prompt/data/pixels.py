"""Pixels of rows at the size that the encoder wants: decoded once and kept in memory or on disk, or decoded each time.

# S = image_size_px
"""

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from img2prompt import ranks
from img2prompt.cache import Store, check_free, key_of
from img2prompt.data.decoding import ImageError
from img2prompt.data.fitting import fit
from img2prompt.data.images import decode
from img2prompt.data.sample import Sample

# To be raised when decoding or resizing give other pixels: kept ones are not used then.
_VERSION = 2
# Decoded and then stored: what a killed process loses.
_STORED_AT_ONCE_BYTES = 256 * 2**20
_DIGESTED = 256


class Pixels:
    """uint8 [3, S, S] of each sample, channels last in memory; what cannot be decoded is in `bad`, by row, with the
    reason.

    They are kept in memory where that takes at most `keep_gib`, else on disk where `folder` is given, else nowhere.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        image_size_px: int,
        interpolation: str,
        resize_mode: str,
        keep_gib: float = 0.0,
        threads: int = 4,
        folder: Path | None = None,
    ) -> None:
        self.samples = samples
        self.bad: dict[int, str] = {}
        # An image with several captions is several rows, and decoded once.
        numbers: dict[tuple[int, str], int] = {}
        keys = [(id(sample.source), sample.location) for sample in samples]
        self._image_of = np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)
        self._first_row = np.unique(self._image_of, return_index=True)[1]
        self.gib = len(numbers) * 3 * image_size_px**2 / 2**30
        self.keeps = self.gib <= keep_gib and folder is None
        self.image_size_px = image_size_px
        self._fit = (image_size_px, interpolation, resize_mode)
        self._shape = (image_size_px, image_size_px, 3)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="pixels")
        self._threads = threads
        self._kept: np.ndarray | None = None
        self._folder = folder and folder / "pixels" / f"{image_size_px}px-{interpolation}-{resize_mode}-v{_VERSION}"
        self._store: Store | None = None
        self._places = np.zeros(0, dtype=np.int64)

    @property
    def is_ready(self) -> bool:
        """Whether a batch is a copy from memory: no threads are needed to prepare it ahead."""
        return self._kept is not None

    def fill(self, advance: Callable[[int], object], shared: bool = True) -> None:
        """Decodes every image that is not on disk, to keep it or only to know which are bad; `advance` is told how many
        rows are done. ValueError when the disk is too small. Of several ranks the first decodes for all where all call
        this at one time, and `shared` is true.
        """
        if ranks.number() == 0 or not shared:
            self._decode(advance)
        if ranks.count() > 1 and shared:
            self._share()

    def _decode(self, advance: Callable[[int], object]) -> None:
        if self._folder is not None:
            self._fill_store(advance)
        elif self.keeps:
            self._kept = np.zeros((len(self._first_row), *self._shape), dtype=np.uint8)
            for _ in self._pool.map(self._place, self._kept, self._first_row.tolist()):
                advance(1)
        else:
            for _ in self._pool.map(self._decoded_or_none, self._first_row.tolist()):
                advance(1)
        advance(len(self.samples) - len(self._first_row))
        bad = {int(self._image_of[row]): reason for row, reason in self.bad.items()}
        self.bad = {row: bad[image] for row, image in enumerate(self._image_of.tolist()) if image in bad}

    def _share(self) -> None:
        bad = ranks.from_first(self.bad)
        if self.keeps:
            if self._kept is None:
                self._kept = np.empty((len(self._first_row), *self._shape), dtype=np.uint8)
            ranks.copy_first([torch.from_numpy(self._kept)])
        elif ranks.number() and self._folder is not None:
            # All that can be decoded is there by now.
            self._fill_store(lambda count: None)
        self.bad = bad

    def release(self) -> None:
        """Gives the memory back; images are decoded again when they are asked for."""
        self._kept = None

    def of(self, rows: Sequence[int]) -> tuple[list[int], UInt8[Tensor, "B 3 S S"]]:
        """The rows that can be decoded, and their pixels."""
        good = [row for row in rows if row not in self.bad]
        if self._kept is not None:
            pixels = self._kept[self._image_of[good]]
        elif self._store is not None:
            pixels = self._store.read(self._places[self._image_of[good]])
        else:
            pixels = np.empty((len(good), *self._shape), dtype=np.uint8)
            # Copied by the threads that decode: one that gathers would be what they wait for.
            list(self._pool.map(self._place, pixels, good))
            if not self.bad.keys().isdisjoint(good):
                pixels = pixels[[row not in self.bad for row in good]]
                good = [row for row in good if row not in self.bad]
        return good, torch.from_numpy(pixels).permute(0, 3, 1, 2)

    def digest(self) -> str:
        """Of some images, evenly spread, that could be decoded: another one when files have changed places."""
        good = [row for row in range(len(self.samples)) if row not in self.bad]
        chosen = [good[int(place)] for place in np.linspace(0, len(good) - 1, min(_DIGESTED, len(good)))]
        rows, pixels = self.of(chosen)
        return key_of(rows, hashlib.blake2b(pixels.contiguous().numpy().tobytes()).hexdigest()).hex()

    def _fill_store(self, advance: Callable[[int], object]) -> None:
        assert self._folder is not None
        size, interpolation, mode = self._fit
        about = {"image_size_px": size, "interpolation": interpolation, "resize_mode": mode, "version": _VERSION}
        store = Store(self._folder, self._shape, np.uint8, about)
        first = [self.samples[row] for row in self._first_row]
        keys = [key_of(sample.source.stamp(sample.location)) for sample in first]
        missing = np.flatnonzero(store.places(keys) < 0)
        check_free(self._folder, len(missing) * store.row_bytes, "choose another cache_dir, or data.cache=none")
        advance(len(keys) - len(missing))
        at_once = max(self._threads, _STORED_AT_ONCE_BYTES // store.row_bytes)
        for start in range(0, len(missing), at_once):
            images = missing[start : start + at_once]
            pixels = np.empty((len(images), *self._shape), dtype=np.uint8)
            for _ in self._pool.map(self._place, pixels, self._first_row[images].tolist()):
                advance(1)
            good = [i for i, image in enumerate(images) if int(self._first_row[image]) not in self.bad]
            store.add([keys[images[i]] for i in good], pixels[good])
        self._store, self._places = store, store.places(keys)

    def _place(self, place: np.ndarray, row: int) -> None:
        pixels = self._decoded_or_none(row)
        if pixels is not None:
            place[:] = pixels

    def _decoded_or_none(self, row: int) -> np.ndarray | None:
        sample = self.samples[row]
        try:
            square = fit(decode(sample.source.read(sample.location)), *self._fit)
        except (ImageError, ValueError, OSError) as error:
            self.bad[row] = str(error)
            return None
        return square.permute(1, 2, 0).numpy()
