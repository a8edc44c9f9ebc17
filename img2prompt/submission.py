"""The Kaggle file: one value a line, `<imgId>_<0..383>`, and its validator."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from img2prompt.files import replacing
from img2prompt.prediction import Prediction

HEADER = ("imgId_eId", "val")
DIMENSION = 384


def write_submission(path: Path, parts: Iterable[Prediction], ids: Sequence[str]) -> None:
    """Writes `imgId_eId,val`, 384 rows for each of `ids`, with the nine digits that give a float32 back exactly.

    The written file is validated before it takes the place of `path`. ValueError for other dimensions, numbers that
    are not finite, ids that come twice, and images that are missing.
    """
    with replacing(path) as temporary:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(HEADER)
            for part in parts:
                if part.embeddings.shape[1] != DIMENSION:
                    raise ValueError(
                        f"{path}: a submission has {DIMENSION} values an image, this checkpoint predicts "
                        f"{part.embeddings.shape[1]}; write .parquet instead"
                    )
                for image_id, vector in zip(part.ids, part.embeddings, strict=True):
                    writer.writerows((f"{image_id}_{i}", f"{value:.9g}") for i, value in enumerate(vector))
        try:
            validate_submission(temporary, ids)
        except ValueError as error:
            raise ValueError(f"{path}: {str(error).removeprefix(f'{temporary}: ')}") from None


def validate_submission(path: Path, ids: Sequence[str]) -> None:
    """ValueError unless the file holds 384 finite values in order for each of `ids`, and nothing else."""
    if len(set(ids)) != len(ids):
        twice = next(image_id for i, image_id in enumerate(ids) if image_id in ids[:i])
        raise ValueError(f"{path}: imgId {twice} comes twice")
    wanted, seen = set(ids), set()
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.reader(file)
        if tuple(next(reader, ())) != HEADER:
            raise ValueError(f"{path}: the first line must be {','.join(HEADER)}")
        place, current = 0, ""
        for row in reader:
            name, _, number = row[0].rpartition("_") if len(row) == 2 else ("", "", "")
            if place == 0:
                current = name
                if name not in wanted or name in seen:
                    raise ValueError(f"{path}, line {reader.line_num}: unexpected row {row}")
                seen.add(name)
            if name != current or number != str(place):
                raise ValueError(f"{path}, line {reader.line_num}: expected {current}_{place}, found {row}")
            if not _is_finite(row[1]):
                raise ValueError(f"{path}, line {reader.line_num}: {row[1]} is not a finite number")
            place = (place + 1) % DIMENSION
    if place or seen != wanted:
        raise ValueError(f"{path}: {len(seen)} of {len(wanted)} images, the last with {place or DIMENSION} values")


def _is_finite(text: str) -> bool:
    try:
        return bool(np.isfinite(float(text)))
    except ValueError:
        return False
