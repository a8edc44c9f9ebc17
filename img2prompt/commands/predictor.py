"""From settings to the predictor that they choose."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.utils import instantiate

from img2prompt.predictors.confident import Confident
from img2prompt.predictors.predictor import Predictor, Setting
from img2prompt.predictors.trained import PRECISIONS, confidence_of
from img2prompt.predictors.views import VIEWS, Views
from img2prompt.provenance import checkpoint_of, header_of, is_foreign
from img2prompt.refine.confidence import NEIGHBOURS, Confidence, read_confidence

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
        raise ValueError(
            "ckpt must be given, a run folder, a .safetensors checkpoint or what export wrote; or another predictor="
        )
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
    that of the checkpoint's run. ValueError for a confidence that was learnt of others.
    """
    # What is wrong with a file is said before anything is loaded.
    learnt = _confidence(confidence, ckpt, views)
    shown = setting.top_k
    if learnt is not None:
        # Confidence reads so many neighbours, however many are shown.
        setting = replace(setting, top_k=max(shown, NEIGHBOURS))
    own = {"ckpt": ckpt} if choice["name"] == TRAINED["name"] else {}
    # Not as an argument: Hydra would make a mapping of it.
    found = instantiate({**choice, **own}, _partial_=True, _convert_="all")(setting)
    if not own:
        found.files = [*found.files, *setting.text_files()]
    if views:
        found = Views(found, views, setting.top_k)
    if learnt is None:
        return found
    features = {"typical", *(["agreement"] if views else []), *(["norm"] if own else [])}
    if found.bank is not None and len(found.bank.prompts) >= NEIGHBOURS:
        features |= {"nearest", "margin"}
    learnt[1].check(features)
    if not (learnt[1].checked.spearman or 0) > 0:
        print("confidence says little: it told no better predictions from worse when it was checked", file=sys.stderr)
    return Confident(found, learnt[1], learnt[0], shown)


def _confidence(given: str | None, ckpt: str | None, views: Sequence[str]) -> tuple[Path, Confidence] | None:
    """The file and what it says; of auto what the checkpoint's run has learnt of it, where it is used as it was."""
    scores = None if ckpt is None else header_of(ckpt).scores
    if given == "auto":
        # What is exported has no run beside it.
        has_run = ckpt is not None and not is_foreign(Path(ckpt))
        file = confidence_of(checkpoint_of(Path(str(ckpt)))) if has_run else None
        if file is None or not file.is_file():
            return None
        if read_confidence(file).of != scores:
            print("confidence is left out: the run learnt it of another checkpoint, its best", file=sys.stderr)
            return None
        if views:
            print(
                "confidence is left out: the run learnt it without views; of views, img2prompt fit refiner=confidence "
                "learns it",
                file=sys.stderr,
            )
            return None
        return file, read_confidence(file)
    if given is None:
        return None
    found = read_confidence(Path(given))
    if ckpt is not None and found.of not in ({}, scores):
        raise ValueError(f"confidence={given}: learnt from another checkpoint ({found.of}) than {ckpt}")
    if not found.of:
        print(
            f"confidence={given} does not say which model it is of, or which views: it must be this one",
            file=sys.stderr,
        )
    return Path(given), found
