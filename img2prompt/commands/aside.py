"""Predictions that are not sure enough are set aside, in a file of their own."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from img2prompt.predictions import WRITERS, Prediction, taken


@dataclass(frozen=True)
class Chosen:
    """The rows of `parts` whose confidence is at least `least`, or where not `sure` the others; it can be gone through
    as often as they can.
    """

    parts: Iterable[Prediction]
    least: float
    sure: bool

    def __iter__(self) -> Iterator[Prediction]:
        for part in self.parts:
            found = part.columns["confidence"]
            # Files keep no more digits.
            is_sure = np.asarray(found, dtype=np.float32) >= np.float32(self.least)
            yield taken(part, np.flatnonzero(is_sure == self.sure).tolist())


def aside_of(goal: Path) -> Path:
    return goal.with_name(f"{goal.stem}.aside{goal.suffix}")


def set_aside(goal: Path, parts: Iterable[Prediction], least: float) -> Chosen:
    """Writes those under `least` beside `goal`, and says so; returns the others. ValueError when there are none."""
    sure, others = Chosen(parts, least, True), Chosen(parts, least, False)
    beside = aside_of(goal)
    count, kept = sum(map(len, others)), sum(map(len, sure))
    if not count:
        # Of an earlier job with this name.
        beside.unlink(missing_ok=True)
        return sure
    WRITERS[goal.suffix](beside, others)
    if not kept:
        stale = f" ({goal} is of an earlier job)" if goal.exists() else ""
        raise ValueError(
            f"all {count} images are under min_confidence={least:g}; they are in {beside}, out is not written{stale}"
        )
    print(f"{count} of {count + kept} images are under min_confidence={least:g} and set aside: {beside}")
    return sure
