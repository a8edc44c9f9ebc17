"""From what a source found to the data that a run trains on."""

import csv
import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from img2prompt.data.pixels import Pixels
from img2prompt.data.sample import Found, Sample
from img2prompt.data.targets import TextEncoder
from img2prompt.files import replacing, write_text
from img2prompt.training.datamodule import PairData


@dataclass
class Rows:
    """The table of a run: what its source found, the samples that are used, and which of these validate."""

    found: Found
    samples: list[Sample]
    validates: np.ndarray  # bool [N]

    def fingerprint(self) -> dict[str, Any]:
        """What `resume=` compares: two halves of a run must see the same rows on the same sides."""
        digest = hashlib.blake2b(digest_size=16)
        for sample, held in zip(self.samples, self.validates, strict=True):
            digest.update(f"{sample.id}\0{sample.prompt}\0{sample.location}\0{int(held)}\n".encode())
        return {"pairs": len(self.samples), "validate": int(self.validates.sum()), "blake2b": digest.hexdigest()}


def select(found: Found, count: int | None) -> list[Sample]:
    """The samples to use, sorted by id: all, or `count` of them chosen by the hash of their ids.

    ValueError when nothing is left, or when an id comes twice.
    """
    samples = sorted(found.samples, key=lambda sample: sample.id)
    if count is not None and count < len(samples):
        if count < 2:
            raise ValueError(f"data.count must be at least 2, got {count}")
        samples = sorted(samples, key=lambda sample: hashlib.blake2b(sample.id.encode()).digest())[:count]
        samples.sort(key=lambda sample: sample.id)
    if len(samples) < 2:
        first = f" (first: {found.skipped[0][0]}: {found.skipped[0][1]})" if found.skipped else ""
        raise ValueError(
            f"{len(samples)} usable pairs, {len(found.skipped)} skipped{first}; training needs at least two"
        )
    twice = next((a.id for a, b in zip(samples, samples[1:], strict=False) if a.id == b.id), None)
    if twice is not None:
        raise ValueError(f"two images have the id {twice}")
    return samples


def load_pairs(
    rows: Rows,
    pixels: Pixels,
    text: TextEncoder,
    batch_size: int,
    seed: int,
    advance: Callable[[], object],
) -> PairData:
    """Decodes (if pixels are kept) and embeds; rows with a bad image are left out of both sides of the split.

    ValueError when a side is empty then.
    """
    pixels.fill(advance)
    samples, validates = rows.samples, rows.validates
    good = np.array([row not in pixels.bad for row in range(len(samples))])
    train_rows, val_rows = np.flatnonzero(~validates & good), np.flatnonzero(validates & good)
    if not len(train_rows) or not len(val_rows):
        row, reason = next(iter(pixels.bad.items()))
        side = "training" if not len(train_rows) else "validation"
        raise ValueError(
            f"no {side} image can be decoded: {len(pixels.bad)} are bad (first: {samples[row].id}: {reason})"
        )
    targets = torch.from_numpy(text.embed([sample.prompt for sample in samples]))
    return PairData(samples, targets, pixels, train_rows, val_rows, batch_size, seed)


def write_pairs(samples: Sequence[Sample], folder: Path) -> None:
    """Writes images and prompts.csv in the layout of `data=kaggle`."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("imgId", "prompt"))
    for sample in samples:
        with replacing(folder / "images" / f"{sample.id}.png") as temporary:
            temporary.write_bytes(sample.source.read(sample.location))
        writer.writerow((sample.id, sample.prompt))
    write_text(folder / "prompts.csv", text.getvalue())
