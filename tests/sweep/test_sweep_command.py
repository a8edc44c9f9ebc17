"""`img2prompt sweep` as a user types it: help, bad input, and what it leaves."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT
from sweeping import FAKE, lives, pids, rows, started, sweep_here, wait_for

from img2prompt.commands import door
from img2prompt.commands.settings import compose
from img2prompt.report.sweep import write_sweep_report


def said(capsys, monkeypatch, folder, *arguments):
    """What the door says of bad input, which must be one sentence and start nothing."""
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as stopped:
        door.main("sweep", list(arguments))
    assert stopped.value.code == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 2 and "IMG2PROMPT_TRACEBACK" in lines[1]
    assert not list(folder.glob("**/trials"))
    return lines[0]


def test_help_shows_the_spaces_and_imports_neither_torch_nor_optuna(door, tmp_path):
    done = door("tests/sweep/fake_sweep.py", "--help", cwd=tmp_path, PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0 and "+sweep=recipe" in done.stdout and "optim.layer_decay" in done.stdout
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "img2prompt" in imported and not imported & {"torch", "optuna", "hydra"}


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "give one search space: +sweep=NAME (demo, head, lr, recipe)"),
        (["+sweep=lr", "space=mine.yaml"], "give one search space"),
        (["+sweep=recip"], "did you mean recipe?"),
        (["+sweep=lr", "n_trails=3"], "n_trails: no such key; did you mean n_trials?"),
        (["+sweep=lr", "optm.layer_decay=1"], "did you mean optim.layer_decay?"),
        (["+sweep=lr", "optim.layer_decai=1"], "optim.layer_decai: no such key; did you mean optim.layer_decay?"),
        (["+sweep=lr", "optim.lr=1"], "optim.lr: is drawn by"),
        (["+sweep=lr", "run_dir=x"], "run_dir: is set for each trial by the sweep"),
        (["+sweep=lr", "-m"], "-m: sweep takes no options"),
        (["+sweep=lr", "experiment=vit_b"], "write +experiment=NAME"),
        (["+sweep=lr", "workers=0"], "workers=0: must be at least 1"),
        (["+sweep=lr", "workers=two"], "workers=two: must be a whole number"),
        (["+sweep=lr", "pruner=medium"], "pruner=medium: must be one of median, hyperband, none"),
        (["+sweep=lr", "gpus=all"], "gpus=all: must be auto, or a [list]"),
        (["+sweep=lr", "storage=somewhere"], "storage=somewhere: must be a URL"),
        (["space=nowhere.yaml"], "nowhere.yaml: no search space is there"),
    ],
)
def test_bad_input_is_one_sentence_before_anything_starts(arguments, words, capsys, monkeypatch, tmp_path):
    assert words in said(capsys, monkeypatch, tmp_path, *arguments)


@pytest.mark.parametrize(
    "text, words",
    [
        ("optim.lrr: [1, 2]", "optim.lrr: no such key; did you mean optim.lr?"),
        ("head.hidden: [64, 128]", "head.hidden is there with some choices of head alone: draw it when: {head: …}"),
        ("head: [linear, mpl]", "head=mpl: no such choice; did you mean mlp?"),
        ("data.batch_size: [16, many]", "data.batch_size=many: must be a whole number"),
        ("optim.lr: {float: [1e-3, 1e-5]}", "the first is smaller"),
        ("optim.lr: {float: [0, 1], log: true}", "log needs numbers above 0"),
        ("optim.lr: {flaot: [0, 1]}", "its values must be"),
        ("optim.lr: {float: [0, 1], lgo: true}", "lgo says nothing of a float"),
        ("optim.lr: [1, 1]", "different values"),
        ("head.hidden: {int: [8, 16], when: {head: mlp}}\nhead: [linear, mlp]", "stands above"),
        ("head: [linear, mlp]\nhead.hidden: {int: [8, 16], when: {head: deep}}", "head is never deep"),
        ("optim.lr: [1, 2]\noptim.lr: [3, 4]", "optim.lr is there twice"),
        ("run_dir: [a, b]", "run_dir cannot be drawn"),
        ("- a\n- b", "a search space has lines of key: values"),
        ("a: [", "not YAML"),
    ],
)
def test_a_bad_search_space_is_one_sentence_with_its_file(text, words, capsys, monkeypatch, tmp_path):
    (tmp_path / "mine.yaml").write_text(text)
    told = said(capsys, monkeypatch, tmp_path, "space=mine.yaml")
    assert words in told and "mine.yaml" in told


def test_a_folder_that_holds_something_else_is_refused_and_kept(capsys, monkeypatch, tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "thesis.txt").write_text("mine")
    told = said(capsys, monkeypatch, tmp_path, "+sweep=lr", "sweep_dir=s")
    assert "sweep_dir=s: already holds something that is no sweep" in told
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["thesis.txt"]


def test_a_study_of_another_space_or_of_other_overrides_is_refused_with_the_difference(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    sweep_here("n_trials=1", fake={}, monkeypatch=monkeypatch)
    with pytest.raises(ValueError, match=r"s: train differs: optim.ema_decay is null in this study, and 0.9 now"):
        sweep_here("n_trials=1", "optim.ema_decay=0.9")
    from img2prompt.commands.sweep import sweep

    (tmp_path / "lr.yaml").write_text("optim.lr: {float: [1e-6, 1e-1], log: true}")
    with pytest.raises(ValueError, match="the search space differs: optim.lr is .*0.01.* in this study, and .*0.1"):
        sweep(["space=lr.yaml", "sweep_dir=s", "trainer.accelerator=cpu"], command=FAKE)
    # What belongs to a machine may be another one.
    sweep_here("n_trials=2", "cache_dir=elsewhere", "workers=2", "data.threads=1")
    assert len(rows(tmp_path / "s")) == 2


def test_machines_may_have_their_images_elsewhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    sweep_here("n_trials=1", "data=folder", "data.root=/here", fake={}, monkeypatch=monkeypatch)
    sweep_here("n_trials=2", "data=folder", "data.root=/there", "data.threads=1")
    assert len(rows(tmp_path / "s")) == 2
    mixed = "data=mixture", "data.sources=[{source: folder, root: /x}, {source: folder, root: /y}]"
    sweep_here("n_trials=1", *mixed, "sweep_dir=m")
    sweep_here("n_trials=2", mixed[0], mixed[1].replace("/x", "/z"), "sweep_dir=m")
    with pytest.raises(ValueError, match="train differs: data.sources.1.weight"):
        sweep_here("n_trials=2", mixed[0], mixed[1].replace("/y", "/y, weight: 2"), "sweep_dir=m")


@pytest.mark.parametrize("count", ["0", "-1"])
def test_a_trial_has_a_device(count, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"trainer.devices={count}: must be at least 1"):
        sweep_here(f"trainer.devices={count}")


def test_a_trial_that_is_gone_on_with_has_its_own_settings_and_the_keys_of_the_machine(monkeypatch, tmp_path):
    from img2prompt.sweep.loop import _may_differ

    assert [one for one in ("data=folder", "data.threads=2", "+logger.project=x", "optim.lr=1", "logger=csv",
                            "trainer.devices=2") if _may_differ(one)] == ["data.threads=2", "+logger.project=x",
                                                                          "logger=csv"]  # fmt: skip


def test_a_finished_sweep_says_so_and_its_command_trains_the_best(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    sweep_here("n_trials=4", "workers=2", "name=it's (1)", fake={}, monkeypatch=monkeypatch)
    capsys.readouterr()
    page = (tmp_path / "s" / "report.html").read_bytes()
    sweep_here("n_trials=4", "workers=2", "name=it's (1)")
    told = capsys.readouterr().out
    assert "all of them are there" in told
    assert (tmp_path / "s" / "report.html").read_bytes() == page
    best = max(rows(tmp_path / "s"), key=lambda row: float(row["val_cosine"]))
    assert f"best validation cosine: {float(best['val_cosine']):.4f}, trial {best['trial']}" in told
    typed = shlex.split(told.rpartition("train it again:\n")[2])
    assert typed[:4] == ["python", "-m", "img2prompt", "train"]
    settings = compose("train", door.quoted_paths(typed[4:]))
    assert settings["optim"]["lr"] == float(best["optim.lr"]) and settings["name"] == "it's (1)"
    trial = json.loads((tmp_path / "s" / "trials" / f"{int(best['trial']):04d}" / "arguments.json").read_text())
    assert set(typed[4:]) < set(trial)


def test_the_report_is_complete_and_can_be_written_again(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    fake = {"2": {"exit": "<script>alert(1)</script> not finite"}, "4": {"best": -0.5}}
    sweep_here("n_trials=6", "workers=2", "pruner=none", fake=fake, monkeypatch=monkeypatch)
    first = (tmp_path / "s" / "report.html").read_text()
    for words in ("Importance", "History", "optim.lr", "python -m img2prompt train", "&lt;script&gt;", "not finite"):
        assert words in first
    assert write_sweep_report(tmp_path / "s", tmp_path / "again.html").read_text() == first
    with pytest.raises(ValueError, match="no sweep, it has no sweep.json"):
        write_sweep_report(tmp_path)


@pytest.mark.slow
def test_report_writes_it_again(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    sweep_here("n_trials=1", fake={}, monkeypatch=monkeypatch)
    first = (tmp_path / "s" / "report.html").read_text()
    command = [sys.executable, "-m", "img2prompt", "report", "sweep_dir=s", "out=again.html"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.run(command, cwd=tmp_path, timeout=200, env=environment)
    assert process.returncode == 0 and (tmp_path / "again.html").read_text() == first


def test_a_terminal_has_a_table_that_is_written_over_itself(monkeypatch, tmp_path):
    import io

    from img2prompt.commands import live

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr(live.sys, "stdout", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.chdir(tmp_path)
    sweep_here("n_trials=1", fake={"*": {"seconds": 0.5}}, monkeypatch=monkeypatch)
    text = screen.getvalue()
    assert "0 of 1, no best yet, 0:00:0" in text and re.search(r"0: trial 0 +0\.\d+ after 1", text)
    # As many lines are taken back as were drawn.
    assert "\x1b[2F\x1b[J" in text


def test_a_free_worker_does_not_wait_for_the_others(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    fake = {"0": {"epochs": 1, "seconds": 2.0}, "*": {"epochs": 1, "seconds": 0.01}}
    sweep_here("n_trials=5", "workers=2", "pruner=none", fake=fake, monkeypatch=monkeypatch)
    ended = {
        number: (tmp_path / "s" / "trials" / f"{number:04d}" / "summary.json").stat().st_mtime for number in range(5)
    }
    assert max(ended, key=ended.get) == 0


@pytest.mark.slow
def test_trials_are_started_elsewhere_only_when_their_worker_is_really_gone(tmp_path):
    slow = {"*": {"epochs": 12, "seconds": 0.3}}
    arguments = ("n_trials=2", "pruner=none", "dead_after_s=1")
    with started(tmp_path, *arguments, fake=slow) as one:
        wait_for(lambda: pids(tmp_path / "s"))
        with started(tmp_path, *arguments, fake=slow) as other:
            told = [process.communicate(timeout=120)[0] for process in (one, other)]
    assert "queued again" not in "".join(told)
    assert len(pids(tmp_path / "s")) == 2 and not any(map(lives, pids(tmp_path / "s")))
