"""What a list of predictors says: runs and checkpoints, saved predictions, and predictors by name with their keys."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from img2prompt.commands.conf import conf_folder, groups
from img2prompt.commands.predictor import TRAINED, check_use
from img2prompt.commands.settings import check_values, did_you_mean
from img2prompt.predictions import WRITERS
from img2prompt.provenance import HUB, located


@dataclass(frozen=True)
class Choice:
    """One of them: its name in tables, and either `saved`, a file of predictions, or the settings of a predictor."""

    name: str
    saved: str | None = None
    settings: Mapping[str, Any] = field(default_factory=lambda: TRAINED)
    ckpt: str | None = None
    views: Sequence[str] = ()
    confidence: str | None = "auto"


def choices_of(listed: Any) -> list[Choice]:
    """ValueError for what is none of them, and where two have one name."""
    if not isinstance(listed, list) or not listed:
        raise ValueError(f"predictors={listed}: must be a [list] of runs, checkpoints, saved predictions or names")
    found = [_choice(one) for one in listed]
    names = [one.name for one in found]
    twice = next((name for number, name in enumerate(names) if name in names[:number]), None)
    if twice is not None:
        raise ValueError(
            f"predictors: two are called {twice}; give one of them another name: {{predictor: …, as: NAME}}"
        )
    return found


def _choice(given: Any) -> Choice:
    if isinstance(given, str):
        return _of_text(given, given, ())
    if not isinstance(given, dict) or not isinstance(given.get("predictor"), str):
        raise ValueError(f"predictors: expected a path, a name or {{predictor: NAME, …}}, got {given}")
    shared = ("predictor", "as", "views", "confidence")
    own = {key: value for key, value in given.items() if key not in shared}
    name, views = str(given.get("as") or given["predictor"]), given.get("views") or []
    sure = given.get("confidence", "auto")
    check_values({"confidence": sure}, {}, f"predictors: {name}.")
    if not own:
        return replace(_of_text(given["predictor"], name, views), confidence=sure)
    known = _names()
    path = Path(given["predictor"]).expanduser()
    if given["predictor"] not in known and (path.exists() or path.suffix in WRITERS):
        key = next(iter(own))
        raise ValueError(f"predictors: {key} is no key of {given['predictor']}{did_you_mean(key, list(shared))}")
    if given["predictor"] not in known:
        close = did_you_mean(given["predictor"], known)
        raise ValueError(f"predictors: no predictor {given['predictor']}{close}; choices: {', '.join(known)}")
    return replace(_named(given["predictor"], name, views, own), confidence=sure)


def _of_text(given: str, name: str, views: Sequence[str]) -> Choice:
    path = Path(given).expanduser()
    if path.suffix in WRITERS:
        if views:
            raise ValueError(f"predictors: {given} is saved, and has no views of images")
        return Choice(name, saved=str(path))
    if given.startswith(HUB) or path.exists() or path.suffix == ".safetensors":
        ckpt = located(given if given.startswith(HUB) else str(path))
        check_use(TRAINED, ckpt, views)
        return Choice(name, ckpt=ckpt, views=views)
    known = _names()
    if given not in known:
        raise ValueError(
            f"predictors: {given} is no run, no checkpoint, no saved predictions and no predictor"
            f"{did_you_mean(given, known)}; predictors: {', '.join(known)}"
        )
    return _named(given, name, views, {})


def _named(predictor: str, name: str, views: Sequence[str], own: Mapping[str, Any]) -> Choice:
    usual = yaml.safe_load((conf_folder() / "predictor" / f"{predictor}.yaml").read_text(encoding="utf-8"))
    for key in own:
        if key not in usual or key in ("_target_", "name"):
            raise ValueError(f"predictors: {key} is no key of {predictor}{did_you_mean(key, list(usual))}")
    check_values(own, usual, f"predictors: {predictor}.")
    settings = {**usual, **own}
    missing = next((key for key, value in settings.items() if value == "???"), None)
    if missing is not None:
        raise ValueError(f"predictors: {predictor} needs {missing}: {{predictor: {predictor}, {missing}: …}}")
    check_use(settings, None, views)
    return Choice(name, settings=settings, views=views)


def _names() -> list[str]:
    return [name for name in groups(conf_folder())["predictor"] if name not in ("trained", "sdipc_ft", "sdipc_ct")]
