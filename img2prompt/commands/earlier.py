"""What earlier runs trained on: it never validates in a run that goes on from them, or from data that have grown."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from img2prompt.data.split import Earlier
from img2prompt.predictors.trained import bank_of

AUTO = "auto"
_SETTINGS = ("seed", "val", "group_threshold", "max_group_fraction")


def split_from(settings: dict[str, Any], folder: Path) -> str | None:
    """The run folder that data.keep_split names. `auto` is the newest run that split these data, or a part of them, by
    the same settings; it is looked for beside `folder` and in runs/. None when there is none.
    """
    given = settings["data"]["keep_split"]
    if given != AUTO:
        return given
    if isinstance(settings["data"]["val"], dict):
        return None
    records = [*folder.parent.glob("*/trained.json")]
    for pattern in ("*/*/trained.json", "*/*/*/trained.json"):
        records += Path("runs").glob(pattern)
    newest = sorted(records, key=lambda record: (record.stat().st_mtime_ns, str(record)), reverse=True)
    return next((str(record.parent) for record in newest if _is_of_these_data(record.parent, settings)), None)


def earlier_runs(origins: dict[str, str], embed: Callable[[list[str]], np.ndarray]) -> Earlier | None:
    """What the runs that `origins` names, by the keys that name them, and those before them trained on; None when there
    is none.
    """
    trained: set[str] = set()
    held: set[str] = set()
    combinations: set[tuple[str, ...]] = set()
    found = False
    for key, given in origins.items():
        # Beside the bank, which a run folder has.
        path = Path(given)
        record = path / "trained.json" if path.is_dir() else bank_of(path).with_name("trained.json")
        if not record.is_file():
            if key != "init_from":
                raise ValueError(f"{key}={given}: no run folder, it has no trained.json")
            print(f"{key}={given}: no trained.json, so what it trained on may validate here", file=sys.stderr)
            continue
        try:
            said = json.loads(record.read_text(encoding="utf-8"))
            trained |= set(said["prompts"])
            held |= set(said["held_out"])
            combinations |= {tuple(one) for one in said["combinations"]}
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{record}: damaged") from None
        found = True
    if not found:
        return None
    prompts = sorted(trained)
    return Earlier(prompts, torch.from_numpy(embed(prompts)), sorted(held - trained), combinations)


def _is_of_these_data(run: Path, settings: dict[str, Any]) -> bool:
    try:
        theirs = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        ours, then = settings["data"], theirs["data"]
        same = all(then[key] == ours[key] for key in _SETTINGS)
        same = same and theirs["target"]["model"] == settings["target"]["model"]
        # What used more is no earlier state of these data.
        count_then, count_now = (math.inf if data["count"] is None else data["count"] for data in (then, ours))
        return same and count_then <= count_now and bool(_roots(then)) and _roots(then) <= _roots(ours)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError):
        return False


def _roots(data: dict[str, Any]) -> set[Path]:
    """Where the sources are; none for what is drawn."""
    roots = [item["root"] for item in data["sources"]] if "sources" in data else [data["root"]]
    return {Path(root).resolve() for root in roots if root is not None}
