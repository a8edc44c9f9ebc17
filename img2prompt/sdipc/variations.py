"""Which variations of which images are made, from which seeds, under which names; and the table of those that are."""

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from img2prompt.data.listing import ImageFile, printable
from img2prompt.synthesis.pairs import seed_of

TABLE = "variations.jsonl"
_LONGEST_NAME = 200  # bytes: file systems take 255, and something is put behind it
_SHORT_NAME = 40  # letters, of up to four bytes each


@dataclass(frozen=True, slots=True)
class Variation:
    """One picture: `images` are the numbers of the images that it varies, several where they are blended."""

    name: str
    images: tuple[int, ...]
    text: str | None
    seed: int


def variations_of(
    files: Sequence[ImageFile],
    texts: Sequence[str],
    count: int,
    base_seed: int,
    blend: bool = False,
    numbered: bool = True,
) -> list[Variation]:
    """`count` variations of each image, or of all of them blended, with each of the texts if there are any, which are
    `numbered` in the names or not. A seed depends on the names of the images, the text and the number of the variation,
    and not on what else is made.
    """
    groups = [tuple(range(len(files)))] if blend else [(number,) for number in range(len(files))]
    found = []
    for group in groups:
        named = "+".join(printable(files[number].path.stem) for number in group)
        short = "blend" if blend else _file_name(files[group[0]])
        for place, text in enumerate(texts or [None]):
            for replica in range(count):
                seed = seed_of(f"{named}\0{text or ''}", replica, base_seed)
                middle = f"_text{place}" if text is not None and numbered else ""
                found.append(Variation(f"{short}{middle}_{replica}", group, text, seed))
    return found


def _file_name(file: ImageFile) -> str:
    """The name of the image; of several that have it each with a mark of its own, as their ids are whole paths."""
    stem = printable(file.path.stem)
    if file.id == stem and len(stem.encode()) <= _LONGEST_NAME:
        return stem
    return f"{stem[:_SHORT_NAME]}-{hashlib.blake2b(file.id.encode(), digest_size=4).hexdigest()}"


def rows_of(
    wanted: Sequence[Variation], files: Sequence[ImageFile], ending: str, alpha: float, ckpt: str | None
) -> list[dict[str, Any]]:
    """The rows of variations: what each depends on besides the settings that all have. Images and checkpoint are known
    again by their bytes.
    """
    digests = [digest_of(file.path) for file in files]
    tuned = None if ckpt is None else digest_of(Path(ckpt))
    return [
        {
            "file": f"{one.name}.{ending}",
            "images": [os.path.abspath(files[number].path) for number in one.images],
            "digests": [digests[number] for number in one.images],
            "text": one.text,
            "alpha": None if one.text is None else alpha,
            "seed": one.seed,
            "ckpt": tuned,
        }
        for one in wanted
    ]


def digest_of(path: Path) -> str:
    with path.open("rb") as file:
        # Of a megabyte less than a millisecond.
        return hashlib.file_digest(file, "blake2b").hexdigest()[:16]


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
