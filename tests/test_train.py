"""Training as a whole: it learns, it repeats itself to the bit, it goes on where it stopped."""

import json
import tarfile

import killing
import numpy as np
import pytest
import torch
import yaml
from conftest import QUICK, TINY, read_csv, settings_of
from safetensors.torch import load_file

from img2prompt.commands.train import train
from img2prompt.encoders.timm_model import Timm
from img2prompt.regressor import load_regressor, read_header
from img2prompt.training import callbacks
from img2prompt.training.run_folder import new_run_folder


def weights(folder, rung="finetune"):
    return load_file(folder / "checkpoints" / f"{rung}.safetensors")


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_the_training_loss_falls(tmp_path, train_here):
    train_here(tmp_path / "run", "trainer.max_epochs=15", "stages.finetune.log_every_n_steps=1", "optim.lr=1e-3")
    losses = [float(row["train/cosine"]) for row in read_csv(tmp_path / "run" / "metrics.csv")]
    assert np.mean(losses[-4:]) < 0.7 * np.mean(losses[:4])


def test_two_runs_of_one_seed_are_bit_equal_and_another_seed_is_not(tmp_path, train_here, finished_run):
    train_here(tmp_path / "same")
    train_here(tmp_path / "other", "seed=1")
    assert equal(weights(tmp_path / "same"), weights(finished_run))
    assert (tmp_path / "same" / "metrics.csv").read_bytes() == (finished_run / "metrics.csv").read_bytes()
    assert not equal(weights(tmp_path / "other"), weights(finished_run))


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, train_here, pairs_folder, monkeypatch):
    random_parts = ("head.dropout=0.3", "augment=crop", "augment.flip=0.5", "trainer.max_epochs=4")
    train_here(tmp_path / "whole", *random_parts)

    score = callbacks.Keep._score

    def stop_after_the_second_epoch(self, trainer, module, **options):
        score(self, trainer, module, **options)
        if module.step == 2 * self.data.steps_per_epoch:
            raise InterruptedError("stopped here")

    with monkeypatch.context() as patch:
        patch.setattr(callbacks.Keep, "_score", stop_after_the_second_epoch)
        with pytest.raises(InterruptedError):
            train_here(tmp_path / "halves", *random_parts)
    train_here(tmp_path / "halves", *random_parts)
    assert equal(weights(tmp_path / "halves"), weights(tmp_path / "whole"))
    assert (tmp_path / "halves" / "metrics.csv").read_bytes() == (tmp_path / "whole" / "metrics.csv").read_bytes()


def test_the_run_folder_holds_what_it_promises(finished_run):
    names = {
        "config.yaml",
        "data.json",
        "metrics.csv",
        "timings.csv",
        "ladder.csv",
        "summary.json",
        "bank.parquet",
        "checkpoints",
    }
    assert names <= {path.name for path in finished_run.iterdir()}
    summary = json.loads((finished_run / "summary.json").read_text())
    assert {"val_cosine", "mean_baseline", "checkpoint", "images_per_second", "seed"} <= summary.keys()
    rungs = {row["rung"]: row for row in read_csv(finished_run / "ladder.csv")}
    assert list(rungs) == ["mean", "text_only", "probe", "finetune"]
    assert "no pretrained weights" in rungs["text_only"]["note"]
    assert "no pretrained weights" in rungs["probe"]["note"] and rungs["probe"]["val_cosine"] == ""
    best = max(("mean", "finetune"), key=lambda rung: float(rungs[rung]["val_cosine"]))
    assert summary["val_cosine"] == pytest.approx(float(rungs[best]["val_cosine"]), abs=1e-6)
    assert equal(weights(finished_run, "best"), weights(finished_run, best))
    config = yaml.safe_load((finished_run / "config.yaml").read_text())
    assert config["data"]["batch_size"] == 8 and "torch" in config["versions"]


