"""Two processes train as one: the same losses, one folder, and they stop, skip and fail together."""

import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import QUICK, ROOT, TINY, read_csv
from safetensors.torch import load_file, save_file
from test_survival import EVERYTHING, MID_EPOCH, kept
from tiny_diffusion import tiny_captioner, tiny_stable_diffusion

from img2prompt import ranks
from img2prompt.commands.launch import others
from img2prompt.regressor import load_regressor
from img2prompt.training.checkpoint import read_state
from img2prompt.training.module import still_buffers

EACH = "stages.finetune.log_every_n_steps=1"
# What is the same on one device and on two: nothing random but the order, and no BatchNorm.
ALIKE = {
    "cosine": (EACH,),
    # With a picture that cannot be read.
    "accumulated": (
        "data.root=HERE/bad",
        "trainer.accumulate_grad_batches=2",
        "data.batch_size=4",
        "optim.ema_decay=0.9",
        EACH,
    ),
    "softmax": ("loss=cosine_softmax", "data.cache=none", EACH),
    "sigmoid": ("loss=sigmoid", "data.cache=disk", "stages.finetune.unfrozen_blocks=1", EACH),
    "words": ("head=joint_vocabulary", "loss=joint", "head.vocabulary_size=12", EACH),
    "curriculum": ("curriculum=easy_first", "curriculum.scorer=prompt_length", "data.batch_size=4", EACH),
    "kept features": (
        *("encoder.pretrained=HERE/encoder.safetensors", "stages.finetune=null", "stages.probe.epochs=4"),
        *("head=mlp", "head.hidden=64", "head.batchnorm=false", f"+{EACH.replace('finetune', 'probe')}"),
    ),
    # Latents and captions are kept, and what the run records of its pairs is.
    "white box": (
        *(
            "encoder=sd_unet",
            "~encoder.model_kwargs",
            "encoder.name=HERE/diffusion/model",
            "encoder.captioner=HERE/blip",
        ),
        *("encoder.pretrained=true", "stages.text_only=null", "stages.probe=null", "optim.lr=1e-4"),
        *("curriculum=record", EACH),
    ),
}


def environment(**more):
    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'offline'}", **more}


def command(pairs, *arguments, program=("train.py",)):
    return [sys.executable, str(ROOT / program[0]), *program[1:], *QUICK, *TINY, f"data.root={pairs}", EACH, *arguments]


