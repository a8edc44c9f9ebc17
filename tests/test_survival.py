"""Runs that survive: killed at any moment they go on to the byte; bad numbers and full disks lose nothing."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import killing
import pytest
import torch
from conftest import QUICK, ROOT, TINY, read_csv

from img2prompt.losses import Loss
from img2prompt.training import callbacks, checkpoint, module
from img2prompt.training.checkpoint import LAST, PREVIOUS, read_state, write_state
from img2prompt.training.ema import Ema
from img2prompt.training.guard import Guard
from img2prompt.training.loop import Loop, seconds_of
from img2prompt.training.signals import Signals

# Everything random or remembered at once, two steps an epoch, four epochs; pairs_folder has two images of a prompt.
EVERYTHING = (
    "head.dropout=0.3",
    "augment=crop",
    "augment.flip=0.5",
    "data.batch_size=4",
    "trainer.accumulate_grad_batches=2",
    "trainer.keep_checkpoints=2",
    "stages.finetune.log_every_n_steps=1",
    "optim.ema_decay=0.9",
)
MID_EPOCH = "trainer.checkpoint_every_n_steps=1"
MOMENTS = [
    (moment, number)
    for moment, numbers in {
        "batch": (1, 2, 9, 14),
        "step": (1, 3, 4, 8),
        "score": (1, 2, 3, 5),
        "best": (1, 3),
        "save": (1, 2, 5, 8),
        "rename": (1, 4),
    }.items()
    for number in numbers
]
CORE = [("batch", 9), ("step", 4), ("score", 3), ("save", 5), ("rename", 4)]


def kept(folder):
    """All that two runs of one seed must have in common, byte for byte."""
    files = {path.name: path.read_bytes() for path in folder.glob("checkpoints/*.safetensors")}
    return files | {"metrics.csv": (folder / "metrics.csv").read_bytes()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, train_here):
    folder = tmp_path_factory.mktemp("survival") / "whole"
    train_here(folder, *EVERYTHING)
    assert len(list(folder.glob("checkpoints/finetune_step*.safetensors"))) == 2
    return kept(folder)


def killed_and_resumed(folder, train_here, moment, number, *overrides):
    with pytest.MonkeyPatch.context() as patch:
        killing.arm(moment, number, killing.raise_killed, patch.setattr)
        with pytest.raises(killing.Killed):
            train_here(folder, *EVERYTHING, *overrides)
    train_here(folder, *EVERYTHING, *overrides)
    return kept(folder)


@pytest.mark.parametrize(("moment", "number"), CORE)
def test_a_run_killed_at_any_moment_goes_on_to_the_byte(moment, number, tmp_path, train_here, whole):
    assert killed_and_resumed(tmp_path / "run", train_here, moment, number, MID_EPOCH) == whole


# Without states within an epoch there are four of them, one an epoch.
MATRIX = [(*one, MID_EPOCH) for one in MOMENTS] + [
    (moment, number, "trainer.checkpoint_every_n_steps=null")
    for moment, number in MOMENTS
    if number <= {"save": 4, "rename": 3}.get(moment, number)
]


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["ram", "none"])
@pytest.mark.parametrize(("moment", "number", "every"), MATRIX)
def test_the_whole_matrix_of_kills(moment, number, every, cache, tmp_path, train_here, whole):
    assert killed_and_resumed(tmp_path / "run", train_here, moment, number, every, f"data.cache={cache}") == whole


def test_what_a_run_needs_to_go_on_is_never_made_up(tmp_path, train_here, whole):
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        killing.arm("step", 5, killing.raise_killed, patch.setattr)
        with pytest.raises(killing.Killed):
            train_here(run, *EVERYTHING, MID_EPOCH)
    metrics, best = run / "metrics.csv", run / "checkpoints" / "finetune.safetensors"
    for path, sentence in (
        (metrics, "metrics.csv: damaged; remove it"),
        (best, r"finetune.safetensors: the best epoch so far \(0.\d+\) is gone; put it back"),
    ):
        before = path.read_bytes()
        path.write_text("garbage\n1\n") if path == metrics else path.unlink()
        with pytest.raises(ValueError, match=sentence):
            train_here(run, *EVERYTHING, MID_EPOCH)
        path.write_bytes(before)
    train_here(run, *EVERYTHING, MID_EPOCH)
    assert kept(run) == whole


def test_a_run_killed_twice_goes_on_to_the_byte(tmp_path, train_here, whole):
    for moment, number in (("step", 3), ("score", 3)):
        with pytest.MonkeyPatch.context() as patch:
            killing.arm(moment, number, killing.raise_killed, patch.setattr)
            with pytest.raises(killing.Killed):
                train_here(tmp_path / "run", *EVERYTHING, MID_EPOCH)
    train_here(tmp_path / "run", *EVERYTHING, MID_EPOCH)
    assert kept(tmp_path / "run") == whole


def run(*arguments, program=("train.py",), cwd):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / program[0]), *program[1:], *QUICK, *TINY, *EVERYTHING, MID_EPOCH, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    ("moment", "number"),
    [("save", 5), *(pytest.param(*one, marks=pytest.mark.slow) for one in CORE if one != ("save", 5))],
)
def test_a_killed_process_is_gone_on_with_by_the_same_command(moment, number, tmp_path, pairs_folder, whole):
    same = (f"data.root={pairs_folder}", "name=x", "resume=auto")
    killed = run(*same, program=("tests/killing.py", moment, str(number)), cwd=tmp_path)
    assert killed.returncode == -9 and "resume=auto: no unfinished run, so a new one begins" in killed.stdout
    (folder,) = (tmp_path / "runs" / "x").iterdir()
    refused = run(*same, "optim.lr=1", cwd=tmp_path)
    assert refused.returncode == 1 and "optim.lr is None in that run, not 1" in refused.stderr
    done = run(*same, cwd=tmp_path)
    assert done.returncode == 0 and f"goes on with runs/x/{folder.name}" in done.stdout, done.stderr
    assert kept(folder) == whole and not list(folder.rglob("*.tmp"))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    finished = run(f"data.root={pairs_folder}", f"run_dir={folder}", "resume=auto", cwd=tmp_path)
    assert finished.returncode == 0 and "this run is finished" in finished.stdout
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_run_stopped_by_the_clock_within_an_epoch_goes_on_to_the_byte(tmp_path, train_here, whole, monkeypatch):
    after = module.RegressorModule.optimizer_step

    def late(self, *args):
        after(self, *args)
        if self.step == 2:
            # The clock has run out within the second epoch.
            object.__setattr__(self.trainer.callbacks[2].loop, "deadline", 0.0)

    with monkeypatch.context() as patch:
        patch.setattr(module.RegressorModule, "optimizer_step", late)
        train_here(tmp_path / "run", *EVERYTHING, MID_EPOCH)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["unfinished"] == "stopped by trainer.max_time at step 3 of 8"
    train_here(tmp_path / "run", *EVERYTHING, MID_EPOCH)
    assert kept(tmp_path / "run") == whole


def state(step=1):
    return {
        "stage": "finetune",
        "step": step,
        "total": 9,
        "scored": True,
        "best": 0.5,
        "kept": [[0.5, 1]],
        "seconds": 1.0,
        "skipped": [],
        "regressor": {"w": torch.randn(50, 40, generator=torch.Generator().manual_seed(step))},
        "loss": {},
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]},
        "ema": {},
    }


def test_a_damaged_state_falls_back_to_the_one_before_it_and_says_so(tmp_path, capsys):
    assert read_state(tmp_path) is None
    for step in (1, 2):
        write_state(tmp_path, state(step))
    newest = (tmp_path / LAST).read_bytes()
    assert read_state(tmp_path)["step"] == 2
    for damage in (b"", newest[:100], newest[:-1], newest[:3000] + bytes([newest[3000] ^ 1]) + newest[3001:]):
        (tmp_path / LAST).write_bytes(damage)
        assert read_state(tmp_path)["step"] == 1
        assert "damaged training state" in capsys.readouterr().err
    (tmp_path / PREVIOUS).write_bytes(b"")
    with pytest.raises(ValueError, match="damaged training state.*damaged training state.*start anew"):
        read_state(tmp_path)


def test_a_writer_that_fails_at_any_byte_loses_nothing(tmp_path, monkeypatch):
    write_state(tmp_path, state(1))
    size = (tmp_path / LAST).stat().st_size
    save = torch.save
    for offset in range(0, size, size // 20):

        def fails(value, file, offset=offset):
            write = file.write

            class Full:
                def write(self, data):
                    if file.tell() + len(data) > offset:
                        write(bytes(data)[: offset - file.tell()])
                        raise OSError(28, "No space left on device")
                    return write(data)

                def flush(self):
                    file.flush()

            save(value, Full())

        monkeypatch.setattr(checkpoint.torch, "save", fails)
        with pytest.raises(ValueError, match="the disk is full: .* MiB are missing; what was there before is kept"):
            write_state(tmp_path, state(2))
        monkeypatch.setattr(checkpoint.torch, "save", save)
        assert [path.name for path in tmp_path.iterdir()] == [LAST] and read_state(tmp_path)["step"] == 1


def test_a_full_disk_ends_the_run_with_how_much_is_missing_and_it_goes_on_later(tmp_path, pairs_folder, whole):
    code = (
        "import resource, sys; from img2prompt.training import checkpoint; whole = checkpoint._on_cpu; n = [0]\n"
        "def full(value):\n"
        "    if isinstance(value, dict) and 'stage' in value and value['step'] == 4:\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))\n"
        "    return whole(value)\n"
        "checkpoint._on_cpu = full\n"
        "from img2prompt.commands.door import main; main('train', sys.argv[1:])\n"
    )
    (tmp_path / "full.py").write_text(code)
    same = (f"data.root={pairs_folder}", "run_dir=run")
    done = run(*same, program=(str(tmp_path / "full.py"),), cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "the disk is full" in done.stderr and "MiB are missing" in done.stderr
    assert read_state(tmp_path / "run" / "checkpoints")["step"] == 3
    done = run("resume=run", f"data.root={pairs_folder}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert kept(tmp_path / "run") == whole


def test_a_disk_that_is_too_small_is_refused_before_training(tmp_path, train_here, monkeypatch):
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ValueError, match="are needed there and 0.0 MiB are free; choose another run_dir"):
        train_here(tmp_path / "run")


class Poison(Loss):
    """A loss that is not finite at some steps."""

    def __init__(self, steps, value=float("nan")):
        super().__init__()
        self.steps, self.value, self.calls = steps, value, 0

    def forward(self, outputs, batch):
        self.calls += 1
        loss = 1 - (outputs.embedding * batch.targets).sum(-1).mean()
        return {"cosine": loss * self.value if self.calls - 1 in self.steps else loss}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_nothing_and_is_told(value, tmp_path, train_here, monkeypatch, capsys):
    from img2prompt.commands import assembly

    build = assembly.recipe
    steps = []

    def poisoned(settings, folder, at=(2, 5)):
        parts = build(settings, folder)
        parts.loss = Poison(at, value)
        return parts

    step = module.RegressorModule.optimizer_step

    def watched(self, *args):
        before = [parameter.detach().clone() for parameter in self.parameters()]
        step(self, *args)
        same = all(torch.equal(a, b) for a, b in zip(before, self.parameters(), strict=True))
        steps.append((same, all(bool(buffer.isfinite().all()) for buffer in self.buffers())))

    monkeypatch.setattr(assembly, "recipe", poisoned)
    monkeypatch.setattr(module.RegressorModule, "optimizer_step", watched)
    train_here(tmp_path / "run", "trainer.max_skipped_steps=3")
    assert [same for same, _ in steps] == [number in (2, 5) for number in range(8)]
    told = capsys.readouterr().err
    assert "step 2 skipped, its loss or gradients were not finite (images " in told and "step 5 skipped" in told
    assert read_state(tmp_path / "run" / "checkpoints")["skipped"] == [2, 5]
    # Too many in a row end the run, and what is on disk is from before.
    monkeypatch.setattr(assembly, "recipe", lambda settings, folder: poisoned(settings, folder, range(3, 99)))
    with pytest.raises(ValueError, match="not finite in 3 steps one after another, up to step 6.*optim.lr"):
        train_here(tmp_path / "other", "trainer.max_skipped_steps=3")
    last = read_state(tmp_path / "other" / "checkpoints")
    assert last["step"] == 4 and all(value.isfinite().all() for value in last["regressor"].values())


def test_batchnorm_forgets_a_step_that_was_not_finite():
    torch.manual_seed(0)
    norm = torch.nn.BatchNorm1d(4)
    guard = Guard(2, torch.device("cpu"))
    for step, scale in enumerate((1.0, float("nan"), 1.0)):
        before = norm.running_mean.clone()
        guard.remember(norm)
        loss = norm(torch.randn(8, 4) * scale).sum()
        guard.judge(step, loss)
        assert norm.running_mean.isfinite().all()
        assert torch.equal(norm.running_mean, before) == (step == 1)
    assert guard.report(3) == [1] and guard.skipped == [1]


def test_a_streak_of_bad_steps_is_counted_across_a_resume():
    guard = Guard(4, torch.device("cpu"))
    for step in range(4, 7):
        guard.judge(step, torch.tensor(float("nan")))
    guard.report(7)
    later = Guard(4, torch.device("cpu"), 7, guard.skipped)
    later.judge(7, torch.tensor(float("inf")))
    with pytest.raises(ValueError, match="4 steps one after another, up to step 8"):
        later.report(8)


def test_a_streak_that_begins_between_two_reports_ends_the_run():
    guard = Guard(4, torch.device("cpu"))
    for step in range(8):
        guard.judge(step, torch.tensor(float("nan") if 2 <= step <= 5 else 1.0))
        if step == 3:
            assert guard.report(4) == [2, 3]
    with pytest.raises(ValueError, match="4 steps one after another"):
        guard.report(8)
    other = Guard(4, torch.device("cpu"))
    for step in range(8):
        other.judge(step, torch.tensor(1.0 if step in (0, 4) else float("nan")))
        if step == 3:
            other.report(4)
    assert other.report(8) == [5, 6, 7]


@pytest.mark.parametrize("moment", ["third step", "last step", "last validation"])
def test_a_run_that_a_signal_stopped_goes_on_to_the_byte(moment, tmp_path, train_here, whole, monkeypatch):
    step, score = callbacks.Keep._after_step, callbacks.Keep._score

    def after_step(self, trainer, module):
        if module.step == {"third step": 3, "last step": 8}.get(moment):
            self.signals.received = signal.SIGTERM
        step(self, trainer, module)

    def scored(self, loggers, module, whole):
        if module.step == 8 and moment == "last validation":
            self.signals.received = signal.SIGTERM
        score(self, loggers, module, whole)

    with monkeypatch.context() as patch:
        patch.setattr(callbacks.Keep, "_after_step", after_step)
        patch.setattr(callbacks.Keep, "_score", scored)
        with pytest.raises(SystemExit) as stopped:
            train_here(tmp_path / "run", *EVERYTHING)
    assert stopped.value.code == 143
    train_here(tmp_path / "run", *EVERYTHING)
    assert kept(tmp_path / "run") == whole


def test_the_average_has_statistics_of_its_own_for_batchnorm():
    norm = torch.nn.BatchNorm1d(2)
    ema = Ema(norm, 0.5)
    norm(torch.full((4, 2), 3.0))
    moved = norm.running_mean.clone()
    ema.update(100)
    assert torch.allclose(ema.averages["running_mean"], 0.5 * moved) and moved.abs().min() > 0
    with ema.applied():
        assert torch.allclose(norm.running_mean, 0.5 * moved)
    assert torch.equal(norm.running_mean, moved)


def test_a_run_that_ends_while_it_embeds_is_found_again(tmp_path, pairs_folder, monkeypatch, capsys):
    from img2prompt.commands import assembly
    from img2prompt.commands.door import main

    monkeypatch.chdir(tmp_path)
    arguments = [*QUICK, *TINY, f"data.root={pairs_folder}", "trainer.max_epochs=0", "resume=auto"]
    with monkeypatch.context() as patch:
        patch.setattr(assembly, "rows", lambda *args: killing.raise_killed())
        with pytest.raises(killing.Killed):
            main("train", arguments)
    (folder,) = (tmp_path / "runs" / "kaggle").iterdir()
    main("train", arguments)
    assert f"goes on with {Path('runs') / 'kaggle' / folder.name}" in capsys.readouterr().out
    assert [path.name for path in folder.parent.iterdir()] == [folder.name] and (folder / "summary.json").is_file()


def test_the_average_equals_its_closed_form():
    linear = torch.nn.Linear(3, 2).double()
    ema = Ema(linear, 0.95)
    values = [linear.weight.detach().clone()]
    for step in range(30):
        linear.weight.data.normal_()
        values.append(linear.weight.detach().clone())
        ema.update(step)
    decays = [min(0.95, (1 + t) / (10 + t)) for t in range(30)]
    tails = torch.tensor([torch.tensor(decays[i:]).prod() for i in range(30)] + [1.0]).double()
    factors = torch.cat([tails[:1], tails[1:] * (1 - torch.tensor(decays).double())])
    expected = sum(factor * value for factor, value in zip(factors, values, strict=True))
    assert torch.allclose(ema.averages["weight"], expected, atol=1e-6)
    current = linear.weight.detach().clone()
    with ema.applied():
        assert torch.equal(linear.weight, ema.averages["weight"])
    assert torch.equal(linear.weight, current)


def test_what_is_kept_is_the_average(tmp_path, train_here):
    from safetensors.torch import load_file

    train_here(tmp_path / "run", "optim.ema_decay=0.9", "trainer.max_epochs=1")
    last = read_state(tmp_path / "run" / "checkpoints")
    best = load_file(tmp_path / "run" / "checkpoints" / "finetune.safetensors")
    assert last["ema"] and all(torch.equal(best[name], value) for name, value in last["ema"].items())
    assert not any(torch.equal(last["regressor"][name], value) for name, value in last["ema"].items())


def test_accumulated_batches_equal_one_large_batch(tmp_path, train_here, monkeypatch):
    gradients = []
    step = torch.optim.AdamW.step

    def watched(self, *args, **options):
        gradients.append([p.grad.clone() for group in self.param_groups for p in group["params"]])
        return step(self, *args, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    # Without what differs by nature: augmentation and dropout are drawn batch by batch, and this model has neither.
    usual = ("trainer.max_epochs=3", "optim.lr=1e-3", "stages.finetune.log_every_n_steps=1")
    train_here(tmp_path / "one", "data.batch_size=8", *usual)
    train_here(tmp_path / "parts", "data.batch_size=2", "trainer.accumulate_grad_batches=4", *usual)
    # Adam makes whole steps of gradients that are rounding alone, so gradients and losses are compared, not weights.
    one, parts = (gradients[:6], gradients[6:])
    for mine, other in zip(one, parts, strict=True):
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(mine, other, strict=True))
    rows = [read_csv(tmp_path / name / "metrics.csv") for name in ("one", "parts")]
    for first, second in zip(*rows, strict=True):
        for name in ("train/cosine", "val/cosine"):
            assert (first[name] == "") == (second[name] == "")
            assert abs(float(first[name] or 0) - float(second[name] or 0)) < 1e-6


def test_a_second_signal_ends_the_process_at_once(monkeypatch):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    signals = Signals()
    signals._note(15, None)
    assert signals.received == 15 and not codes
    signals._note(2, None)
    assert codes == [130]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"accumulate_grad_batches": 0}, "accumulate_grad_batches must be at least 1, got 0"),
        ({"keep_checkpoints": 0}, "keep_checkpoints must be at least 1"),
        ({"max_skipped_steps": 0}, "max_skipped_steps must be at least 1"),
        ({"checkpoint_every_n_steps": 0}, "checkpoint_every_n_steps must be at least 1"),
        ({"checkpoint_every_minutes": 0.0}, "checkpoint_every_minutes must be above 0"),
        ({"gradient_clip_norm": -1.0}, "gradient_clip_norm must be at least 0"),
    ],
)
def test_settings_of_the_loop_that_mean_nothing_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        Loop(**options)


def test_the_time_limit_is_read_as_days_hours_minutes_seconds():
    assert seconds_of("01:02:03:04") == 93784
    with pytest.raises(ValueError, match="must be DD:HH:MM:SS"):
        seconds_of("9h")


def test_states_are_written_every_so_many_steps_and_minutes(tmp_path, train_here, monkeypatch):
    steps = []
    write = checkpoint.write_state

    def noted(folder, state):
        steps.append(state["step"])
        write(folder, state)

    monkeypatch.setattr("img2prompt.training.callbacks.write_state", noted)
    train_here(tmp_path / "a")
    assert steps == [2, 4, 6, 8]
    steps.clear()
    train_here(tmp_path / "b", "trainer.checkpoint_every_n_steps=3")
    assert steps == [2, 3, 4, 6, 8]
    steps.clear()
    train_here(tmp_path / "c", "trainer.checkpoint_every_minutes=1e-9")
    assert steps == [1, 2, 3, 4, 5, 6, 7, 8]