def test_prompts_never_cross_the_split(finished_run, pairs_folder):
    from img2prompt.bank import read_bank

    trained = set(read_bank(finished_run / "bank.parquet").prompts)
    every = {row["prompt"] for row in read_csv(pairs_folder / "prompts.csv")}
    summary = json.loads((finished_run / "summary.json").read_text())
    assert trained < every
    # Each prompt has two images: what validates is exactly the images of the prompts that are not in the bank.
    assert summary["val_pairs"] == 2 * len(every - trained)


def test_the_mean_rung_predicts_the_mean_training_target(finished_run):
    mean = load_regressor(finished_run / "checkpoints" / "mean.safetensors")
    images = torch.randint(0, 256, (3, 3, 1, 1), dtype=torch.uint8)
    expected = torch.nn.functional.normalize(mean.target_mean, dim=-1).expand(3, -1)
    assert torch.allclose(mean({"images": images}).embedding, expected, atol=1e-6)


@pytest.fixture(scope="module")
def pretrained_file(tmp_path_factory, finished_run):
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("weights") / "encoder.safetensors"
    start = "encoder.model."
    save_file({k.removeprefix(start): v for k, v in weights(finished_run).items() if k.startswith(start)}, path)
    return path


def test_the_probe_is_climbed_and_the_fine_tune_starts_from_it(tmp_path, train_here, pretrained_file):
    own = f"encoder.pretrained={pretrained_file}"
    train_here(tmp_path / "run", own, "optim.lr=0.0", "head.dropout=0.0")
    rungs = {row["rung"]: row for row in read_csv(tmp_path / "run" / "ladder.csv")}
    assert rungs["probe"]["note"] == "" and float(rungs["probe"]["val_cosine"]) > 0
    # With a learning rate of zero the fine-tune must end where it began: at the probe.
    probe, finetune = weights(tmp_path / "run", "probe"), weights(tmp_path / "run", "finetune")
    assert equal(probe, finetune)
    start = load_file(pretrained_file)
    assert all(torch.equal(probe[f"encoder.model.{key}"], start[key]) for key in start)


def test_blocks_of_a_pretrained_encoder_learn_slower_where_layer_decay_says_so(tmp_path, train_here, pretrained_file):
    own = (f"encoder.pretrained={pretrained_file}", "trainer.max_epochs=1")
    start = {f"encoder.model.{key}": value for key, value in load_file(pretrained_file).items()}
    moved = {}
    for name, decay in (("even", 1.0), ("decayed", 0.3)):
        train_here(tmp_path / name, *own, f"optim.layer_decay={decay}")
        after = weights(tmp_path / name)
        keys = ("encoder.model.patch_embed.proj.weight", "encoder.model.blocks.5.mlp.fc2.weight")
        moved[name] = [float((after[key] - start[key]).abs().mean()) for key in keys]
    # Two steps of Adam are as long as the learning rate, whatever the gradient: six blocks lie between the two.
    assert moved["decayed"][0] / moved["even"][0] == pytest.approx(0.3**6, rel=0.5)
    assert moved["decayed"][1] / moved["even"][1] == pytest.approx(1, rel=0.2)


def test_a_head_that_ridge_cannot_solve_descends_on_features_that_are_computed_once(
    tmp_path, train_here, pretrained_file, monkeypatch
):
    own = (f"encoder.pretrained={pretrained_file}", "head=mlp", "head.hidden=64", "optim.head_lr_factor=100")
    own = (*own, "loss=sigmoid", "stages.finetune=null")
    seen = []
    encode = Timm.encode
    monkeypatch.setattr(Timm, "encode", lambda self, pixels: (seen.append(len(pixels)), encode(self, pixels))[1])
    train_here(tmp_path / "whole", *own)
    # Each of the 40 images once, whatever the epochs, and the four that validate again to score the saved rung.
    assert sum(seen) <= 40 + 2 * 4
    rungs = {row["rung"]: row for row in read_csv(tmp_path / "whole" / "ladder.csv")}
    assert float(rungs["probe"]["val_cosine"]) > 0
    start, probe = load_file(pretrained_file), weights(tmp_path / "whole", "probe")
    assert all(torch.equal(probe[f"encoder.model.{key}"], start[key]) for key in start)
    rows = read_csv(tmp_path / "whole" / "metrics.csv")
    losses = [float(row["train/sigmoid"]) for row in rows if row["train/sigmoid"]]
    assert losses[-1] < losses[0]

    killing.arm("step", 13, killing.raise_killed, monkeypatch.setattr)
    with pytest.raises(killing.Killed):
        train_here(tmp_path / "halves", *own, "trainer.checkpoint_every_n_steps=5")
    monkeypatch.undo()
    train_here(tmp_path / "halves", *own, "trainer.checkpoint_every_n_steps=5")
    assert equal(weights(tmp_path / "halves", "probe"), probe)
    assert (tmp_path / "halves" / "metrics.csv").read_bytes() == (tmp_path / "whole" / "metrics.csv").read_bytes()


