"""Where a benchmark's result goes: one CSV a claim, with the machine, the versions, the date and the command."""

import csv
import platform
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def record(name: str, rows: list[dict[str, object]]) -> None:
    """Writes results/<name>.csv anew and prints it."""
    about = {
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{torch.get_num_threads()} CPU threads",
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "lightning": version("lightning"),
        "date": date.today().isoformat(),
        # A path says where somebody's files are: its last part says which.
        "command": " ".join(["python", *(arg if arg == sys.argv[0] else Path(arg).name for arg in sys.argv)]),
    }
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *about], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, **about} for row in rows)
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
