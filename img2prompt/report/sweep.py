"""The report of a sweep, made from sweep.json and trials.csv of its folder alone."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from img2prompt.files import from_cell, read_table, write_text
from img2prompt.report import charts
from img2prompt.report.page import Html, Section, code, element, facts, folded, joined, page, table
from img2prompt.report.reproduction import command_of

FILE = "sweep.json"
_MOST_ROWS = 500
_FIXED = ("trial", "state", "val_cosine", "validations", "seconds", "kind", "reason", "folder", "host")


def write_sweep_report(folder: Path, out: Path | None = None) -> Path:
    """Writes the report of the sweep in `folder` to `out`, else beside its files; ValueError when it is no sweep."""
    goal = out or folder / "report.html"
    try:
        text = _report(folder)
    except (KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"{folder}: damaged ({type(error).__name__}: {str(error)[:120]})") from None
    write_text(goal, text)
    return goal


def best_command(found: Mapping[str, Any]) -> str:
    """What trains the best trial once more, in a folder of its own."""
    return command_of("train", [*map(str, found["overrides"]), *map(str, found["best_overrides"])])


def _report(folder: Path) -> str:
    path = folder / FILE
    if not path.is_file():
        raise ValueError(f"sweep_dir={folder}: no sweep, it has no {FILE}; img2prompt sweep writes it when it ends")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"{path}: damaged") from None
    rows = read_table(folder / "trials.csv")
    sections = [
        Section("Summary", _summary(found, rows)),
        Section("History", _history(rows), "Each trial, and the best so far."),
        Section("Importance", _importance(found)),
        Section("Trials", _trials(rows, found.get("best_trial"))),
        Section("Failures", _failures(rows)),
        Section("Search space", _space(found)),
    ]
    return page(f"Sweep {found['name']}", f"{folder.resolve().name}, {len(rows):,} trials", sections)


def _summary(found: Mapping[str, Any], rows: Sequence[Mapping[str, str]]) -> Html:
    states = Counter(row["state"] for row in rows)
    told = {
        "best validation cosine": found.get("best_value"),
        "trial": found.get("best_trial"),
        "trials": f"{len(rows):,} of {found['n_trials']:,}",
        **{state: count for state, count in sorted(states.items())},
        "sampler": found.get("sampler"),
        "pruner": found.get("pruner"),
    }
    if found.get("best_overrides") is None:
        return joined([facts(told), element("p", "No trial has finished, so that there is no best one.")])
    parts: list[Html] = [
        facts(told),
        element("h3", "The command that trains the best one again"),
        code(best_command(found)),
        element("p", "Relative paths begin where the sweep was started.", class_="note"),
    ]
    if found.get("best_folder"):
        parts.append(element("p", f"Its checkpoints are in {found['best_folder']}.", class_="note"))
    return joined(parts)


def _history(rows: Sequence[Mapping[str, str]]) -> Html:
    values = [(int(row["trial"]), _number(row["val_cosine"]), row["state"] == "finished") for row in rows]
    drawing = charts.history(values, "Validation cosine")
    return element("div", drawing, class_="charts") if drawing else Html("")


def _importance(found: Mapping[str, Any]) -> Html:
    shares = found.get("importance") or {}
    if not shares:
        return element("p", f"Not told: {found.get('no_importance') or 'unknown'}.", class_="note")
    told = "share of what makes finished trials differ (fANOVA); keys that only some trials have are left out"
    return element("div", charts.bars(shares, "Parameters", told), class_="charts")


def _trials(rows: Sequence[Mapping[str, str]], best: Any) -> Html:
    # Those that say most first.
    by_value = sorted(rows, key=lambda row: (-_ordered(row["val_cosine"]), int(row["trial"])))
    shown = []
    for row in by_value:
        value = _number(row["val_cosine"])
        drawn = {key: _rounded(from_cell(text)) for key, text in row.items() if key not in _FIXED}
        shown.append(
            {
                "trial": f"{row['trial']}{' (best)' if row['trial'] == str(best) else ''}",
                "state": row["state"],
                "val cosine": f"{value:.4f}" if math.isfinite(value) else "",
                **drawn,
                "validations": row["validations"],
                "seconds": row["seconds"],
            }
        )
    return table(shown, "The best first", _MOST_ROWS)


def _failures(rows: Sequence[Mapping[str, str]]) -> Html:
    failed = [row for row in rows if row["state"] == "failed"]
    counts = Counter(row["kind"] for row in failed)
    by_kind = [{"what": kind, "trials": count} for kind, count in sorted(counts.items(), key=lambda one: -one[1])]
    told = [{"trial": row["trial"], "what": row["kind"], "said": from_cell(row["reason"])} for row in failed]
    return joined([table(by_kind, "By what happened"), table(told, "What each said last")]) if failed else Html("")


def _space(found: Mapping[str, Any]) -> Html:
    text = yaml.safe_dump(found.get("space", {}), sort_keys=False, allow_unicode=True, width=110)
    shared = command_of("train", [*map(str, found["overrides"])])
    return joined(
        [code(text), folded("What all trials share", code(shared)) if found["overrides"] else Html("")],
    )


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _ordered(text: str) -> float:
    value = _number(text)
    return value if math.isfinite(value) else -math.inf


def _rounded(text: str) -> str:
    """A drawn number with as many digits as can be read."""
    value = _number(text)
    return f"{value:.4g}" if "." in text and math.isfinite(value) else text
