"""The doors, run as a user runs them: in a process of their own, with no connection to be had."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import QUICK, ROOT, TINY, read_csv
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from img2prompt.commands.arguments import quoted_paths
from img2prompt.commands.settings import compose
from img2prompt.submission import validate_submission
from img2prompt.training.checkpoint import read_state


@pytest.mark.parametrize("command", ["train.py", "predict.py"])
def test_help_is_quick_and_imports_no_torch(command, door, tmp_path):
    done = door(command, "--help", cwd=tmp_path, PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0 and "key=value" in done.stdout
    assert "torch" not in done.stderr and "hydra" not in done.stderr


def test_train_and_predict_end_to_end_on_drawn_pairs(door, tmp_path):
    tiny = [*TINY, "data.count=60", "trainer.max_epochs=1", "trainer.accelerator=cpu"]
    done = door("train.py", *tiny, "run_dir=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for words in ("60 found, 60 used", "never seen in training", "val cosine", "predict with it:"):
        assert words in done.stdout
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["train_pairs"] > 0
    command = done.stdout.rpartition("python ")[2].split()
    done = door(*command, "out=run/p.parquet", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "mean cosine" in done.stdout and "constant mean of the training targets" in done.stdout
    assert "nearest training prompts:" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


STRANGE = [
    "epoch=3",
    "out (1)",
    "été",
    "a,b",
    "日本語",
    "a&b",
    "it's",
    "a#b",
    "[x]",
    "{y}",
    "$HOME",
    "${z}",
    "a:b",
    'q"q',
    " s ",
]


def test_any_path_works_on_the_command_line(door, tmp_path, finished_run, pairs_folder):
    image = next((pairs_folder / "images").iterdir())
    for name in STRANGE:
        (tmp_path / f"{name}.png").write_bytes(image.read_bytes())
    shutil.copytree(finished_run, tmp_path / "run=1, (best) [é]")
    names = [f"{name}.png" for name in STRANGE]
    listed = ",".join(f"'{name}'" if '"' in name else f'"{name}"' for name in names)
    done = door(
        "predict.py", "ckpt=run=1, (best) [é]", f"images=[{listed}]", "out=o=1 (é).jsonl", "device=cpu", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "o=1 (é).jsonl").read_text().splitlines()]
    assert [row["path"] for row in rows] == names


@given(st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=12))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_quoted_path_comes_back_as_it_was_typed(text):
    if text.lower() == "null" or text[0] in "~[" or text[-1] in "]" or text[0] in "'\"":
        return
    argument = quoted_paths([f"images={text}", "ckpt=x"])
    assert compose("predict", argument)["images"] == text


def test_lists_sweeps_and_home_are_read_as_documented(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert quoted_paths(["images=[a b.png, 'c,d.png']"]) == ["images=['a b.png','c,d.png']"]
    assert quoted_paths(["images=a,b"]) == ["images='a,b'"]
    assert quoted_paths(["-m", "data.root=a,b"]) == ["-m", "data.root='a','b'"]
    assert quoted_paths(["images=~/x"]) == [f"images='{tmp_path}/x'"] and quoted_paths(["images=a~"]) == ["images='a~'"]
    (tmp_path / "a,b").mkdir()
    (tmp_path / "[x]").mkdir()
    assert quoted_paths(["-m", "data.root=a,b"]) == ["-m", "data.root='a,b'"]
    assert quoted_paths(["images=[x]"]) == ["images='[x]'"]
    assert quoted_paths(["resume=null", "encoder.pretrained=true", "seed=1,2"]) == [
        "resume=null",
        "encoder.pretrained=true",
        "seed=1,2",
    ]
    assert quoted_paths(["-m", "encoder.pretrained=true,w.pt"]) == ["-m", "encoder.pretrained=true,'w.pt'"]
    for name in ("null", "true"):
        (tmp_path / name).mkdir()
    assert quoted_paths(["images=null", "data.root=true"]) == ["images='null'", "data.root='true'"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["train.py", "data.bacth_size=3"], "data.bacth_size: no such key; did you mean data.batch_size?"),
        (["train.py", "batch_size=3"], "batch_size: no such key; did you mean data.batch_size?"),
        (["train.py", "+sed=3"], "sed: no such key; did you mean seed?"),
        (["train.py", "encoder=opnclip"], "encoder=opnclip: no such choice; did you mean openclip?"),
        (["train.py", "+experiment=vit_x"], "experiment=vit_x: no such choice; did you mean vit_"),
        (["train.py", "encoder.name=resnet10"], "encoder.name=resnet10: unknown to timm; did you mean resnet10t"),
        (["train.py", "data=kaggle"], "data=kaggle needs data.root=FOLDER"),
        (["train.py", "data.root=."], "data=demo reads no folder; add data=folder or data=kaggle"),
        (["train.py", "data=folder", "data.root=."], "1 of 1 images have no prompt"),
        (["train.py", "data=folder", "data.root=.", "data.on_missing=no"], "data.on_missing=no: must be error or skip"),
        (["train.py", "data=kaggle", "data.root=none"], "expects prompts.csv and images/"),
        (["train.py", "data.val=2", "data.count=20"], "data.val must be a fraction"),
        (["train.py", "data.count=1"], "data.count must be at least 2"),
        (["train.py", "trainer.devices=3"], "data.batch_size=32 cannot be divided among trainer.devices=3"),
        (["train.py", "trainer.precision=7"], "trainer.precision=7: must be one of"),
        (["train.py", "trainer.max_time=abc"], "trainer.max_time=abc: must be DD:HH:MM:SS"),
        (["train.py", "trainer.max_epochs=-1"], "stages.finetune.epochs must be at least 0, got -1"),
        (
            ["train.py", "trainer.gradient_clip_norm=-1"],
            "trainer.gradient_clip_norm must be at least 0, or null",
        ),
        (["train.py", "optim.lr=-1"], "optim.lr must be at least 0, got -1"),
        (["train.py", "optim.betas=[1,2]"], "optim.betas must be two numbers from 0 to below 1"),
        (["train.py", "optim.warmup_fraction=3"], "optim.warmup_fraction must be between 0 and 1"),
        (["train.py", "encoder.image_size_px=0"], "encoder.image_size_px must be at least 1"),
        (["train.py", "data.threads=0"], "data.threads must be at least 1"),
        (["train.py", "data.cache=tape"], "data.cache=tape: must be one of ram, disk, none"),
        (["train.py", "data.cache=disk"], "data.cache=disk: the demo's drawings are no files"),
        (["train.py", "data.duplicate_threshold=0"], "must be above 0 and at most 1, got 0"),
        (["train.py", "data.group_threshold=2"], "data.group_threshold must be above 0 and at most 1"),
        (
            ["train.py", "data.val={source:nothing,root:x}"],
            "data.val: no source nothing; choices: diffusiondb",
        ),
        (["train.py", "data=mixture"], "data=mixture needs data.sources="),
        (["train.py", "data.keep_split=nowhere"], "data.keep_split=nowhere: no run folder"),
        (["train.py", "experiment=vit_h"], "write +experiment=NAME"),
        (["train.py", "+target.revison=x"], "target.revison: no such key; did you mean revision?"),
        (
            ["train.py", "data=kaggle", "data.root=.", "+data.images_per_prompt=9"],
            "data.images_per_prompt: no such key",
        ),
        (["train.py", "trainer.accelerator=cuda:1"], "trainer.accelerator=cuda:1: must be one of"),
        (["train.py", "head.dropout=2"], "dropout probability has to be between 0 and 1"),
        (["train.py", "encoder.pretrained=none.pt"], "encoder.pretrained=none.pt: no such file"),
        (["train.py", "target.model=./none"], "target.model=./none: no such folder"),
        (["train.py", "resume=."], "not a run folder"),
        (["train.py", "-m", "seed=0,1", "resume=auto"], "resume=auto under -m needs run_dir=FOLDER"),
        (["predict.py", "ckp=x", "images=y"], "ckp: no such key; did you mean ckpt?"),
        (["predict.py", "images=y"], "ckpt must be given"),
        (["predict.py", "ckpt=none", "images=y"], "none: no such checkpoint"),
        (["predict.py", "ckpt=.", "images=y"], "it is not a run folder"),
        (["predict.py", "ckpt=RUN", "images=none"], "images=none: no such file or folder"),
        (["predict.py", "ckpt=RUN", "images=.", "out=x.txt"], "the ending must be one of .parquet, .npz, .jsonl, .csv"),
        (["predict.py", "ckpt=RUN", "images=.", "prompts=none.csv"], "none.csv: no such file"),
        (["predict.py", "ckpt=RUN/config.yaml", "images=."], "not a safetensors file"),
        (["predict.py", "ckpt=RUN", "images=empty"], "no image file there; endings: .png"),
        (["predict.py", "ckpt=RUN", "images=.", "batch_size=0"], "batch_size and threads must be at least 1"),
    ],
)
def test_a_mistake_gets_one_clear_sentence(arguments, sentence, tmp_path, finished_run, monkeypatch, capsys):
    from img2prompt.commands import door as module

    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.png").write_bytes(b"")
    monkeypatch.setattr(sys, "argv", arguments)
    command = arguments[0].removesuffix(".py")
    with pytest.raises(SystemExit) as stopped:
        module.main(command, [argument.replace("RUN", str(finished_run)) for argument in arguments[1:]])
    error = capsys.readouterr().err
    assert stopped.value.code == 1 and sentence in error and "Traceback" not in error


def test_bad_images_are_listed_and_the_others_predicted(door, tmp_path, finished_run, pairs_folder):
    folder = tmp_path / "pictures"
    folder.mkdir()
    image = sorted((pairs_folder / "images").iterdir())[0].read_bytes()
    (folder / "good.png").write_bytes(image)
    (folder / "truncated.png").write_bytes(image[:100])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "page.png").write_text("<html>")
    (folder / "notes.txt").write_text("hello")
    done = door("predict.py", f"ckpt={finished_run}", "images=pictures", "out=p.csv", "device=cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    reasons = {row["path"].split("/")[-1]: row["reason"] for row in read_csv(tmp_path / "p.csv.skipped.csv")}
    assert set(reasons) == {"truncated.png", "empty.jpg", "page.png", "notes.txt"}
    assert reasons["empty.jpg"] == "empty file" and "not an image by its name" in reasons["notes.txt"]
    # A submission needs every image: the unreadable ones get the mean embedding, and it says so.
    validate_submission(tmp_path / "p.csv", ["good", "truncated", "empty", "page"])
    assert "3 unreadable images get the mean embedding" in done.stderr
    assert sorted(path.name for path in folder.iterdir()) == [
        "empty.jpg",
        "good.png",
        "notes.txt",
        "page.png",
        "truncated.png",
    ]


@pytest.mark.slow
def test_standard_input_names_images_and_a_lone_checkpoint_has_no_words(door, tmp_path, finished_run, pairs_folder):
    shutil.copy(finished_run / "checkpoints" / "finetune.safetensors", tmp_path / "model.safetensors")
    images = sorted((pairs_folder / "images").iterdir())[:3]
    done = door(
        "predict.py",
        "ckpt=model.safetensors",
        "images=-",
        "device=cpu",
        cwd=tmp_path,
        stdin="\n".join(map(str, images)),
    )
    assert done.returncode == 0 and "nearest prompts are left out" in done.stderr
    table = pq.read_table(tmp_path / "predictions.parquet")
    assert table.column_names == ["id", "path", "embedding"] and table.num_rows == 3


def test_python_gives_what_the_command_writes(door, tmp_path, finished_run, pairs_folder):
    import img2prompt

    images = str(pairs_folder / "images")
    done = door("predict.py", f"ckpt={finished_run}", f"images={images}", "out=p.npz", "device=cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    predicted = img2prompt.load(finished_run, device="cpu").predict(images)
    with np.load(tmp_path / "p.npz") as file:
        assert file["ids"].tolist() == predicted.ids
        assert np.abs(file["embeddings"] - predicted.embeddings).max() < 1e-6


def test_a_sweep_gives_every_job_its_own_folder(door, tmp_path, pairs_folder):
    done = door("train.py", "-m", *QUICK, *TINY, f"data.root={pairs_folder}", "seed=0,1", "name=s", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    summaries = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("runs/s/*/*/summary.json"))]
    assert [summary["seed"] for summary in summaries] == [0, 1]


@pytest.mark.slow
def test_loggers_work_offline(door, tmp_path, pairs_folder):
    base = [*QUICK, *TINY, f"data.root={pairs_folder}"]
    done = door("train.py", *base, "logger=tensorboard", "run_dir=tb", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "tb").rglob("events.out.tfevents*"))
    done = door("train.py", *base, "logger=wandb", "run_dir=wb", cwd=tmp_path, WANDB_MODE="offline")
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "wb" / "wandb").rglob("*.wandb"))


@pytest.mark.slow
def test_a_killed_run_is_resumed_and_other_settings_are_refused(door, tmp_path, pairs_folder):
    base = [*QUICK, *TINY, f"data.root={pairs_folder}", "trainer.max_epochs=3"]
    done = door("train.py", *base, "run_dir=a", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    # As a kill before the end leaves it: no summary, and the ladder without its last rung.
    (tmp_path / "a" / "summary.json").unlink()
    ladder = (tmp_path / "a" / "ladder.csv").read_text().splitlines(keepends=True)
    (tmp_path / "a" / "ladder.csv").write_text("".join(ladder[:-1]))
    refused = door("train.py", "resume=a", "optim.lr=1", cwd=tmp_path)
    assert refused.returncode == 1 and "optim.lr is None in that run, not 1: a resumed run keeps" in refused.stderr
    done = door("train.py", "resume=a", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a" / "summary.json").is_file()
    done = door("train.py", "resume=a", cwd=tmp_path)
    assert done.returncode == 0 and "finished" in done.stdout


def test_a_foreign_class_in_a_resumed_config_is_refused(door, tmp_path, finished_run):
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    (run / "summary.json").unlink()
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("img2prompt.losses.Cosine", "pathlib.Path.touch"))
    done = door("train.py", "resume=run", cwd=tmp_path)
    assert done.returncode == 1 and "pathlib.Path.touch is not one of our classes" in done.stderr


OTHERS = [pytest.param(*one, marks=pytest.mark.slow) for one in ((signal.SIGINT, 130), (signal.SIGUSR1, 138))]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), *OTHERS])
def test_a_signal_saves_the_run_at_the_next_step_and_is_its_exit_code(number, code, tmp_path, pairs_folder):
    many = ["trainer.max_epochs=3000", f"data.root={pairs_folder}", "run_dir=run"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *QUICK, *TINY, *many], cwd=tmp_path, env=env, stderr=subprocess.PIPE
    )
    for _ in range(600):
        if (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file():
            break
        time.sleep(0.1)
    # A second process has no business in this folder.
    other = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "resume=run"], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert other.returncode == 1 and "another process is training in this folder" in other.stderr
    run.send_signal(number)
    error = run.communicate(timeout=60)[1].decode()
    assert run.returncode == code and "Traceback" not in error
    said = re.search(r"saved at step (\d+) of 6000; go on with resume=run", error)
    assert said and read_state(tmp_path / "run" / "checkpoints")["step"] == int(said[1])
    assert not (tmp_path / "run" / "summary.json").exists() and not (tmp_path / "run" / "lock").exists()


def test_a_default_run_asks_no_network_even_where_it_may(door, tmp_path, pairs_folder):
    log = tmp_path / "connections"
    environment = {"HF_HUB_OFFLINE": "", "TRANSFORMERS_OFFLINE": "", "CONNECTIONS": str(log)}
    done = door("train.py", *QUICK, *TINY, f"data.root={pairs_folder}", "run_dir=r", cwd=tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    options = ("ckpt=r", f"images={pairs_folder / 'images'}", f"prompts={pairs_folder / 'prompts.csv'}", "device=cpu")
    done = door("predict.py", *options, cwd=tmp_path, **environment)
    assert done.returncode == 0 and "mean cosine" in done.stdout, done.stderr
    assert not log.exists(), log.read_text()


def test_two_runs_of_one_second_have_each_their_folder(tmp_path, monkeypatch):
    from img2prompt.training.run_folder import new_run_folder

    monkeypatch.chdir(tmp_path)
    assert len({new_run_folder(None, "demo", make=True) for _ in range(5)}) == 5


@pytest.mark.slow
def test_a_sweep_with_its_own_folder_leaves_no_other(door, tmp_path, pairs_folder):
    done = door("train.py", "-m", *QUICK, *TINY, f"data.root={pairs_folder}", "seed=0,1", "run_dir=s", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "s").iterdir() if path.is_dir()) == ["0", "1"]
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_a_failed_plan_leaves_no_folder(door, tmp_path):
    done = door("train.py", "data=kaggle", "data.root=nowhere", cwd=tmp_path)
    assert done.returncode == 1 and not (tmp_path / "runs" / "kaggle").exists()


def test_help_shows_every_key(capsys):
    from img2prompt.commands.door import main
    from img2prompt.commands.settings import known_keys

    for command in ("train", "predict", "merge", "fit"):
        main(command, ["--help"])
        shown = capsys.readouterr().out
        keys = {key.rpartition(".")[2] for key in known_keys(command) if not key.startswith("hydra")}
        assert {key for key in keys if not key.startswith("_") and f"{key}:" not in shown} <= {
            "data",
            "target",
            "encoder",
            "head",
            "loss",
            "augment",
            "optim",
            "stages",
            "trainer",
            "logger",
            "refiner",
        }


def test_python_m_img2prompt_has_the_same_doors(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = [sys.executable, "-m", "img2prompt"]
    assert "train, predict" in subprocess.run(run, env=env, capture_output=True, text=True).stdout
    assert "ckpt:" in subprocess.run([*run, "predict", "--help"], env=env, capture_output=True, text=True).stdout
    wrong = subprocess.run([*run, "predit"], env=env, capture_output=True, text=True)
    assert wrong.returncode == 1 and "no such command" in wrong.stderr