def two(pairs, cwd, fault, *arguments):
    """Both processes, as torchrun would start them."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = []
    for rank in ("0", "1"):
        own = environment(**world, RANK=rank, LOCAL_RANK=rank, OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
        run = command(pairs, *arguments, program=("tests/ranked.py", fault))
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(run, cwd=cwd, env=own, stdout=pipe, stderr=pipe, text=True))
    return started


def ended(processes):
    """Exit codes, and what was said to standard error and to standard output."""
    try:
        said = [process.communicate(timeout=120) for process in processes]
    finally:
        # One whose partner never came waits for it.
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], [error for _, error in said], [out for out, _ in said]


@pytest.fixture(scope="module")
def killed(tmp_path_factory, pairs_folder):
    """A run on two devices that died while it wrote a state, and nothing of it is left running."""
    folder = tmp_path_factory.mktemp("killed")
    options = (*EVERYTHING, MID_EPOCH, "trainer.devices=2", "run_dir=run")
    run = command(pairs_folder, *options, program=("tests/killing.py", "save", "5"))
    # It returns when the last process has closed its standard error.
    done = subprocess.run(run, cwd=folder, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == -9, done.stderr
    return folder / "run"


@pytest.fixture(scope="module")
def runs(tmp_path_factory, train_here, killed, pairs_folder):
    """The folder of the runs that one pair of processes makes one after another, and their single twins."""
    folder = tmp_path_factory.mktemp("ddp")
    shutil.copytree(pairs_folder, folder / "bad")
    (folder / "bad" / "images" / "000003.png").write_bytes(b"")
    tiny_stable_diffusion(folder / "diffusion")
    tiny_captioner(folder / "blip")
    cache = f"cache_dir={folder / 'cache'}"
    options = {name: [one.replace("HERE", str(folder)) for one in (*own, cache)] for name, own in ALIKE.items()}
    # As each of two processes has on two cores; two threads that wait for each other crawl where others work too.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name, own in options.items():
        train_here(folder / "one" / name, *own)
        if name == "cosine":
            found, start = load_file(folder / "one" / name / "checkpoints" / "finetune.safetensors"), "encoder.model."
            weights = {key.removeprefix(start): value for key, value in found.items() if key.startswith(start)}
            save_file(weights, folder / "encoder.safetensors")
    with others(2):
        for name, own in options.items():
            train_here(folder / "two" / name, *own, "trainer.devices=2")
        train_here(folder / "two" / "whole", *EVERYTHING, EACH, "trainer.devices=2")
        train_here(killed, *EVERYTHING, EACH, MID_EPOCH, "trainer.devices=2")
    torch.set_num_threads(threads)
    return folder


@pytest.mark.parametrize("name", ALIKE)
def test_losses_and_scores_equal_those_of_one_process(name, runs):
    one, both = (read_csv(runs / number / name / "metrics.csv") for number in ("one", "two"))
    assert len(one) == len(both) >= 8
    for first, second in zip(one, both, strict=True):
        assert first.keys() == second.keys()
        for key in first:
            assert (first[key] == "") == (second[key] == "")
            assert abs(float(first[key] or 0) - float(second[key] or 0)) < 1e-5, key
    ladders = [read_csv(runs / number / name / "ladder.csv") for number in ("one", "two")]
    for first, second in zip(*ladders, strict=True):
        assert abs(float(first["val_cosine"] or 0) - float(second["val_cosine"] or 0)) < 1e-5


def test_both_leave_the_same_files(runs):
    for name in ALIKE:
        one, both = (
            {path.relative_to(at) for path in at.rglob("*")} for at in (runs / "one" / name, runs / "two" / name)
        )
        assert one == both


def test_a_killed_run_on_two_devices_goes_on_to_the_byte(runs, killed):
    assert kept(killed) == kept(runs / "two" / "whole")


@pytest.mark.slow
def test_a_sweep_on_two_devices_gives_every_job_one_folder(tmp_path, pairs_folder, runs):
    run = command(pairs_folder, "seed=0,1", "name=s", "trainer.devices=2", program=("train.py", "-m"))
    done = subprocess.run(run, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and done.stdout.count("predict with it") == 2, done.stderr
    check_sweep(tmp_path, runs)


def check_sweep(folder, runs):
    (sweep,) = (folder / "runs" / "s").iterdir()
    assert sorted(path.name for path in sweep.iterdir()) == ["0", "1", "multirun.yaml"]
    seeds = [(sweep / job / "metrics.csv").read_bytes() for job in ("0", "1")]
    assert seeds[0] == (runs / "two" / "cosine" / "metrics.csv").read_bytes() != seeds[1]


def test_a_number_that_is_not_finite_on_one_device_skips_the_step_on_both(tmp_path, pairs_folder):
    codes, errors, outs = ended(two(pairs_folder, tmp_path, "nan", "run_dir=run"))
    assert codes == [0, 0], errors
    assert "step 2 skipped, its loss or gradients were not finite" in errors[0] and errors[1] == outs[1] == ""
    assert read_state(tmp_path / "run" / "checkpoints")["skipped"] == [2]
    weights = [(tmp_path / f"weights{rank}.txt").read_text().splitlines() for rank in (0, 1)]
    assert weights[0] == weights[1] and len(weights[0]) == 8
    assert [before == after for before, after in zip(weights[0], weights[0][1:], strict=False)] == [
        number == 2 for number in range(1, 8)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_process_saves_and_ends_both_with_its_code(rank, tmp_path, pairs_folder):
    started = two(pairs_folder, tmp_path, "none", "run_dir=run", "trainer.max_epochs=3000")
    wait_for_a_state(tmp_path / "run")
    started[rank].send_signal(signal.SIGTERM)
    codes, errors, _ = ended(started)
    assert codes == [143, 143] and errors[1] == "" and "Traceback" not in errors[0]
    step = read_state(tmp_path / "run" / "checkpoints")["step"]
    assert f"saved at step {step} of 6000" in errors[0] and not (tmp_path / "run" / "lock").exists()
    weights = [(tmp_path / f"weights{rank}.txt").read_text().splitlines() for rank in (0, 1)]
    assert weights[0] == weights[1] and len(weights[0]) == step


def wait_for_a_state(run):
    for _ in range(600):
        if (run / "checkpoints" / "last.ckpt").is_file():
            return
        time.sleep(0.1)
    raise AssertionError("no state was written")


@pytest.mark.slow
def test_a_process_that_fails_ends_all_and_says_why(tmp_path, pairs_folder):
    codes, errors, _ = ended(two(pairs_folder, tmp_path, "broken", "run_dir=run"))
    assert codes == [1, 1] and "Traceback" not in "".join(errors)
    assert errors[1] == "train: device 1: no disk was found under the sea\n"
    assert "train: another process of this run is gone" in errors[0]


@pytest.mark.slow
def test_a_process_that_is_killed_ends_all_with_a_sentence(tmp_path, pairs_folder):
    run = command(pairs_folder, "trainer.devices=2", "run_dir=run", "trainer.max_epochs=3000")
    process = subprocess.Popen(run, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True)
    wait_for_a_state(tmp_path / "run")
    (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(child), signal.SIGKILL)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and "Traceback" not in error
    assert "train: the process of device 1 was killed by SIGKILL, and the run ends with it" in error
    assert not (tmp_path / "run" / "lock").exists()


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_processes_that_were_started_end_with_the_one_that_started_them(end, tmp_path, pairs_folder):
    run = command(pairs_folder, "trainer.devices=2", "run_dir=run", "trainer.max_epochs=3000")
    process = subprocess.Popen(run, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True)
    wait_for_a_state(tmp_path / "run")
    process.send_signal(end)
    # Their standard error is the same pipe.
    process.communicate(timeout=60)
    assert process.returncode == (143 if end == signal.SIGTERM else -9)


@pytest.mark.slow
def test_a_run_that_fails_early_fails_once_and_leaves_no_folder(tmp_path, pairs_folder):
    run = command(pairs_folder, "trainer.devices=2", "data.max_bad_fraction=0", "data.root=.", "name=x")
    done = subprocess.run(run, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.count("train:") == 1 and "prompts.csv" in done.stderr
    assert not (tmp_path / "runs" / "x").exists()


@pytest.mark.slow
def test_torchrun_gives_the_same_run_and_the_same_sweep(tmp_path, pairs_folder, runs):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    for program, *arguments in (
        (("train.py",), "run_dir=run"),
        (("train.py",), "run_dir=dry", "dry_run=true"),
        (("train.py", "-m"), "seed=0,1", "name=s"),
    ):
        run = [*launcher, *command(pairs_folder, *arguments, program=program)[1:]]
        done = subprocess.run(run, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
    assert kept(tmp_path / "run") == kept(runs / "two" / "cosine") and not (tmp_path / "dry").exists()
    check_sweep(tmp_path, runs)
    # A run keeps its number of devices.
    (tmp_path / "run" / "summary.json").unlink()
    three = [*launcher[:-1], "3", *command(pairs_folder)[1:2], "resume=run"]
    done = subprocess.run(three, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 1
    assert "trainer.devices=2, but torchrun started 3 processes; start as many" in done.stderr


@pytest.mark.slow
def test_parameters_that_the_loss_does_not_reach_hold_nobody_up(tmp_path, pairs_folder):
    codes, errors, _ = ended(two(pairs_folder, tmp_path, "unused", "run_dir=run", "stages.probe=null"))
    assert codes == [0, 0], errors
    assert len((tmp_path / "weights1.txt").read_text().splitlines()) == 8


@pytest.mark.slow
def test_batchnorm_learns_on_two_devices_and_is_the_first_ones(tmp_path, pairs_folder):
    model = ("encoder.name=test_resnet", "~encoder.model_kwargs.patch_size", "run_dir=run")
    codes, errors, _ = ended(two(pairs_folder, tmp_path, "none", *model))
    assert codes == [0, 0], errors
    best = load_file(tmp_path / "run" / "checkpoints" / "finetune.safetensors")
    statistics = [value for key, value in best.items() if "running_mean" in key]
    assert statistics and all(value.isfinite().all() and value.any() for value in statistics)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (("trainer.devices=3",), "data.batch_size=8 cannot be divided among trainer.devices=3"),
        (("trainer.devices=0",), "trainer.devices must be at least 1, got 0"),
        (("trainer.devices=2", "trainer.accelerator=mps"), "mps"),
    ],
)
def test_numbers_of_devices_that_cannot_be_are_refused(overrides, sentence, tmp_path, train_here):
    with pytest.raises((ValueError, RuntimeError), match=sentence):
        train_here(tmp_path / "run", *overrides)


def test_what_no_step_changes_is_not_sent_between_ranks(runs):
    regressor = load_regressor(runs / "one" / "white box" / "checkpoints" / "finetune.safetensors")
    module = torch.nn.Sequential(regressor, torch.nn.BatchNorm1d(4))
    statistics = {f"1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert {name for name, _ in module.named_buffers()} - set(still_buffers(module)) == statistics
    assert "0.encoder.vae.encoder.conv_in.weight" in still_buffers(module)


def test_alone_nothing_is_copied():
    tensor = torch.randn(3, 4)
    assert ranks.gathered(tensor) is tensor and ranks.from_first(tensor) is tensor
    assert ranks.means({"a": tensor})["a"] is tensor and ranks.largest(3, True) == (3, True)
    assert ranks.share_of(rows := torch.arange(4).numpy()) is rows and ranks.own("finetune") == "finetune"


def test_sources_can_be_told_to_another_process(tmp_path):
    from img2prompt.data.diffusiondb import DiffusionDB
    from img2prompt.data.folder import Folder
    from img2prompt.data.kaggle import Kaggle
    from img2prompt.data.shards import Shards

    for source in (DiffusionDB(tmp_path), Folder(tmp_path), Kaggle(tmp_path), Shards(str(tmp_path))):
        assert type(pickle.loads(pickle.dumps(source))) is type(source)
