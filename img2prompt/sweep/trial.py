"""One trial of a sweep: a training in a process and a folder of its own, of which only its files are read."""

import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from img2prompt.files import read_table
from img2prompt.sweep import leash

_PACKAGE = Path(__file__).parent.parent.parent
# -P: not what lies in the working folder under our name.
TRAIN = (sys.executable, "-P", "-m", "img2prompt", "train")
_TAIL_BYTES = 65_536
NOT_FINITE, OUT_OF_MEMORY, KILLED, ERROR = "not finite", "out of memory", "killed", "error"
_KINDS = {
    NOT_FINITE: r"not finite",
    OUT_OF_MEMORY: r"memory is not enough|out of memory|OutOfMemoryError|Cannot allocate memory|MemoryError",
}


class Training:
    """A training that runs. All of its processes are one group, and end with this process."""

    def __init__(self, command: Sequence[str], folder: Path, log: Path, environment: Mapping[str, str]) -> None:
        self.folder, self.log = folder, log
        log.parent.mkdir(parents=True, exist_ok=True)
        path = os.pathsep.join(part for part in (str(_PACKAGE), os.environ.get("PYTHONPATH")) if part)
        # What is there is of an earlier attempt.
        self.log_begins = log.stat().st_size if log.exists() else 0
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", leash.__file__, *command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": path, **environment},
                start_new_session=True,
            )

    def code(self) -> int | None:
        """Its exit code, negative of a signal; None while it runs."""
        code = self._process.poll()
        if code is None:
            return None
        self.kill()
        return 128 - code if 128 < code < 160 else code

    def stop(self) -> None:
        """Asks it to end where it can be gone on with."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """Ends what is left of it."""
        self._signal(signal.SIGKILL)
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()
        self._process.wait()

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)


def changed(folder: Path) -> int:
    """When the metrics of a run were last written; 0 where they are not there."""
    try:
        return (folder / "metrics.csv").stat().st_mtime_ns
    except OSError:
        return 0


def validations(folder: Path, rungs: Collection[int]) -> list[float]:
    """The validation cosines of the rungs of these numbers so far, in their order."""
    rows = [row for row in _rows(folder / "metrics.csv") if row.get("rung") in set(map(str, rungs))]
    return [_float(row["val/cosine"]) for row in rows if row.get("val/cosine")]


@dataclass(frozen=True)
class Ended:
    """What a run that has ended says: the validation cosine of the last rung that it climbed, finite or not, and which
    rung is its best. An earlier one, such as the mean, may be better in every trial, and is then no measure of them.
    """

    value: float
    rung: str
    best_rung: str
    unfinished: str = ""  # why it was stopped before its end, and yet has this value


def ended(folder: Path) -> Ended | None:
    """None where it says nothing."""
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        climbed = [row for row in _rows(folder / "ladder.csv") if row["val_cosine"]]
        best = str(summary.get("best_rung", "best"))
        if not climbed:
            return Ended(_float(summary["val_cosine"]), best, best)
        stopped = str(summary.get("unfinished") or "")
        return Ended(_float(climbed[-1]["val_cosine"]), climbed[-1]["rung"], best, stopped)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def failure(code: int, log: Path, begins: int = 0) -> tuple[str, str]:
    """Of which kind a failure is, and what the training, whose log `begins` there, said of it last."""
    if code < 0:
        name = signal.Signals(-code).name if -code in list(signal.Signals) else str(-code)
        memory = "; the machine's memory may have been too little" if name == "SIGKILL" else ""
        return KILLED, f"killed by {name}{memory}"
    lines = [line.strip() for line in _tail(log, begins).splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith("(IMG2PROMPT_TRACEBACK")]
    said = [line.removeprefix("train: ") for line in lines if line.startswith("train: ")] or lines
    last = said[-1][:400] if said else "it said nothing"
    kind = next((kind for kind, words in _KINDS.items() if re.search(words, last)), ERROR)
    return kind, last if code else f"{last} (it ended without a val_cosine in summary.json)"


def _tail(log: Path, begins: int) -> str:
    try:
        with log.open("rb") as file:
            file.seek(max(begins, log.stat().st_size - _TAIL_BYTES))
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""


def _rows(path: Path) -> list[dict[str, str]]:
    try:
        return read_table(path)
    except (ValueError, OSError, csv.Error):
        return []


def _float(value: object) -> float:
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return math.nan
