"""H1: a sweep whose workers begin their next trial as soon as they are free, against one that waits for each batch of
them (goal: at least 1.4x).

Eight workers; a trial sleeps for 1 or 4 s, at random, and does nothing else. Both ways are the sweep's own loop with
its own processes, study and journal; waiting is the same loop, told to stop at each multiple of eight. They take turns,
and every round has other times.

    python benchmarks/sweep.py [rounds] [trials]
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

from record import record

from img2prompt.sweep import loop
from img2prompt.sweep.space import Parameter
from img2prompt.sweep.study import open_study

WORKERS = 8
SHORT_S, LONG_S = 1.0, 4.0
SLEEPER = f"""
import json, pathlib, random, sys, time
given = dict(one.split("=", 1) for one in sys.argv[1:])
folder = pathlib.Path(given["run_dir"])
time.sleep(random.Random(given["name"] + folder.name).choice([{SHORT_S}, {LONG_S}]))
folder.mkdir(parents=True)
(folder / "summary.json").write_text(json.dumps({{"val_cosine": float(given["optim.lr"])}}))
"""


def seconds(round_name: str, trials: int, batch: int) -> float:
    """How long a study of `trials` takes when nothing begins before a whole `batch` has ended."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        study = open_study(None, folder / "journal.log", "h1", "tpe", "none", 0, startup_trials=5, warmup_validations=1)
        began = time.monotonic()
        for total in range(batch, trials + 1, batch):
            plan = loop.Plan(
                folder=folder,
                parameters=[Parameter("optim.lr", "float", low=1e-5, high=1e-2, log=True)],
                overrides=[f"name={round_name}"],
                n_trials=total,
                slots=[{}] * WORKERS,
                rungs=[],
                command=(sys.executable, "-I", "-S", "-c", SLEEPER),
            )
            loop.run(study, plan, lambda running, study, finished: None)
        return time.monotonic() - began


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    trials = int(sys.argv[2]) if len(sys.argv) > 2 else 64
    found: dict[str, list[float]] = {"free": [], "batches": []}
    for number in range(rounds):
        ways = [("free", trials), ("batches", WORKERS)]
        for way, batch in ways if number % 2 == 0 else reversed(ways):
            found[way].append(seconds(f"round{number}", trials, batch))
    ratios = [waits / free for free, waits in zip(found["free"], found["batches"], strict=True)]
    record(
        "sweep",
        [
            {
                "claim": f"H1 {WORKERS} workers, {trials} trials of {SHORT_S:g} or {LONG_S:g} s",
                "goal": 1.4,
                "free_seconds": f"{statistics.median(found['free']):.1f}",
                "batches_seconds": f"{statistics.median(found['batches']):.1f}",
                "median_ratio": f"{statistics.median(ratios):.2f}",
                "min_ratio": f"{min(ratios):.2f}",
                "max_ratio": f"{max(ratios):.2f}",
            }
        ],
    )


if __name__ == "__main__":
    main()
