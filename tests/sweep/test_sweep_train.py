"""Sweeps whose trials are real trainings: minutes, and therefore slow."""

import json
import os
import shlex
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, TINY
from sweeping import rows, wait_for

SMALL = (*TINY, "data.count=60", "trainer.accelerator=cpu", "data.threads=1")


def start(folder, *arguments):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'offline'}"}
    command = [sys.executable, "-m", "img2prompt", *arguments]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.slow
def test_a_sweep_trains_prunes_and_ends_with_a_command_that_trains(tmp_path):
    arguments = ("+sweep=demo", "n_trials=4", "startup_trials=1", "warmup_validations=0", "trainer.max_epochs=4")
    process = start(tmp_path, "sweep", *arguments, *SMALL)
    told = process.communicate(timeout=550)[0]
    assert process.returncode == 0, told
    found = rows(tmp_path / "runs" / "sweeps" / "demo")
    assert {row["state"] for row in found} <= {"finished", "pruned"} and found[0]["state"] == "finished", told
    assert found[0]["validations"] == "4"
    for row in found:
        summary = tmp_path / "runs" / "sweeps" / "demo" / "trials" / f"{int(row['trial']):04d}" / "summary.json"
        assert summary.exists() == (row["state"] == "finished")
    typed = shlex.split(told.rpartition("train it again:\n")[2])
    done = start(tmp_path, *typed[3:], "run_dir=again", "trainer.max_epochs=1")
    assert done.communicate(timeout=200)[0] and done.returncode == 0
    assert json.loads((tmp_path / "again" / "summary.json").read_text())["val_cosine"] > 0


@pytest.mark.slow
def test_a_killed_sweep_goes_on_with_its_trial_at_the_step_where_it_was(tmp_path):
    # Slow enough to be killed after a saved step.
    arguments = ("sweep", "+sweep=lr", "n_trials=1", "sweep_dir=s", *SMALL, "trainer.checkpoint_every_n_steps=1")
    folder = tmp_path / "s" / "trials" / "0000"
    process = start(tmp_path, *arguments, "trainer.max_epochs=60")
    wait_for((folder / "checkpoints" / "previous.ckpt").exists, 200)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (folder / "summary.json").exists()
    process = start(tmp_path, *arguments, "trainer.max_epochs=60")
    told = process.communicate(timeout=400)[0]
    assert process.returncode == 0, told
    assert [(row["trial"], row["state"]) for row in rows(tmp_path / "s")] == [("0", "finished")]
    assert json.loads((folder / "summary.json").read_text())["val_cosine"] > 0
    log = (tmp_path / "s" / "trials" / "0000.log").read_text()
    assert log.count("finetune: step 1/60,") == 1 and "finetune: step 60/60," in log, log
    assert len(list((tmp_path / "s" / "trials").glob("*/config.yaml"))) == 1
