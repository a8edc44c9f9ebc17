"""What an adversary found: each of these once lost data, ran code, or gave a wrong result in silence."""

import json
import os
import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import PREDICT, ROOT, settings_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from img2prompt import load
from img2prompt.bank import write_bank
from img2prompt.commands import predict as command
from img2prompt.commands.settings import compose
from img2prompt.data import targets
from img2prompt.data.kaggle import Kaggle, read_prompts
from img2prompt.predictions import Parts
from img2prompt.regressor import load_regressor
from img2prompt.training.checkpoint import read_state
from img2prompt.training.resume import continued


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "${oc.create:{_target_:builtins.print,_args_:['x']}}"},
        {"secret": "${oc.env:HOME}"},
        {"_partial_": True},
        {"_args_": ["x"]},
        {"_target_": "builtins.print"},
    ],
)
def test_a_resumed_config_cannot_smuggle_in_interpolations_or_instructions(change, unfinished):
    saved = yaml.safe_load((unfinished / "config.yaml").read_text())
    saved["data"]["source"] |= change
    (unfinished / "config.yaml").write_text(yaml.safe_dump(saved))
    with pytest.raises(ValueError, match="refused"):
        continued(unfinished, settings_of(), [], ROOT / "conf")


def test_a_resumed_config_does_not_choose_the_logger_and_must_be_whole(unfinished):
    saved = yaml.safe_load((unfinished / "config.yaml").read_text())
    saved["logger"] = {"wandb": {"_target_": "lightning.pytorch.loggers.WandbLogger", "project": "theirs"}}
    (unfinished / "config.yaml").write_text(yaml.safe_dump(saved))
    assert continued(unfinished, settings_of(), [], ROOT / "conf")["logger"] == {}
    (unfinished / "config.yaml").write_text("seed: 0\n")
    with pytest.raises(ValueError, match="config.yaml: damaged, or of another version: it lacks"):
        continued(unfinished, settings_of(), [], ROOT / "conf")
    del saved["trainer"]["max_time"], saved["data"]["threads"]
    (unfinished / "config.yaml").write_text(yaml.safe_dump(saved))
    with pytest.raises(ValueError, match="it lacks data.threads, trainer.max_time; start a new run"):
        continued(unfinished, settings_of("trainer.max_time=00:01:00:00"), ["trainer.max_time=x"], ROOT / "conf")


@pytest.mark.parametrize(
    ("encoder", "dimension"),
    [
        ({"_target_": "img2prompt.encoders.huggingface.HuggingFace", "name": "someone/beacon"}, 8),
        ({"_target_": "img2prompt.encoders.blind.Blind"}, -1),
        ({"_target_": "img2prompt.encoders.blind.Blind"}, 10**13),
        ({"_target_": "img2prompt.encoders.timm_model.Timm", "name": "test_vit", "model_kwargs": {"num_heads": 7}}, 8),
    ],
)
def test_a_header_neither_asks_the_network_nor_gives_a_traceback(encoder, dimension, tmp_path):
    header = {
        "format_version": 1,
        "kind": "regressor",
        "encoder": encoder,
        "head": {"_target_": "img2prompt.heads.Linear"},
        "target": {"model": "x", "revision": None, "dimension": dimension},
        "scores": {},
    }
    save_file({"target_mean": torch.zeros(1)}, tmp_path / "m.safetensors", metadata={"img2prompt": json.dumps(header)})
    with pytest.raises(ValueError, match="its header cannot be built"):
        load_regressor(tmp_path / "m.safetensors")


def test_a_folder_in_the_way_of_the_parts_is_never_removed(tmp_path):
    (tmp_path / "p.parquet.parts").mkdir()
    (tmp_path / "p.parquet.parts" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="not ours to remove"):
        Parts(tmp_path / "p.parquet", {"a": 1}, 1)
    assert (tmp_path / "p.parquet.parts" / "thesis.txt").read_text() == "mine"


def test_results_never_replace_what_they_are_made_from(tmp_path, finished_run, pairs_folder):
    shutil.copy(pairs_folder / "prompts.csv", tmp_path / "p.csv")
    options = {**PREDICT, "prompts": str(tmp_path / "p.csv")}
    with pytest.raises(ValueError, match="would replace what it is made from"):
        command.predict(str(finished_run), str(pairs_folder / "images"), str(tmp_path / "p.csv"), **options)
    (tmp_path / "d.parquet").mkdir()
    with pytest.raises(ValueError, match="a folder; give a file name"):
        command.predict(str(finished_run), str(pairs_folder / "images"), str(tmp_path / "d.parquet"), **PREDICT)
    assert (tmp_path / "p.csv").read_bytes() == (pairs_folder / "prompts.csv").read_bytes()


