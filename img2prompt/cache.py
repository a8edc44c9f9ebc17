"""A crash-safe store of equal rows on disk, found by their keys: targets and decoded pixels are computed once.

A store is a folder of segments, and a segment is one file: n keys of 16 bytes, then n rows. It appears whole or not at
all, so a process that is killed loses the segment it was filling, and several processes may add to one store.
"""

import hashlib
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from img2prompt.files import replacing, write_json

KEY_BYTES = 16
_KEY = np.dtype(f"S{KEY_BYTES}")
_ABANDONED_AFTER_S = 24 * 3600


def cache_folder(given: str | None) -> Path:
    """`given`, else $IMG2PROMPT_CACHE, else img2prompt in the user's cache folder."""
    chosen = given or os.environ.get("IMG2PROMPT_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "img2prompt"


def key_of(*parts: object) -> bytes:
    """A key of 16 bytes; other parts, or the same text divided otherwise, give another key."""
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    for part in parts:
        text = str(part).encode("utf-8", "surrogatepass")
        digest.update(len(text).to_bytes(8, "big") + text)
    return digest.digest()


class Store:
    """Rows of one shape and dtype in `folder`; `about` says for people what they are. ValueError when the folder
    cannot be written.
    """

    def __init__(self, folder: Path, shape: tuple[int, ...], dtype: Any, about: dict[str, Any]) -> None:
        self.folder = folder
        self.shape = shape
        self.dtype = np.dtype(dtype)
        self.row_bytes = int(np.prod(shape)) * self.dtype.itemsize
        if not (folder / "about.json").is_file():
            try:
                write_json(folder / "about.json", about)
            except OSError as error:
                raise ValueError(f"{folder}: the cache cannot be written there ({error.strerror})") from None
        self._segments: list[tuple[str, int]] = []
        self._starts = np.zeros(1, dtype=np.int64)
        # Sorted, with the place of each: a million keys are 16 MB here and would be 150 MB as a dictionary.
        self._keys = np.zeros(0, dtype=_KEY)
        self._places = np.zeros(0, dtype=np.int64)
        self._new: list[np.ndarray] = []
        self._open()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def places(self, keys: Sequence[bytes]) -> np.ndarray:
        """Where the rows of these keys are, int64; -1 for keys that are not there."""
        self._sort()
        wanted = np.frombuffer(b"".join(keys), dtype=_KEY)
        # The newest of equal keys: it was written because the older one was damaged.
        at = np.searchsorted(self._keys, wanted, side="right") - 1
        inside = at >= 0
        found = np.full(len(wanted), -1, dtype=np.int64)
        hit = np.flatnonzero(inside)
        hit = hit[self._keys[at[hit]] == wanted[hit]]
        found[hit] = self._places[at[hit]]
        return found

    def read(self, places: np.ndarray) -> np.ndarray:
        """The rows at these places, in this order, [N, *shape]."""
        rows = np.empty((len(places), *self.shape), dtype=self.dtype)
        segments = np.searchsorted(self._starts, places, side="right") - 1
        for number in np.unique(segments):
            path, count = self._segments[number]
            mine = np.flatnonzero(segments == number)
            segment = _mapped(path, count, self.shape, self.dtype.str)
            for i in mine:
                rows[i] = segment[places[i] - self._starts[number]]
        return rows

    def add(self, keys: Sequence[bytes], rows: np.ndarray) -> None:
        """Writes a segment. OSError when the disk is full: nothing is lost but these rows."""
        if not keys:
            return
        path = self.folder / f"{time.time_ns():x}-{os.getpid():x}.rows"
        with replacing(path) as temporary, temporary.open("wb") as file:
            file.write(b"".join(keys))
            file.write(np.ascontiguousarray(rows, dtype=self.dtype).data)
        self._append(path)

    def _open(self) -> None:
        old = time.time() - _ABANDONED_AFTER_S
        for left in self.folder.glob(".*.tmp"):
            # What a killed process left; a younger one may still be written.
            with suppress(FileNotFoundError):
                if left.stat().st_mtime < old:
                    left.unlink()
        for path in sorted(self.folder.glob("*.rows")):
            self._append(path)

    def _append(self, path: Path) -> None:
        count, rest = divmod(path.stat().st_size, KEY_BYTES + self.row_bytes)
        if rest or not count or not path.is_file():
            # Not ours, or damaged: its rows are computed again.
            return
        self._segments.append((str(path), count))
        self._new.append(np.fromfile(path, dtype=_KEY, count=count))
        self._starts = np.append(self._starts, self._starts[-1] + count)

    def _sort(self) -> None:
        if self._new:
            keys = np.concatenate([self._keys, *self._new])
            places = np.concatenate([self._places, np.arange(len(self._places), len(keys))])
            order = np.argsort(keys, kind="stable")
            self._keys, self._places, self._new = keys[order], places[order], []


def free_bytes(folder: Path) -> int:
    """Of the disk that `folder` is on, or will be."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    return shutil.disk_usage(existing).free


def size_of(count: int) -> str:
    """So many bytes, for people."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def check_free(folder: Path, needed_bytes: int, advice: str) -> None:
    """ValueError, which ends in `advice`, when the disk of `folder` has less than `needed_bytes` free."""
    free = free_bytes(folder)
    if free < needed_bytes:
        raise ValueError(f"{folder}: {size_of(needed_bytes)} are needed there and {size_of(free)} are free; {advice}")


@lru_cache(maxsize=128)
def _mapped(path: str, count: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    # A map holds its file open, and a process may hold about a thousand.
    return np.memmap(path, dtype=dtype, mode="r", offset=count * KEY_BYTES, shape=(count, *shape))
