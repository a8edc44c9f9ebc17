"""The records that an item is, from row to batch.

A `Sample` is a row: everything that is decided before pixels are read (split, order, duplicates) is a mask or an
order over one table of rows. A `Batch` is all that a loss sees.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor


@runtime_checkable
class Source(Protocol):
    """Where samples come from. `read` is called from several threads at once."""

    name: str
    # Where its images lie as files; None where they are drawn or in archives.
    images: Path | None

    def find(self) -> "Found": ...

    def read(self, location: str) -> bytes:
        """The encoded image at `location`; OSError or ValueError when it cannot be read."""
        ...

    def stamp(self, location: str) -> str:
        """What changes when the bytes at `location` may have changed: decoded pixels are kept by it."""
        ...


@dataclass(frozen=True, slots=True)
class Sample:
    """One image with its prompt: a row. `location` means something to its source alone."""

    id: str
    prompt: str
    source: Source
    location: str
    # What a compositional prompt combines, such as (colour, kind) pairs: held out by combination, never seen before.
    combinations: frozenset[tuple[str, ...]] = frozenset()
    negative_prompt: str = ""
    raw_prompt: str = ""  # as it was found, where cleaning has changed it


def image_key(sample: Sample) -> str:
    """Equal for rows of one image, also where several sources name one file."""
    try:
        return sample.source.stamp(sample.location)
    except (ValueError, OSError):
        # Drawn, or gone.
        return f"{id(sample.source)} {sample.location}"


def image_digest(sample: Sample) -> str | None:
    """The image of a row, the same in another process; None where it is drawn, or gone."""
    try:
        return hashlib.blake2b(sample.source.stamp(sample.location).encode(), digest_size=8).hexdigest()
    except (ValueError, OSError):
        return None


@dataclass
class Found:
    """What a source holds: rows that can be used, and the others with the reason why not."""

    samples: list[Sample]
    skipped: list[tuple[str, str]] = field(default_factory=list)  # (id or path, reason)
    weights: dict[str, float] = field(default_factory=dict)  # of a mixture, by the name of the source; else 1


@dataclass
class Batch:
    """B items as the model and the loss see them.

    `inputs` is {"images": uint8 [B, 3, H, W]}, or {"pooled": [B, E]} where the encoder has spoken before;
    `rows` index the table of samples.
    """

    inputs: dict[str, Tensor]
    rows: Int[Tensor, " B"]
    targets: Float[Tensor, "B D"]
    ids: list[str]
    mirrorable: Bool[Tensor, " B"]  # False where the prompt speaks of left or right
    labels: Float[Tensor, "B V"] | None = None  # 1 where the prompt has a word of the head's vocabulary, else 0