def test_file_names_that_are_no_utf8_are_predicted(tmp_path, finished_run, pairs_folder):
    image = next((pairs_folder / "images").iterdir()).read_bytes()
    folder = tmp_path / "pictures"
    folder.mkdir()
    with open(os.fsencode(folder) + b"/\xff\xe9.png", "wb") as file:
        file.write(image)
    with open(os.fsencode(folder) + b"/\xfe.png", "wb") as file:
        file.write(b"bad")
    command.predict(str(finished_run), str(folder), str(tmp_path / "p.jsonl"), **PREDICT)
    (row,) = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert row["id"] == r"\xff\xe9"
    assert r"\xfe.png" in (tmp_path / "p.jsonl.skipped.csv").read_text()


def test_a_probe_is_never_climbed_again_on_an_encoder_without_its_weights(tmp_path, train_here, finished_run):
    start = "encoder.model."
    whole = load_file(finished_run / "checkpoints" / "finetune.safetensors")
    weights = {key.removeprefix(start): value for key, value in whole.items() if key.startswith(start)}
    save_file(weights, tmp_path / "w.safetensors")
    own = (f"encoder.pretrained={tmp_path / 'w.safetensors'}", "trainer.max_epochs=0")
    train_here(tmp_path / "run", *own)
    before = load_file(tmp_path / "run" / "checkpoints" / "probe.safetensors")
    # As a kill between the checkpoint and its row leaves it.
    (tmp_path / "run" / "summary.json").unlink()
    ladder = (tmp_path / "run" / "ladder.csv").read_text().splitlines(keepends=True)
    (tmp_path / "run" / "ladder.csv").write_text("".join(ladder[:3]))
    train_here(tmp_path / "run", *own)
    after = load_file(tmp_path / "run" / "checkpoints" / "probe.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_diverged_fine_tune_keeps_what_was_good(tmp_path, train_here):
    with pytest.raises(ValueError, match="not finite after step .*lower optim.lr"):
        train_here(tmp_path / "run", "optim.lr=1e30", "trainer.gradient_clip_norm=null")
    best = load_file(tmp_path / "run" / "checkpoints" / "best.safetensors")
    assert all(value.isfinite().all() for value in best.values())


def test_two_images_of_one_name_are_skipped_because_one_label_would_be_wrong(tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("1.jpg", "1.png", "2.png"):
        (tmp_path / "images" / name).write_bytes(b"x")
    (tmp_path / "prompts.csv").write_text("imgId,prompt\n1,a\n2,b\n")
    found = Kaggle(tmp_path).find()
    assert [sample.id for sample in found.samples] == ["2"]
    assert found.skipped == [("1", "several files of this name in images/")]


@pytest.mark.parametrize(
    ("name", "argument", "sentence"),
    [
        ("predict", "batch_size=abc", "batch_size=abc: must be a whole number"),
        ("predict", "top_k=1.5", "top_k=1.5: must be a whole number"),
        ("train", "data.batch_size=abc", "data.batch_size=abc: must be a whole number"),
        ("train", "optim.weight_decay=abc", "optim.weight_decay=abc: must be a number"),
        ("train", "optim.lr=fast", "optim.lr=fast: must be a number or null"),
        ("train", "optim.lr=nan", "optim.lr=nan: must be a number or null"),
        ("train", "trainer.max_epochs=1.5", "trainer.max_epochs=1.5: must be a whole number or null"),
        ("train", "trainer.max_time=5", "trainer.max_time=5: must be text or null"),
        ("train", "stages.finetune.epochs_scratch=x", "stages.finetune.epochs_scratch=x: must be a whole number"),
        ("train", "augment.flip=x", "augment.flip=x: must be a number"),
        ("train", "target.model=null", "target.model=None: must be text"),
        ("train", "encoder.pretrained=null", "encoder.pretrained=None: must be true or false or text"),
        ("train", "dry_run=maybe", "dry_run=maybe: must be true or false"),
        ("train", "optim.betas=0.9", "optim.betas=0.9: must be a [list]"),
        ("train", "+stages.finetun=null", "stages.finetun: no such key; did you mean finetune?"),
        ("synthesize", "generator.steps=2.5", "generator.steps=2.5: must be a whole number or null"),
        ("synthesize", "generator.guidance=high", "generator.guidance=high: must be a number or a [list] or null"),
        ("merge", "ckpts=null", "ckpts=None: must be text or a [list]"),
        ("merge", "out=5", "out=5: must be text or null"),
        ("fit", "source=null", "source=None: must be text or a [list]"),
        ("fit", "refiner.centroids=1.5", "refiner.centroids=1.5: must be a whole number"),
        ("fit", "refiner.fitted=maybe", "refiner.fitted=maybe: must be true or false"),
        ("train", "+trainer.accumulate=4", "trainer.accumulate: no such key"),
        ("train", "+data.batchsize=4", "data.batchsize: no such key; did you mean batch_size?"),
    ],
)
def test_values_of_the_wrong_type_and_keys_of_nobody_are_named(name, argument, sentence):
    needed = {"predict": ["ckpt=x", "images=y"], "merge": ["ckpts=x"], "synthesize": ["prompts=x", "out=y"]}
    needed["fit"] = ["source=x", "prompts=x", "apply_to=x"]
    if argument.startswith("refiner.centroids"):
        needed["fit"].append("refiner=dakl")
    given = needed.get(name, []) + [argument]
    with pytest.raises(ValueError, match=re.escape(sentence)):
        from img2prompt.commands.settings import checked

        checked(name, compose(name, given))


def test_prompts_of_other_images_are_named_before_the_first_prediction(tmp_path, finished_run, pairs_folder):
    for content in ("imgId,prompt\n", "imgId,prompt\nother,x\n", "imgId,prompt\n000001,\n"):
        (tmp_path / "p.csv").write_text(content)
        options = {**PREDICT, "prompts": str(tmp_path / "p.csv")}
        with pytest.raises(ValueError, match="p.csv: none of its [01] imgIds .* is the id of an image .first: 000000"):
            command.predict(str(finished_run), str(pairs_folder / "images"), str(tmp_path / "o.npz"), **options)
    assert os.listdir(tmp_path) == ["p.csv"]


def test_a_resumed_run_refuses_other_data(tmp_path, train_here, unfinished, pairs_folder):
    root = tmp_path / "pairs"
    shutil.copytree(pairs_folder, root)
    text = (root / "prompts.csv").read_text()
    for changed in (text + "000000x,one more\n", text.replace("a ", "the ", 1)):
        (root / "prompts.csv").write_text(changed)
        shutil.copy(next((root / "images").iterdir()), root / "images" / "000000x.png")
        with pytest.raises(ValueError, match="its data have changed: 40 pairs then, 4[01] now"):
            train_here(unfinished, f"data.root={root}")
    (unfinished / "data.json").write_text("[]")
    with pytest.raises(ValueError, match="damaged"):
        train_here(unfinished)


def test_a_state_that_is_none_is_damaged(tmp_path):
    for state in ({"stage": "finetune"}, [1], None):
        torch.save(state, tmp_path / "last.ckpt")
        with pytest.raises(ValueError, match="damaged training state .not what a stage writes"):
            read_state(tmp_path)


def test_a_model_that_predicts_nothing_finite_writes_nothing(tmp_path, finished_run, pairs_folder):
    weights = load_file(finished_run / "checkpoints" / "finetune.safetensors")
    weights["head.bias"][0] = torch.nan
    with safe_open(finished_run / "checkpoints" / "finetune.safetensors", "pt") as file:
        save_file(weights, tmp_path / "m.safetensors", file.metadata())
    with pytest.raises(ValueError, match="head.bias holds values that are not finite"):
        command.predict(str(tmp_path / "m.safetensors"), str(pairs_folder), str(tmp_path / "o.npz"), **PREDICT)
    assert not (tmp_path / "o.npz").exists()


def test_a_bank_of_another_run_or_kind_is_named(tmp_path, finished_run):
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    write_bank(run / "bank.parquet", ["x"], np.ones((1, 8), np.float32))
    with pytest.raises(ValueError, match="embeddings of 8 numbers, .* predicts 384; it belongs to another run"):
        load(run)
    pq.write_table(pa.table({"prompt": [1], "embedding": [[1.0]]}), run / "bank.parquet")
    with pytest.raises(ValueError, match="not a bank of prompts .its columns are int64"):
        load(run)


def test_a_text_encoder_that_is_missing_is_named_before_the_first_prediction(
    tmp_path, finished_run, pairs_folder, monkeypatch
):
    monkeypatch.setattr(targets, "_PACKAGE_SHA256", "0" * 64)
    monkeypatch.setattr(command, "predict_files", None)
    options = {**PREDICT, "prompts": str(pairs_folder / "prompts.csv")}
    with pytest.raises(ValueError, match="target.model=.*not found as a folder"):
        command.predict(str(finished_run), str(pairs_folder / "images"), str(tmp_path / "o.npz"), **options)
    assert not os.listdir(tmp_path)


def test_batches_of_one_image_do_not_go_with_batchnorm(tmp_path, train_here):
    with pytest.raises(ValueError, match="BatchNorm cannot learn from batches of one image"):
        train_here(
            tmp_path / "run", "encoder.name=test_resnet", "~encoder.model_kwargs.patch_size", "data.batch_size=1"
        )


def test_two_jobs_do_not_write_one_file(tmp_path):
    first = Parts(tmp_path / "p.npz", {"a": 1}, 1)
    with pytest.raises(ValueError, match="another job is writing .*p.npz"):
        Parts(tmp_path / "p.npz", {"a": 2}, 1)
    first.remove()
    Parts(tmp_path / "p.npz", {"a": 2}, 1).remove()
    assert not os.listdir(tmp_path)


def test_what_a_killed_job_leaves_is_no_obstacle(tmp_path):
    folder = tmp_path / "p.npz.parts"
    folder.mkdir()
    (folder / ".000003.parquet.x.tmp").write_bytes(b"half")
    (folder / ".job.json.x.tmp").write_bytes(b"half")
    Parts(tmp_path / "p.npz", {"a": 1}, 1).remove()
    assert not os.listdir(tmp_path)


def test_a_submission_of_two_images_with_one_id_is_refused(tmp_path, finished_run, pairs_folder):
    image = next((pairs_folder / "images").iterdir()).read_bytes()
    for name in ("1.png", "1.jpg"):
        (tmp_path / name).write_bytes(image)
    with pytest.raises(ValueError, match="would have the same imgId"):
        command.predict(str(finished_run), str(tmp_path), str(tmp_path / "s.csv"), **PREDICT)
    assert sorted(os.listdir(tmp_path)) == ["1.jpg", "1.png"]


def test_an_unfinished_run_and_the_mean_are_said(tmp_path, unfinished, pairs_folder, capsys):
    images = str(pairs_folder / "images" / "000000.png")
    command.predict(str(unfinished), images, str(tmp_path / "o.npz"), **PREDICT)
    assert "is not finished" in capsys.readouterr().err
    mean = str(unfinished / "checkpoints" / "mean.safetensors")
    command.predict(mean, images, str(tmp_path / "m.npz"), **PREDICT)
    said = capsys.readouterr()
    assert "every image gets the same embedding" in said.err and "mean of no encoder, validation cosine" in said.out


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"format_version": 1, "kind": "regressor", "target": {"model": "x", "revision": null, "dimension": 1e999}}',
        '{"format_version": 1, "kind": "regressor", "target": {"model": "x", "revision": null, "dimension": "abc"}}',
    ],
)
def test_a_damaged_header_is_named(text, tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "m.safetensors", metadata={"img2prompt": text})
    with pytest.raises(ValueError, match="m.safetensors: its header is damaged"):
        load_regressor(tmp_path / "m.safetensors")


