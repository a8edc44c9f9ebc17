"""Which variations of which images are made, from which seeds, under which names; and the table of those that are."""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from img2prompt.synthesis.pairs import seed_of

TABLE = "variations.jsonl"


@dataclass(frozen=True, slots=True)
class Variation:
    """One picture: `images` are the numbers of the images that it varies, several where they are blended."""

    name: str
    images: tuple[int, ...]
    text: str | None
    seed: int


def variations_of(
    ids: Sequence[str], texts: Sequence[str], count: int, base_seed: int, blend: bool = False
) -> list[Variation]:
    """`count` variations of each image, or of all of them blended, with each of the texts if there are any. A seed
    depends on the names of the images, the text and the number of the variation, and not on what else is made.
    """
    groups = [tuple(range(len(ids)))] if blend else [(number,) for number in range(len(ids))]
    found = []
    for group in groups:
        named = "+".join(ids[number] for number in group)
        short = "blend" if blend else named
        for place, text in enumerate(texts or [None]):
            for replica in range(count):
                seed = seed_of(f"{named}\0{text or ''}", replica, base_seed)
                middle = f"_text{place}" if len(texts) > 1 else ""
                found.append(Variation(f"{short}{middle}_{replica}", group, text, seed))
    return found


def read_rows(folder: Path) -> dict[str, dict[str, Any]]:
    """The rows of a folder's table whose pictures are there, by their files' names; of a row that a killed process left
    half written nothing is known.
    """
    rows: dict[str, dict[str, Any]] = {}
    path = folder / TABLE
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        with suppress(ValueError, KeyError, TypeError):
            row = json.loads(line)
            rows[row["file"]] = row
    return {name: row for name, row in rows.items() if (folder / name).is_file()}