def test_init_from_starts_from_the_whole_regressor(tmp_path, train_here, finished_run):
    checkpoint = finished_run / "checkpoints" / "finetune.safetensors"
    train_here(tmp_path / "run", f"init_from={checkpoint}", "optim.lr=0.0")
    before, after = weights(finished_run), weights(tmp_path / "run")
    before.pop("target_mean"), after.pop("target_mean")
    assert equal(before, after)


def test_init_from_the_mean_is_refused_and_says_what_to_give(tmp_path, train_here, finished_run):
    with pytest.raises(ValueError, match="the mean rung, which has no encoder; give another, such as .*finetune"):
        train_here(tmp_path / "run", f"init_from={finished_run / 'checkpoints' / 'mean.safetensors'}", "dry_run=true")


def test_init_from_another_encoder_is_refused_by_name(tmp_path, train_here, finished_run):
    with pytest.raises(ValueError, match="init_from=.*its encoder has name=test_vit, this run's test_vit2"):
        checkpoint = finished_run / "checkpoints" / "finetune.safetensors"
        train_here(tmp_path / "run", f"init_from={checkpoint}", "encoder.name=test_vit2")


def test_init_from_goes_on_with_another_head_dropout_and_refuses_another_head(tmp_path, train_here, finished_run):
    checkpoint = f"init_from={finished_run / 'checkpoints' / 'finetune.safetensors'}"
    assert train_here(tmp_path / "run", checkpoint, "head.dropout=0.5", "encoder.resize_mode=squash") is not None
    with pytest.raises(ValueError, match="init_from=.*its head is img2prompt.heads.Linear; choose the same head"):
        train_here(tmp_path / "other", checkpoint, "head=mlp", "head.hidden=8")


def test_a_run_without_fine_tune_ends_at_the_mean_and_says_why(tmp_path, train_here):
    train_here(tmp_path / "run", "trainer.max_epochs=0")
    rungs = {row["rung"]: row for row in read_csv(tmp_path / "run" / "ladder.csv")}
    assert "no epochs" in rungs["finetune"]["note"]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["best_rung"] == "mean"


def test_pretrained_batchnorm_keeps_its_statistics_unless_told_otherwise(tmp_path, pairs_folder):
    base = (*QUICK, "encoder=timm", "encoder.name=test_resnet", "encoder.image_size_px=32", f"data.root={pairs_folder}")
    train(settings_of(*base, "encoder.pretrained=false", "trainer.max_epochs=1"), tmp_path / "scratch")
    source = tmp_path / "scratch" / "checkpoints" / "finetune.safetensors"
    train(settings_of(*base, f"init_from={source}", "trainer.max_epochs=1"), tmp_path / "frozen")
    free = "stages.finetune.frozen_batchnorm=false"
    train(settings_of(*base, f"init_from={source}", "trainer.max_epochs=1", free), tmp_path / "free")
    statistics = [key for key in load_file(source) if "running_mean" in key]
    assert statistics
    before, frozen, moved = load_file(source), weights(tmp_path / "frozen"), weights(tmp_path / "free")
    assert all(torch.equal(before[key], frozen[key]) for key in statistics)
    assert not any(torch.equal(before[key], moved[key]) for key in statistics)


