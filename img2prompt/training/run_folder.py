"""The folder of a run: what is in it, and how it is written.

config.yaml  data.json (which rows)  bank.parquet  metrics.csv (no clock values)  timings.csv  ladder.csv  summary.json
scores.csv (of validation images)  thumbnails.parquet  report.html  checkpoints/
"""

import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.loggers import Logger

from img2prompt.files import read_table, write_table, write_text

_LIBRARIES = ("img2prompt", "torch", "lightning", "timm", "open_clip_torch", "sentence-transformers", "transformers")


def new_run_folder(run_dir: str | None, name: str, make: bool = False) -> Path:
    """The folder for a new run: `run_dir`, or runs/<name>/<date_time>; `make` claims it, so that no other run does.

    ValueError when `run_dir` already holds something.
    """
    if run_dir is not None:
        folder = Path(run_dir)
        # A run that ended before its first file leaves no more than these.
        remains = ("lock", "bad_images.csv")
        is_left = lambda path: path.name in remains or path.suffix == ".tmp"  # noqa: E731
        if folder.exists() and (not folder.is_dir() or not all(map(is_left, folder.iterdir()))):
            raise ValueError(
                f"run_dir={run_dir}: already holds something; choose another, or go on with resume={run_dir}"
            )
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        return folder
    wanted = Path("runs", name, datetime.now().strftime("%Y-%m-%d_%H-%M-%S"))
    for folder in (wanted, *(wanted.with_name(f"{wanted.name}-{number}") for number in range(2, 1000))):
        try:
            if make:
                folder.mkdir(parents=True)
            if make or not folder.exists():
                return folder
        except FileExistsError:
            continue
    raise ValueError(f"{wanted}: a thousand runs began in this second")


def write_config(folder: Path, config: Mapping[str, Any], overrides: Sequence[str] | None = None) -> None:
    """The resolved configuration, with versions and git commit, so that the run can be repeated; and the arguments that
    gave it, where they are known. None keeps those of an earlier half.
    """
    if overrides is None:
        overrides = _recorded(folder / "config.yaml")
    arguments = {} if overrides is None else {"overrides": list(overrides)}
    text = yaml.safe_dump({**config, "versions": versions(), **arguments}, sort_keys=False)
    write_text(folder / "config.yaml", text)


def versions() -> dict[str, str | None]:
    """Of Python and the libraries that results depend on, and our git commit, where there is one."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            found[library] = "not installed"
    return {**found, "git_commit": _git_commit()}


def is_finished(folder: Path) -> bool:
    """Whether the run in `folder` came to its end, and not only to that of its time."""
    try:
        return json.loads((folder / "summary.json").read_text()).get("unfinished") is None
    except (OSError, ValueError, AttributeError):
        return False


class MetricsFile(Logger):
    """metrics.csv: one row a step, without clock values, so that two runs of one seed write equal bytes."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.rung = 0  # the number of the one that is climbed
        self._rows: dict[int, dict[str, Any]] = {}

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: config.yaml has them."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row = self._rows.setdefault(int(step or 0), {"step": int(step or 0), "rung": self.rung})
        # Nine digits give a float32 back exactly.
        row.update({name: f"{value:.9g}" for name, value in metrics.items()})
        if "val/cosine" in metrics:
            self.save()

    def rewind(self, step: int) -> None:
        """Takes up the file of an earlier process, without what came after `step`."""
        try:
            rows = {int(row["step"]): row for row in read_table(self.path)}
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{self.path}: damaged; remove it, and what was logged so far is lost") from None
        for number, row in rows.items():
            if number <= step:
                self._rows[number] = {name: value for name, value in row.items() if value != ""} | {"step": number}

    def save(self) -> None:
        if self._rows:
            write_table(self.path, [self._rows[step] for step in sorted(self._rows)])

    def finalize(self, status: str) -> None:
        self.save()


def _recorded(path: Path) -> list[str] | None:
    if not path.is_file():
        return None
    found = yaml.safe_load(path.read_text())
    return found.get("overrides") if isinstance(found, dict) else None


def _git_commit() -> str | None:
    try:
        result = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None
