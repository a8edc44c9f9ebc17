"""What tests of sweeps share: sweeps with fake trainings, in this process or in one of their own."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from conftest import ROOT

HERE = Path(__file__).parent
FAKE = (sys.executable, str(HERE / "fake_training.py"))
LR = ("+sweep=lr", "trainer.accelerator=cpu", "sweep_dir=s")


def sweep_here(*arguments, fake=None, monkeypatch=None):
    """A sweep of fake trainings in this process; `fake` is what happens to each of them."""
    from img2prompt.commands.sweep import sweep

    if fake is not None:
        monkeypatch.setenv("FAKE", json.dumps(fake))
    sweep([*LR, *arguments], command=FAKE)


@contextmanager
def started(folder, *arguments, fake=None):
    """The same in a process of its own, which is gone afterwards."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "FAKE": json.dumps(fake or {})}
    process = subprocess.Popen(
        [sys.executable, str(HERE / "fake_sweep.py"), *LR, *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.communicate()


def rows(folder):
    with (folder / "trials.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def wait_for(found, seconds=60):
    """What `found` gives when it gives something."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        value = found()
        if value:
            return value
        time.sleep(0.05)
    raise AssertionError("waited in vain")


def lives(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def pids(folder):
    """All processes that fake trainings of a sweep were, and those that they have started."""
    return [
        int(line)
        for name in ("starts.txt", "child.txt")
        for path in Path(folder, "trials").glob(f"*/{name}")
        for line in path.read_text().split()
    ]
