"""Faults of sweeps, with real processes and real signals; the trainings are fake (fake_training.py)."""

import json
import os
import signal

import pytest
from sweeping import lives, pids, rows, started, sweep_here, wait_for


def finished_of(folder):
    """How many trials a sweep has, all of which are finished, and each of which counts once."""
    found = rows(folder)
    assert {row["state"] for row in found} == {"finished"}
    assert len({row["trial"] for row in found}) == len(found) == len(list(folder.glob("trials/*/summary.json")))
    return len(found)


pytestmark = pytest.mark.skipif(not os.path.isdir("/proc"), reason="looks at processes")


def test_a_trial_that_fails_fails_alone_and_says_why(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fake = {
        "0": {"nan": True},
        "1": {"exit": "the loss or its gradients were not finite in 10 steps one after another"},
        "2": {"exit": "the GPU's memory is not enough; lower data.batch_size"},
        "3": {"raises": "what nobody foresaw"},
        "4": {"kill_at": 2, "seconds": 0.3},
    }
    sweep_here("n_trials=7", "workers=4", "pruner=none", fake=fake, monkeypatch=monkeypatch)
    found = rows(tmp_path / "s")
    assert [row["state"] for row in found] == ["failed"] * 5 + ["finished"] * 2
    kinds = [row["kind"] for row in found[:5]]
    assert kinds == ["not finite", "not finite", "out of memory", "error", "killed"]
    assert "what nobody foresaw" in found[3]["reason"] and "SIGKILL" in found[4]["reason"]
    told = capsys.readouterr().out
    assert "trial 4: failed: killed by SIGKILL" in told and "best validation cosine" in told


def test_a_killed_sweep_leaves_no_training_and_its_trials_are_gone_on_with(tmp_path):
    arguments = ("n_trials=4", "workers=2", "pruner=none")
    slow = {"*": {"epochs": 1000, "seconds": 0.2, "child": True}}
    with started(tmp_path, *arguments, fake=slow) as process:
        first = wait_for(lambda: len(found := pids(tmp_path / "s")) == 4 and found)
        process.send_signal(signal.SIGKILL)
        process.wait()
        wait_for(lambda: not any(map(lives, first)), 20)
    with started(tmp_path, *arguments) as process:
        told = process.communicate(timeout=120)[0]
        assert process.returncode == 0, told
    assert finished_of(tmp_path / "s") == 4
    for number in (0, 1):
        folder = tmp_path / "s" / "trials" / f"{number:04d}"
        assert len((folder / "starts.txt").read_text().split()) == 2
        resumed = json.loads((folder / "resumed.json").read_text())
        # Its own configuration, and of the command what a machine may have of its own.
        assert resumed == ["trainer.accelerator=cpu", f"resume={folder}"]


def test_two_processes_share_one_study_and_the_living_takes_over_from_the_killed(tmp_path):
    arguments = ("n_trials=8", "workers=2", "pruner=none")
    fake = {"*": {"epochs": 4, "seconds": 0.2}}
    endless = {"*": {"epochs": 1000, "seconds": 0.2}}
    with started(tmp_path, *arguments, fake=endless) as dying:
        first = wait_for(lambda: len(found := pids(tmp_path / "s")) == 2 and found)
        with started(tmp_path, *arguments, fake=fake) as living:
            wait_for(lambda: len(pids(tmp_path / "s")) > 3)
            dying.send_signal(signal.SIGKILL)
            told = living.communicate(timeout=120)[0]
            assert living.returncode == 0, told
    assert not any(map(lives, first))
    assert finished_of(tmp_path / "s") == 8


def test_two_processes_never_take_more_than_the_total(tmp_path):
    arguments = ("n_trials=7", "workers=3", "pruner=none")
    with started(tmp_path, *arguments) as one, started(tmp_path, *arguments) as other:
        told = [process.communicate(timeout=120)[0] for process in (one, other)]
        assert one.returncode == other.returncode == 0, told
    assert [row["state"] for row in rows(tmp_path / "s")] == ["finished"] * 7
    assert len(list((tmp_path / "s" / "trials").glob("*/summary.json"))) == 7
    learning_rates = [row["optim.lr"] for row in rows(tmp_path / "s")]
    assert len(set(learning_rates)) == 7


@pytest.mark.slow
def test_a_worker_whose_trials_always_die_does_not_go_on_for_ever(tmp_path):
    arguments = ("n_trials=1", "pruner=none", "retries=1")
    slow = {"*": {"epochs": 1000, "seconds": 0.2}}
    for starts in (1, 2):
        with started(tmp_path, *arguments, fake=slow) as process:
            wait_for(lambda: len(pids(tmp_path / "s")) == starts)  # noqa: B023
            process.send_signal(signal.SIGKILL)
            process.wait()
    with started(tmp_path, *arguments, fake=slow) as process:
        assert "its worker died, for the 2. time" in process.communicate(timeout=120)[0] or process.returncode == 0
    assert [(row["state"], row["reason"]) for row in rows(tmp_path / "s")] == [
        ("failed", "its worker died, for the 2. time")
    ]


def test_pruning_ends_the_whole_process_group_even_one_that_does_not_listen(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = {"best": 0.9, "epochs": 3, "seconds": 0.4}
    bad = {"best": 0.1, "epochs": 1000, "seconds": 0.4, "ignores_sigterm": True, "child": True}
    fake = {"0": good, "1": good, "2": bad}
    arguments = ("n_trials=3", "startup_trials=2", "warmup_validations=0", "grace_s=1")
    sweep_here(*arguments, fake=fake, monkeypatch=monkeypatch)
    found = rows(tmp_path / "s")
    assert [row["state"] for row in found] == ["finished", "finished", "pruned"]
    assert int(found[2]["validations"]) < 20
    children = (tmp_path / "s" / "trials" / "0002" / "child.txt").read_text()
    assert not lives(int(children)) and not any(map(lives, pids(tmp_path / "s")))


@pytest.mark.parametrize(
    "number, code", [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_a_stopped_sweep_leaves_nothing_running_and_goes_on(tmp_path, number, code):
    arguments = ("n_trials=3", "workers=2", "pruner=none", "retries=0")
    slow = {"*": {"epochs": 1000, "seconds": 0.2, "child": True}}
    with started(tmp_path, *arguments, fake=slow) as process:
        first = wait_for(lambda: len(found := pids(tmp_path / "s")) == 4 and found)
        process.send_signal(number)
        told = process.communicate(timeout=60)[0]
        assert process.returncode == code and "the same command goes on" in told, told
    assert not any(map(lives, first))
    found = rows(tmp_path / "s")
    assert [row["state"] for row in found] == ["queued", "queued"] and all(float(row["optim.lr"]) for row in found)
    assert (tmp_path / "s" / "sweep.json").is_file()
    if number == signal.SIGTERM:
        return
    with started(tmp_path, *arguments) as process:
        told = process.communicate(timeout=120)[0]
        assert process.returncode == 0, told
    assert finished_of(tmp_path / "s") == 3


def test_what_makes_the_first_three_fail_alike_stops_the_sweep(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fake = {"*": {"exit": "data.root=/nowhere/12: no such folder"}}
    with pytest.raises(ValueError, match="the first 3 trials failed alike.*data.root=/nowhere/12"):
        sweep_here("n_trials=50", "workers=2", fake=fake, monkeypatch=monkeypatch)
    assert len(rows(tmp_path / "s")) <= 5
    # Mended, the same command goes on.
    sweep_here("n_trials=6", "workers=2", fake={}, monkeypatch=monkeypatch)
    assert sum(row["state"] == "finished" for row in rows(tmp_path / "s")) >= 2
