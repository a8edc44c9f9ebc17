"""Easy pairs first: what is easy is found out in an earlier run, or by another judge, and a fresh run begins with it.

Difficulty as the model's own cosine, recorded while it learns, is that of Reverse Stable Diffusion (Croitoru et al.,
2023); the other judges are not the authors'.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from img2prompt import ranks
from img2prompt.data.difficulty import agreement, read_scores, shortness, weighted, write_scores
from img2prompt.data.listing import file_stamp
from img2prompt.data.order import Draws
from img2prompt.data.sample import Sample, image_key
from img2prompt.files import replacing
from img2prompt.metrics import cosines
from img2prompt.predictions import read_predictions

if TYPE_CHECKING:
    from img2prompt.training.datamodule import PairData
    from img2prompt.training.stages import Climb, Start

SCORERS = ("own_cosine", "clip_alignment", "ensemble_agreement", "prompt_length")
# What a run that records leaves, and what a run that goes by it used.
OWN_COSINE, USED = "own_cosine.parquet", "difficulty.parquet"


@dataclass(frozen=True)
class Curriculum:
    """Epoch k of the fine-tune or, without one, of the probe, from 0, has the easiest 1 / (`stages` - k) of the
    prompts, until it has all; with one stage there is no curriculum. `records` is the run that recorded own_cosine,
    `predictions` are files of several models' predictions of the training images. With `record` a run records how easy
    each pair is for it.
    """

    stages: int = 1
    scorer: str = "own_cosine"
    records: str | None = None
    predictions: Sequence[str] | None = None
    record: bool = False

    def __post_init__(self) -> None:
        if self.stages < 1:
            raise ValueError(f"curriculum.stages must be at least 1, got {self.stages}")
        if self.scorer not in SCORERS:
            raise ValueError(f"curriculum.scorer={self.scorer}: must be one of {', '.join(SCORERS)}")
        if self.stages > 1 and self.scorer == "own_cosine" and self.records is None:
            raise ValueError("curriculum.scorer=own_cosine needs curriculum.records, a run with curriculum=record")
        if self.stages > 1 and self.scorer == "ensemble_agreement" and len(self.predictions or ()) < 2:
            raise ValueError("curriculum.scorer=ensemble_agreement needs curriculum.predictions, two files at least")

    def check(self, samples: Sequence[Sample], start: "Start", run: Path, steps: int) -> None:
        """ValueError when there are no scores of these training samples, or no steps to record; before anything is
        trained.
        """
        if not steps and (self.record or self.stages > 1):
            raise ValueError(
                "a curriculum is of a stage that takes steps: give stages.finetune epochs or, without it, stages.probe"
            )
        if self.stages == 1 or (run / USED).is_file():
            return
        if self.scorer != "clip_alignment":
            self.known_scores(samples)
            return
        unknown = None if start.pretrained else "the encoder has no pretrained weights"
        moved = "init_from brings an encoder that has left the space of the prompts" if start.has_head else None
        if unknown or moved or start.no_text:
            raise ValueError(f"curriculum.scorer=clip_alignment: {unknown or moved or start.no_text}")

    def check_files(self) -> Path:
        """The file of records; ValueError when it, or one of the files of predictions, is not there."""
        for one in self.predictions or () if self.scorer == "ensemble_agreement" else ():
            if not Path(one).is_file():
                raise ValueError(f"curriculum.predictions={one}: no such file; predict.py writes it")
        path = Path(str(self.records))
        path = path / OWN_COSINE if path.is_dir() else path
        if self.scorer == "own_cosine" and not path.is_file():
            raise ValueError(
                f"curriculum.records={self.records}: no {OWN_COSINE} there; a run with curriculum=record leaves it"
            )
        return path

    def known_scores(self, samples: Sequence[Sample]) -> np.ndarray:
        """float64 [N], of all judges that see no image."""
        if self.scorer == "prompt_length":
            return shortness(samples)
        if self.scorer == "ensemble_agreement":
            return agreement([_of(path, samples) for path in self.predictions or ()])
        path = self.check_files()
        return read_scores(path, samples)


def grown(climb: "Climb", data: "PairData") -> Draws:
    """The epochs of `data` under the curriculum of the run, whose scores are kept in its folder."""
    curriculum, path = climb.curriculum, climb.checkpoints.parent / USED
    samples = [data.samples[row] for row in data.train_rows]
    if not ranks.number() and not path.is_file():
        is_clip = curriculum.scorer == "clip_alignment"
        write_scores(path, samples, _alignment(climb, data) if is_clip else curriculum.known_scores(samples))
    ranks.wait()
    return replace(data.draws, ease=read_scores(path, samples), stages=curriculum.stages)


class Records:
    """The model's cosines with the targets of all training rows, each time that validation improves: one file a record,
    by its step, so that a run that goes on finds those of its earlier half.
    """

    def __init__(self, run: Path) -> None:
        self._folder = run / "own_cosine"
        self._best = max((float(np.load(path)["val"]) for path in self._folder.glob("*.npz")), default=-np.inf)

    def is_due(self, val_cosine: float) -> bool:
        return val_cosine > self._best

    def add(self, val_cosine: float, step: int, rows: list[int], values: Tensor) -> None:
        self._best = val_cosine
        if ranks.number():
            return
        with replacing(self._folder / f"step{step:07d}.npz") as temporary, temporary.open("wb") as file:
            np.savez(file, val=val_cosine, rows=np.array(rows), cosines=values.numpy())


def write_records(run: Path, data: "PairData") -> None:
    """own_cosine.parquet of a run that has recorded; ValueError when nothing has ever improved."""
    files = [np.load(path) for path in sorted((run / "own_cosine").glob("*.npz"))]
    if not files:
        raise ValueError(f"{run}: nothing was recorded; curriculum=record needs a stage that takes steps")
    records = [dict(zip(file["rows"].tolist(), file["cosines"].tolist(), strict=True)) for file in files]
    # An image may have become unreadable on the way.
    rows = [row for row in records[-1] if all(row in record for record in records)]
    scores = weighted([np.array([record[row] for row in rows]) for record in records])
    write_scores(run / OWN_COSINE, [data.samples[row] for row in rows], scores)


def _alignment(climb: "Climb", data: "PairData") -> np.ndarray:
    """Of each training row, the cosine of image and prompt in the space that the encoder has for both."""
    from img2prompt.training.scoring import features_of

    rows, images = features_of(climb.regressor, data, data.train_rows.tolist(), climb.bf16)
    prompts = list(dict.fromkeys(data.samples[row].prompt for row in rows))
    texts = dict(zip(prompts, climb.text_features(prompts), strict=True))
    wanted = torch.stack([texts[data.samples[row].prompt] for row in rows]).float().cpu()
    return cosines(images[:, : wanted.shape[1]], wanted).double().numpy()


def _of(path: str, samples: Sequence[Sample]) -> np.ndarray:
    """The embeddings [N, D] of these samples in a file of predictions, by the files that it read or, where these are
    not here, by their ids; ValueError when some are not in it.
    """
    found = read_predictions(Path(path))
    files = {file_stamp(Path(one)): row for row, one in enumerate(found.columns.get("path", [])) if Path(one).is_file()}
    here = set(files.values())
    ids = {one: row for row, one in enumerate(found.ids) if row not in here}
    # Several captions of an image have one prediction.
    rows = [files.get(image_key(sample), ids.get(sample.id)) for sample in samples]
    missing = [sample.id for sample, row in zip(samples, rows, strict=True) if row is None]
    if missing:
        raise ValueError(
            f"curriculum.predictions={path}: predictions of another data set: {len(missing)} of {len(samples)} "
            f"training images are not in it (first: {missing[0]})"
        )
    return found.embeddings[[row for row in rows if row is not None]]
