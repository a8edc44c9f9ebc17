"""From what a source found to the data that a run trains on."""

import csv
import hashlib
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from img2prompt.data.labels import Labels
from img2prompt.data.lineage import Lineage
from img2prompt.data.order import Draws
from img2prompt.data.pixels import Pixels
from img2prompt.data.prompts import hash_of, prompt_numbers
from img2prompt.data.sample import Sample, image_key
from img2prompt.data.split import Sides
from img2prompt.files import replacing, write_text
from img2prompt.training.datamodule import PairData


@dataclass
class Rows:
    """The table of a run: the samples that are used with their targets, and which of these validate."""

    samples: list[Sample]
    targets: Float[Tensor, "N D"]
    weights: dict[str, float]  # of the sources of a mixture, by name
    sides: Sides
    lineage: Lineage
    leak: dict[str, Any]  # the largest cosine between training and validation, and the two prompts
    vocabulary: list[str] = field(default_factory=list)  # of the training prompts, for a head that says words

    @property
    def validates(self) -> np.ndarray:
        """bool [N]"""
        return self.sides.validates

    def draws(self, rows: np.ndarray) -> Draws:
        """What an epoch over these training rows is."""
        samples = [self.samples[row] for row in rows]
        images: dict[str, int] = {}
        weights = [self.weights.get(sample.source.name, 1.0) for sample in samples]
        return Draws(
            prompt_numbers([sample.prompt for sample in samples]),
            np.array([images.setdefault(image_key(one), len(images)) for one in samples]),
            np.array(weights) / max(weights),
            np.frombuffer(b"".join(hash_of(sample.id, 0)[:8] for sample in samples), dtype=np.uint64),
        )

    def fingerprint(self) -> dict[str, Any]:
        """What `resume=` compares: two halves of a run must see the same rows on the same sides."""
        digest = hashlib.blake2b(digest_size=16)
        for sample, held in zip(self.samples, self.validates, strict=True):
            line = f"{sample.id}\0{sample.prompt}\0{sample.location}\0{int(held)}\n"
            digest.update(line.encode("utf-8", "surrogateescape"))
        return {"pairs": len(self.samples), "validate": int(self.validates.sum()), "blake2b": digest.hexdigest()}


def select(
    samples: Sequence[Sample], skipped: Sequence[tuple[str, str]], count: int | None, least: int = 2
) -> list[Sample]:
    """The samples to use, sorted by id: all, or `count` of them chosen by the hash of their ids.

    ValueError when fewer than `least` are left, or when an id comes twice.
    """
    chosen = sorted(samples, key=lambda sample: sample.id)
    if count is not None and count < len(chosen):
        if count < 2:
            raise ValueError(f"data.count must be at least 2, got {count}")
        chosen = sorted(chosen, key=lambda sample: hashlib.blake2b(sample.id.encode()).digest())[:count]
        chosen.sort(key=lambda sample: sample.id)
    if len(chosen) < least:
        first = f" (first: {skipped[0][0]}: {skipped[0][1]})" if skipped else ""
        what = "training needs at least two" if least == 2 else "data.val needs at least one"
        raise ValueError(f"{len(chosen)} usable pairs, {len(skipped)} skipped{first}; {what}")
    twice = next((a.id for a, b in zip(chosen, chosen[1:], strict=False) if a.id == b.id), None)
    if twice is not None:
        raise ValueError(f"two images have the id {twice}")
    return chosen


def load_pairs(
    rows: Rows,
    pixels: Pixels,
    batch_size: int,
    accumulated: int,
    seed: int,
    max_bad_fraction: float,
    advance: Callable[[int], object],
) -> PairData:
    """Decodes every image; rows with a bad one are left out of both sides of the split.

    ValueError when a side is empty then, or when more than `max_bad_fraction` of the images are bad.
    """
    pixels.fill(advance)
    samples, validates = rows.samples, rows.validates
    good = np.array([row not in pixels.bad for row in range(len(samples))])
    train_rows, val_rows = np.flatnonzero(~validates & good), np.flatnonzero(validates & good)
    if pixels.bad:
        row, reason = min(pixels.bad.items())
        told = f"{len(pixels.bad)} of {len(samples)} are bad (first: {samples[row].id}: {reason})"
        if not len(train_rows) or not len(val_rows):
            raise ValueError(f"no {'validation' if len(train_rows) else 'training'} image can be decoded: {told}")
        if len(pixels.bad) > max_bad_fraction * len(samples):
            raise ValueError(
                f"{told}, more than data.max_bad_fraction={max_bad_fraction} allows; mend or remove them, or raise it"
            )
    draws = rows.draws(train_rows)
    if draws.count < accumulated:
        raise ValueError(f"trainer.accumulate_grad_batches={accumulated}: an epoch has {draws.count} images; lower it")
    labels = Labels([sample.prompt for sample in samples], rows.vocabulary) if rows.vocabulary else None
    return PairData(samples, rows.targets, pixels, train_rows, val_rows, draws, batch_size, accumulated, seed, labels)


def write_pairs(samples: Sequence[Sample], folder: Path) -> None:
    """Writes images and prompts.csv in the layout of `data=kaggle`."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("imgId", "prompt"))
    for number, sample in enumerate(samples):
        # An id with folders in it would be another one as a file.
        name = sample.id if re.fullmatch(r"[\w#-]+", sample.id) else f"{number:06d}"
        with replacing(folder / "images" / f"{name}.png") as temporary:
            temporary.write_bytes(sample.source.read(sample.location))
        writer.writerow((name, sample.prompt))
    write_text(folder / "prompts.csv", text.getvalue())