def test_weights_that_are_not_finite_are_refused(tmp_path, train_here, finished_run):
    start = "encoder.model."
    whole = load_file(finished_run / "checkpoints" / "finetune.safetensors")
    weights = {key.removeprefix(start): value for key, value in whole.items() if key.startswith(start)}
    weights["norm.weight"] = weights["norm.weight"] * torch.nan
    save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="w.safetensors: norm.weight holds values that are not finite"):
        train_here(tmp_path / "run", f"encoder.pretrained={tmp_path / 'w.safetensors'}")


def test_a_checkpoint_beside_somebody_elses_bank_has_no_words(tmp_path, finished_run):
    (tmp_path / "moved").mkdir()
    shutil.copy(finished_run / "checkpoints" / "finetune.safetensors", tmp_path / "moved" / "m.safetensors")
    shutil.copy(finished_run / "bank.parquet", tmp_path / "bank.parquet")
    assert load(tmp_path / "moved" / "m.safetensors").bank is None and load(finished_run).bank is not None


def test_a_column_that_comes_twice_is_an_error_and_a_space_before_a_quote_is_none(tmp_path):
    (tmp_path / "p.csv").write_text("imgId,prompt,prompt\n1,right,wrong\n")
    with pytest.raises(ValueError, match="a column comes twice"):
        read_prompts(tmp_path / "p.csv")
    (tmp_path / "p.csv").write_text('imgId, prompt\n1, "a cat, a dog"\n')
    assert read_prompts(tmp_path / "p.csv") == [("1", "a cat, a dog")]
