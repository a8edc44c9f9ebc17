"""From settings to the predictor that they choose."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.utils import instantiate

from img2prompt.predictors.confident import Confident
from img2prompt.predictors.predictor import Predictor, Setting
from img2prompt.predictors.trained import PRECISIONS, checkpoint_of, confidence_of
from img2prompt.predictors.views import VIEWS, Views
from img2prompt.refine.confidence import NEIGHBOURS, Confidence, read_confidence
from img2prompt.regressor import read_header

TRAINED: Mapping[str, Any] = {"_target_": "img2prompt.predictors.trained.predictor", "name": "trained"}
_TUNED = ("sdipc_ft", "sdipc_ct")


def check_use(choice: Mapping[str, Any], ckpt: str | None, views: Sequence[str]) -> None:
    """ValueError for what is no predictor of embeddings, for views that are none, and where ckpt and predictor do not
    go together.
    """
    name = choice["name"]
    if name in _TUNED:
        raise ValueError(f"predictor={name}: img2prompt fit tunes it, and img2prompt vary uses it; it predicts nothing")
    other = next((view for view in views if view not in VIEWS), None)
    if other is not None:
        raise ValueError(f"views={list(views)}: {other} is none; choose of {', '.join(VIEWS)}")
    if name == TRAINED["name"] and not ckpt:
        raise ValueError("ckpt must be given, a run folder or a .safetensors checkpoint; or another predictor=")
    if name != TRAINED["name"] and ckpt is not None:
        raise ValueError(f"ckpt={ckpt} is of predictor=trained; predictor={name} has none")


def check_numbers(batch_size: int, threads: int, top_k: int, top_words: int, precision: str) -> None:
    """ValueError for what no predictor can be used with."""
    if batch_size < 1 or threads < 1:
        raise ValueError(f"batch_size and threads must be at least 1, got {batch_size} and {threads}")
    if top_k < 0 or top_words < 0:
        raise ValueError(f"top_k and top_words must be at least 0, got {top_k} and {top_words}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")


def made(
    choice: Mapping[str, Any],
    ckpt: str | None,
    setting: Setting,
    views: Sequence[str] = (),
    confidence: str | None = "auto",
) -> Predictor:
    """The predictor, loaded, of these views of each image, with the confidence of a file or, where it is auto, with
    that of the checkpoint's run.
    """
    # What is wrong with a file is said before anything is loaded.
    learnt = None if confidence is None or confidence == "auto" else read_confidence(Path(confidence))
    file = Path(confidence or "")
    checkpoint = checkpoint_of(Path(ckpt)) if ckpt is not None else None
    if learnt is not None and checkpoint is not None and learnt.of not in ({}, read_header(checkpoint).scores):
        raise ValueError(f"confidence={confidence}: learnt from another checkpoint ({learnt.of}) than {checkpoint}")
    if confidence == "auto" and checkpoint is not None:
        file = confidence_of(checkpoint)
        learnt = _of_the_run(file, checkpoint, setting, views)
    own = {"ckpt": ckpt} if choice["name"] == TRAINED["name"] else {}
    # Not as an argument: Hydra would make a mapping of it.
    found = instantiate({**choice, **own}, _partial_=True, _convert_="all")(setting)
    if not own:
        found.files = [*found.files, *setting.text_files()]
    if views:
        found = Views(found, views, setting.top_k)
    return found if learnt is None else Confident(found, learnt, file)


def _of_the_run(file: Path, checkpoint: Path, setting: Setting, views: Sequence[str]) -> Confidence | None:
    """The confidence that a run learnt for its best checkpoint, where it can be used."""
    if not file.is_file():
        return None
    found = read_confidence(file)
    if found.of != read_header(checkpoint).scores:
        return None
    if views or "nearest" in found.features and setting.top_k < NEIGHBOURS:
        why = "views" if views else f"top_k={setting.top_k}"
        print(f"confidence is left out: the run learnt it without views and with top_k=5, not {why}", file=sys.stderr)
        return None
    return found