@pytest.mark.parametrize(
    "option",
    [
        "data.seed=5",
        "data.val=0.4",
        "data.count=30",
        "data.batch_size=4",
        "data.duplicate_threshold=0.8",
        "data.max_words=14",
        "data.min_words=11",
        "data.max_clip_tokens=17",
        "target.precision=bf16",
        "head.dropout=0.5",
        "augment=crop",
        "augment=mild",
        "augment.flip=0.5",
        "augment.jitter=0.3",
        "augment.jpeg=0.5",
        "augment.erase=0.5",
        "augment.mixup=0.2",
        "optim.lr=1e-4",
        "optim.weight_decay=0.9",
        "optim.warmup_fraction=0.9",
        "optim.betas=[0.5,0.9]",
        "optim.ema_decay=0.5",
        "stages.finetune.unfrozen_blocks=2",
        "loss=angular",
        "loss=mse",
        "loss=huber",
        "loss=softmax",
        "loss=sigmoid",
        "loss=cosine_softmax",
        "head=mlp",
        "head=attention",
        "head.layers=2",
        "trainer.accumulate_grad_batches=2",
        "trainer.gradient_clip_norm=0.001",
        "trainer.max_epochs=1",
        "encoder.resize_mode=shortest",
        "encoder.image_size_px=40",
        "encoder.drop_path=0.3",
        "stages.finetune.patch_dropout=0.5",
        "stages.finetune.lr_factor=0.5",
        "stages.finetune.lora_rank=2",
    ],
)
def test_every_option_changes_the_trained_weights(option, tmp_path, train_here, finished_run, pairs_folder):
    wide = ()
    if option == "encoder.resize_mode=shortest":
        # On square images every mode is the same: half of the height is cut away first.
        wide = (f"data.root={halved(pairs_folder, tmp_path / 'wide')}",)
        train_here(tmp_path / "base", *wide)
    train_here(tmp_path / "run", option, *wide)
    base = tmp_path / "base" if wide else finished_run
    assert not equal(weights(tmp_path / "run"), weights(base))


