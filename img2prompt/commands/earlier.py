"""What earlier runs trained on: it never validates in a run that goes on from them, or over the same data grown."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from img2prompt.data.split import Earlier
from img2prompt.predictors.trained import bank_of
from img2prompt.provenance import checkpoint_of
from img2prompt.regressor import read_header

AUTO = "auto"
# Whoever changes these wants another split. What else differs (filters, data.count) chooses rows, not sides.
_SETTINGS = ("seed", "val", "group_threshold", "max_group_fraction")


def split_identity(settings: dict[str, Any]) -> dict[str, Any]:
    """What split.json says, for later runs to know whether this run's split is one of theirs."""
    data = settings["data"]
    return {
        "began": datetime.now().isoformat(),
        "target": settings["target"]["model"],
        "roots": sorted(str(root) for root in _roots(data)),
        **{key: data[key] for key in _SETTINGS},
        "keep_split": data["keep_split"],
        "init_from": settings["init_from"],
    }


def earlier_runs(settings: dict[str, Any], folder: Path, embed: Callable[[list[str]], np.ndarray]) -> Earlier | None:
    """What runs before the one in `folder` trained on, as data.keep_split and init_from say; None when there are none.

    A run that goes on has all of it in its own folder: the others may be gone by now.
    """
    data, init_from = settings["data"], settings["init_from"]
    found = _Found()
    is_split = not isinstance(data["val"], dict)
    if is_split and (folder / "trained.json").is_file():
        found.add(folder, _read(folder / "trained.json"), with_earlier=True)
    else:
        if data["keep_split"] == AUTO:
            for run in _runs_of_these_data(settings, folder) if is_split else ():
                try:
                    found.add(run, _read(run / "trained.json"), with_earlier=False)
                except (OSError, ValueError) as error:
                    print(f"data.keep_split=auto: {error}; what it trained on may validate here", file=sys.stderr)
        elif data["keep_split"] is not None:
            record = Path(data["keep_split"], "trained.json")
            if not record.is_file():
                raise ValueError(f"data.keep_split={record.parent}: no run folder, it has no trained.json")
            found.add(record.parent, _read(record), with_earlier=True)
        if init_from is not None:
            for run in runs_of(checkpoint_of(Path(init_from))):
                record = run / "trained.json"
                if record.is_file():
                    found.add(run, _read(record), with_earlier=True)
                else:
                    print(
                        f"init_from={init_from}: no {record}, so what it trained on may validate here", file=sys.stderr
                    )
    return found.earlier(data, embed) if found.runs else None


def trained_in(runs: Sequence[Path], data: dict[str, Any], embed: Callable[[list[str]], np.ndarray]) -> Earlier:
    """What these runs, and those before them, trained on; ValueError when one does not say it."""
    found = _Found()
    for run in runs:
        found.add(run, _read(run / "trained.json"), with_earlier=True)
    return found.earlier(data, embed)


def runs_of(checkpoint: Path) -> list[Path]:
    """The run folders that a checkpoint's weights come from: its own or, of an average, those that its header names."""
    made_of = read_header(checkpoint).made_of
    if not made_of:
        return [bank_of(checkpoint).parent]
    runs = made_of.get("runs")
    if not isinstance(runs, list) or not runs or not all(isinstance(run, str) for run in runs):
        raise ValueError(f"{checkpoint}: its header is damaged: it does not say which runs it is made of")
    return [checkpoint.resolve().parent.joinpath(run).resolve() for run in runs]


@dataclass
class _Found:
    runs: list[str] = field(default_factory=list)
    prompts: set[str] = field(default_factory=set)
    images: set[str] = field(default_factory=set)
    held_out: set[str] = field(default_factory=set)
    combinations: set[tuple[str, ...]] = field(default_factory=set)

    def add(self, run: Path, record: dict[str, Any], with_earlier: bool) -> None:
        self.runs.append(str(run))
        self.held_out.update(record["held_out"])
        for part in [record, record["earlier"]] if with_earlier else [record]:
            self.prompts.update(part["prompts"])
            self.images.update(part["images"])
            self.combinations.update(tuple(one) for one in part["combinations"])

    def earlier(self, data: dict[str, Any], embed: Callable[[list[str]], np.ndarray]) -> Earlier:
        prompts = sorted(self.prompts)
        thresholds = [value for value in (data["group_threshold"], data["duplicate_threshold"]) if value is not None]
        return Earlier(
            runs=self.runs,
            train_prompts=prompts,
            train_embeddings=torch.from_numpy(embed(prompts)),
            train_images=self.images,
            val_prompts=self.held_out - self.prompts,
            combinations=self.combinations,
            threshold=min(thresholds, default=None),
        )


def _read(record: Path) -> dict[str, Any]:
    """trained.json; ValueError when it is not what a run writes."""
    try:
        said = json.loads(record.read_text(encoding="utf-8"))
        for part in (said, said["earlier"]):
            lists = [part["prompts"], part["images"], *part["combinations"]]
            if not all(isinstance(one, list) and all(isinstance(text, str) for text in one) for one in lists):
                raise TypeError
            "".join(part["prompts"]).encode()
        if not all(isinstance(text, str) for text in said["held_out"]):
            raise TypeError
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ValueError(f"{record}: damaged, or written by another version") from None
    return said


def _runs_of_these_data(settings: dict[str, Any], folder: Path) -> list[Path]:
    """The runs whose split this one keeps by itself, newest first: those that split some of the same data by the same
    settings, beside `folder` or in runs/, back to the last that drew its split anew.
    """
    ours = split_identity(settings)
    if not ours["roots"]:
        return []
    found = []
    for record in _records(folder):
        try:
            theirs = json.loads(record.read_text(encoding="utf-8"))["split"]
            same = all(theirs[key] == ours[key] for key in ("target", *_SETTINGS))
            # A run from a checkpoint, or with a split that its user chose, is another line.
            if same and theirs["init_from"] is None and theirs["keep_split"] in (AUTO, None):
                if any(_overlap(Path(a), Path(b)) for a in theirs["roots"] for b in ours["roots"]):
                    found.append((str(theirs["began"]), record.parent, theirs["keep_split"]))
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            continue
    runs = []
    for _, run, keep_split in sorted(found, reverse=True):
        runs.append(run)
        if keep_split is None:
            break
    return runs


def _records(folder: Path) -> Iterator[Path]:
    here = folder.resolve()
    seen = {here / "split.json"}
    # runs/<name>/<date_time>, the numbered jobs of train -m below it, and runs/sweeps/<name>/trials/<number>.
    runs = Path("runs").resolve()
    sweep = here.parent.parent
    is_trial = (sweep / "sweep.yaml").is_file()
    for base, pattern in ((here.parent, "*"), (runs, "*/*"), (runs, "*/*/*"), (runs, "*/*/*/*")):
        for record in base.glob(f"{pattern}/split.json"):
            # Trials of a sweep are compared with each other: none follows the split of another, which may still be at
            # it.
            if is_trial and sweep in record.parents:
                continue
            if record not in seen and record.is_file():
                seen.add(record)
                yield record


def _overlap(one: Path, other: Path) -> bool:
    return one == other or one in other.parents or other in one.parents


def _roots(data: dict[str, Any]) -> set[Path]:
    """Where the sources are; none for what is drawn."""
    roots = [item["root"] for item in data["sources"]] if "sources" in data else [data["root"]]
    return {Path(root).absolute() for root in roots if root is not None}