def halved(pairs, goal):
    from PIL import Image

    (goal / "images").mkdir(parents=True)
    (goal / "prompts.csv").write_bytes((pairs / "prompts.csv").read_bytes())
    for path in (pairs / "images").iterdir():
        with Image.open(path) as image:
            image.crop((0, 0, image.width, image.height // 2)).save(goal / "images" / path.name)
    return goal


def test_a_cache_that_does_not_fit_changes_nothing(tmp_path, train_here, finished_run):
    cache = f"cache_dir={tmp_path / 'cache'}"
    options = {"none": ("data.cache=none",), "small": ("data.cache_gib=0",), "disk": ("data.cache=disk", cache)}
    for name, given in options.items():
        train_here(tmp_path / name, *given)
        assert equal(weights(tmp_path / name), weights(finished_run))
    assert list((tmp_path / "cache" / "pixels").rglob("*.rows"))


@pytest.mark.parametrize("cache", ["ram", "disk", "none"])
def test_a_bad_training_image_is_listed_and_the_run_goes_on(cache, tmp_path, pairs_folder):
    import shutil

    root = tmp_path / "pairs"
    shutil.copytree(pairs_folder, root)
    for number in range(8):
        (root / "images" / f"{number:06d}.png").write_bytes(b"not an image")
    overrides = (*QUICK, *TINY, f"data.root={root}", f"data.cache={cache}", f"cache_dir={tmp_path / 'cache'}")
    with pytest.raises(ValueError, match=r"8 of 40 are bad \(first: 000000: .*data\.max_bad_fraction=0\.1 allows"):
        train(settings_of(*overrides), tmp_path / "run")
    assert not (tmp_path / "run" / "config.yaml").exists()
    overrides += ("data.max_bad_fraction=0.2",)
    assert np.isfinite(train(settings_of(*overrides), tmp_path / "run"))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["train_pairs"] + summary["val_pairs"] == 32 and summary["bad_images"] == 8
    bad = read_csv(tmp_path / "run" / "bad_images.csv")
    assert [row["id"] for row in bad] == [f"{number:06d}" for number in range(8)]
    assert all("not an image" in row["reason"] for row in bad)
    assert bad[3]["path"] == str(root / "images" / "000003.png")


def test_bad_images_are_left_out_alike_whether_pixels_are_kept_or_not(tmp_path, pairs_folder):
    import shutil

    root = tmp_path / "pairs"
    shutil.copytree(pairs_folder, root)
    for number in (3, 9, 20):
        (root / "images" / f"{number:06d}.png").write_bytes(b"")
    for cache in ("ram", "none"):
        train(settings_of(*QUICK, *TINY, f"data.root={root}", f"data.cache={cache}"), tmp_path / cache)
    assert equal(weights(tmp_path / "ram"), weights(tmp_path / "none"))


def test_bf16_trains_with_clipping_and_differs_from_fp32(tmp_path, train_here, finished_run):
    train_here(tmp_path / "run", "trainer.precision=bf16-mixed")
    half, full = weights(tmp_path / "run"), weights(finished_run)
    assert not equal(half, full) and all(value.isfinite().all() for value in half.values())


def test_two_fine_tunes_are_two_rungs(tmp_path, train_here):
    second = "+stages.second={_target_:img2prompt.training.finetune.FineTune,epochs:3}"
    train_here(tmp_path / "run", second)
    rungs = {row["rung"]: row for row in read_csv(tmp_path / "run" / "ladder.csv")}
    assert list(rungs) == ["mean", "text_only", "probe", "finetune", "second"]
    headers = [read_header(tmp_path / "run" / "checkpoints" / f"{name}.safetensors") for name in ("finetune", "second")]
    assert [header.scores["rung"] for header in headers] == ["finetune", "second"]
    assert not equal(weights(tmp_path / "run"), weights(tmp_path / "run", "second"))


def test_a_run_that_its_time_stopped_is_resumed_to_the_same_weights(tmp_path, train_here, monkeypatch):
    train_here(tmp_path / "whole", "trainer.max_epochs=3", "head.dropout=0.3")
    step = callbacks.Log.on_train_batch_end

    def stop_in_the_second_epoch(self, trainer, module, *rest):
        step(self, trainer, module, *rest)
        trainer.should_stop = module.step == 3

    with monkeypatch.context() as patch:
        patch.setattr(callbacks.Log, "on_train_batch_end", stop_in_the_second_epoch)
        train_here(tmp_path / "halves", "trainer.max_epochs=3", "head.dropout=0.3")
    (row,) = [row for row in read_csv(tmp_path / "halves" / "ladder.csv") if row["rung"] == "finetune"]
    assert row["note"] == "stopped by trainer.max_time at step 3 of 6"
    assert json.loads((tmp_path / "halves" / "summary.json").read_text())["unfinished"] == row["note"]
    before = float(row["seconds"])
    train_here(tmp_path / "halves", "trainer.max_epochs=3", "head.dropout=0.3")
    (row,) = [row for row in read_csv(tmp_path / "halves" / "ladder.csv") if row["rung"] == "finetune"]
    assert row["note"] == "" and float(row["seconds"]) > before
    final = [torch.load(tmp_path / name / "checkpoints" / "last.ckpt")["regressor"] for name in ("whole", "halves")]
    assert equal(*final)


def test_resume_refuses_when_images_have_become_unreadable(tmp_path, train_here, pairs_folder, finished_run):
    import shutil

    root, run = tmp_path / "pairs", tmp_path / "run"
    shutil.copytree(pairs_folder, root)
    shutil.copytree(finished_run, run)
    (run / "summary.json").unlink()
    ladder = (run / "ladder.csv").read_text().splitlines(keepends=True)
    (run / "ladder.csv").write_text("".join(ladder[:-1]))
    for number in range(16):
        (root / "images" / f"{number:06d}.png").write_bytes(b"")
    with pytest.raises(ValueError, match="its images have changed; put them back"):
        train_here(run, f"data.root={root}", "data.max_bad_fraction=0.5")


def test_the_same_pairs_as_a_folder_of_captions_or_in_a_tar_train_to_the_same_weights(
    tmp_path, pairs_folder, finished_run
):
    for row in read_csv(pairs_folder / "prompts.csv"):
        image = pairs_folder / "images" / f"{row['imgId']}.png"
        # In other places and another order than the table's.
        goal = tmp_path / "pictures" / str(int(row["imgId"]) % 3) / image.name
        goal.parent.mkdir(parents=True, exist_ok=True)
        goal.write_bytes(image.read_bytes())
        goal.with_suffix(".txt").write_text(row["prompt"])
    with tarfile.open(tmp_path / "000.tar", "w") as tar:
        for path in sorted((tmp_path / "pictures").rglob("*.*"), reverse=True):
            tar.add(path, path.name)
    for source, root in (("folder", tmp_path / "pictures"), ("shards", tmp_path / "000.tar")):
        overrides = (*QUICK[1:], *TINY, f"data={source}", f"data.root={root}")
        train(settings_of(*overrides), tmp_path / source)
        assert equal(weights(tmp_path / source), weights(finished_run))


def test_cleaning_changes_what_is_trained_on(tmp_path, pairs_folder, capsys):
    for name in ("clean", "raw"):
        (tmp_path / name).mkdir()
        for row in read_csv(pairs_folder / "prompts.csv"):
            image = pairs_folder / "images" / f"{row['imgId']}.png"
            (tmp_path / name / image.name).write_bytes(image.read_bytes())
            prompt = row["prompt"] if name == "clean" else f"({row['prompt']}:1.2)  <lora:x:1>"
            (tmp_path / name / f"{image.stem}.txt").write_text(prompt)
    base = (*QUICK[1:], *TINY, "data=folder")
    train(settings_of(*base, f"data.root={tmp_path / 'clean'}"), tmp_path / "1")
    train(settings_of(*base, f"data.root={tmp_path / 'raw'}"), tmp_path / "2")
    assert "40 changed" in capsys.readouterr().out
    train(settings_of(*base, f"data.root={tmp_path / 'raw'}", "data.clean=false"), tmp_path / "3")
    assert equal(weights(tmp_path / "1"), weights(tmp_path / "2"))
    assert not equal(weights(tmp_path / "1"), weights(tmp_path / "3"))


def test_a_dry_run_writes_nothing(tmp_path, train_here, capsys):
    assert train_here(tmp_path / "run", "dry_run=true") is None
    assert not (tmp_path / "run").exists()
    out = capsys.readouterr().out
    for word in ("40 found, 40 used", "validation", "finetune (8 steps)", "downloads   none", "32 px"):
        assert word in out


def test_a_finished_run_is_left_as_it_is(finished_run, train_here, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished_run.rglob("*")}
    assert train_here(finished_run) is None
    assert {path: path.stat().st_mtime_ns for path in finished_run.rglob("*")} == before


def test_a_used_run_folder_is_refused_and_default_names_never_collide(tmp_path, monkeypatch):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="already holds something"):
        new_run_folder(str(tmp_path / "used"), "demo")
    monkeypatch.chdir(tmp_path)
    first = new_run_folder(None, "demo")
    first.mkdir(parents=True)
    assert new_run_folder(None, "demo") != first


def test_the_header_says_what_prediction_needs(finished_run):
    header = read_header(finished_run / "checkpoints" / "finetune.safetensors")
    assert header.target.model == "sentence-transformers/all-MiniLM-L6-v2" and header.target.dimension == 384
    assert header.encoder["image_size_px"] == 32 and len(header.encoder["mean"]) == 3
    assert header.scores["val_cosine"] > -1


def test_the_clock_stops_a_fine_tune_cleanly(tmp_path, train_here):
    train_here(tmp_path / "run", "trainer.max_time=00:00:00:03", "trainer.max_epochs=100000")
    assert 0 < len(read_csv(tmp_path / "run" / "metrics.csv")) < 100000
    assert (tmp_path / "run" / "summary.json").is_file()


@pytest.mark.slow
def test_the_demo_closes_half_of_the_gap_and_beats_the_nearest_prompt(tmp_path):
    train(settings_of(), tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["val_cosine"] > (1 + summary["mean_baseline"]) / 2
    assert summary["val_cosine"] > summary["nearest_prompt_baseline"] > summary["mean_baseline"]
