"""Composed prompts: found again where they are known, never worse than the bank, and a column like any other."""

import shutil

import numpy as np
import pytest
import torch
from conftest import PREDICT
from torch.nn import functional

from img2prompt.bank import Bank
from img2prompt.commands import composing
from img2prompt.commands import predict as command
from img2prompt.commands.composing import Composer
from img2prompt.compose import Modifiers, compose, modifiers_of, phrases_of
from img2prompt.data.targets import TextEncoder, locate
from img2prompt.predictions import FINDINGS, read_predictions

SUBJECTS = (
    "a red fox in the snow",
    "portrait of an old sailor",
    "a castle above the clouds",
    "a robot reading a newspaper",
    "two cats on a sofa",
    "a bowl of ripe cherries",
)
MODIFIERS = (
    "oil painting",
    "volumetric light",
    "black and white photograph",
    "by van gogh",
    "cyberpunk",
    "watercolor",
    "highly detailed",
    "pixel art",
)


@pytest.fixture(scope="module")
def encode():
    return TextEncoder(locate()).embed


def bank_of(prompts, encode):
    return Bank(prompts, torch.from_numpy(encode(prompts)))


def modifiers_in(bank, encode, texts=None):
    texts = modifiers_of(bank.prompts) if texts is None else texts
    return Modifiers(texts, torch.from_numpy(encode([*texts, "x"]))[:-1])


@pytest.fixture(scope="module")
def world(encode):
    """Each subject with three modifiers, and goals: true embeddings of other prompts, with some noise."""
    prompts = [
        f"{subject}, {', '.join(MODIFIERS[(3 * i + j) % 8] for j in range(3))}" for i, subject in enumerate(SUBJECTS)
    ]
    others = [f"{subject}, {MODIFIERS[i]}, {MODIFIERS[i + 2]}" for i, subject in enumerate(SUBJECTS)]
    noise = torch.randn(len(others), 384, generator=torch.Generator().manual_seed(0))
    goals = torch.from_numpy(encode(others)) + 0.5 * functional.normalize(noise, dim=1)
    bank = bank_of(prompts, encode)
    return bank, modifiers_in(bank, encode), functional.normalize(goals, dim=1)


@pytest.mark.parametrize(
    "prompt",
    [
        "a red fox in the snow, pixel art, by van gogh",
        "a castle above the clouds, cyberpunk, black and white photograph",
        "two cats on a sofa, watercolor",
    ],
)
def test_a_known_composition_is_recovered_from_its_true_embedding(prompt, world, encode):
    bank, modifiers, _ = world
    goal = torch.from_numpy(encode([prompt]))
    assert prompt not in bank.prompts
    found = compose(goal, bank, modifiers, encode)[0]
    assert set(phrases_of(found.prompt)) == set(phrases_of(prompt))
    assert found.cosine > 0.97 > bank.nearest(goal, 1)[1][0][0] + 0.02


def test_a_composed_prompt_is_never_worse_than_the_nearest_of_the_bank(world, encode):
    bank, modifiers, goals = world
    drawn = torch.randn(6, 384, generator=torch.Generator().manual_seed(1))
    goals = torch.cat([goals, bank.embeddings, functional.normalize(drawn, dim=1)])
    found = compose(goals, bank, modifiers, encode, beams=1)
    best = (goals @ bank.embeddings.T).amax(1)
    cosines = torch.tensor([one.cosine for one in found])
    assert (cosines >= best - 1e-5).all() and (cosines[:6] > best[:6] + 0.02).any()
    # The cosine is that of the prompt.
    again = (torch.from_numpy(encode([one.prompt for one in found])) * goals).sum(1)
    assert torch.allclose(again, cosines, atol=1e-5)


def test_a_prompt_is_the_same_alone_or_with_others_and_whatever_the_order_of_the_bank(world, encode):
    bank, modifiers, goals = world[0], world[1], world[2][:4]
    together = compose(goals, bank, modifiers, encode)
    for alone, one in zip((compose(goal[None], bank, modifiers, encode)[0] for goal in goals), together, strict=True):
        assert alone.prompt == one.prompt and alone.cosine == pytest.approx(one.cosine, abs=1e-5)
    order = torch.randperm(len(bank.prompts), generator=torch.Generator().manual_seed(0)).tolist()
    turned = Bank([bank.prompts[i] for i in order], bank.embeddings[order])
    assert modifiers_of(turned.prompts) == modifiers.texts
    again = compose(goals.flip(0), turned, modifiers, encode)[::-1]
    assert [one.prompt for one in again] == [one.prompt for one in together]


def test_more_beams_are_nearer_on_average(world, encode):
    bank, modifiers, goals = world
    mean = [np.mean([one.cosine for one in compose(goals, bank, modifiers, encode, beams)]) for beams in (1, 4)]
    assert mean[1] >= mean[0] - 1e-6


def test_each_text_of_a_round_is_embedded_once_and_all_images_together(world, encode):
    bank, modifiers, goals = world[0], world[1], world[2][:3]
    calls = []

    def counted(texts):
        calls.append(texts)
        return encode(texts)

    compose(goals, bank, modifiers, counted)
    assert all(len(set(texts)) == len(texts) for texts in calls)
    # Two images that are one ask for nothing more; the beginning is one call, and each round another.
    alone = list(calls)
    calls.clear()
    compose(torch.cat([goals, goals]), bank, modifiers, counted)
    assert [len(texts) for texts in calls] == [len(texts) for texts in alone] and len(calls) < 20


def test_no_phrase_is_added_beyond_the_most_that_was_asked_for(world, encode):
    bank, modifiers, goals = world
    short = bank_of([*SUBJECTS, f"{SUBJECTS[0]}, ink"], encode)
    counts = []
    for longest in (1, 2, 4):
        found = compose(goals, short, modifiers, encode, longest=longest)
        counts.append(max(len(phrases_of(one.prompt)) for one in found))
        assert counts[-1] <= max(longest, 2)
    assert counts[-1] > 2
    # A bank prompt that has more is not cut short.
    long = ", ".join([SUBJECTS[0], *MODIFIERS])
    found = compose(torch.from_numpy(encode([long])), bank_of([long, "sky"], encode), modifiers, encode, longest=2)
    assert found[0].prompt == long


def test_small_and_strange_banks_are_enough(encode):
    goals = torch.from_numpy(encode(["a red fox", "a blue bird, ink"]))
    for prompts in (["a red fox"], ["fox", "bird"], [""], [",", " , ", "a,,b"], ["cat, cat, cat", "CAT, Cat"]):
        bank = bank_of(prompts, encode)
        found = compose(goals, bank, modifiers_in(bank, encode), encode)
        best = (goals @ bank.embeddings.T).amax(1)
        assert all(one.cosine >= value - 1e-5 for one, value in zip(found, best.tolist(), strict=True)), prompts
    assert compose(goals[:0], bank, modifiers_in(bank, encode), encode) == []
    only = bank_of(["a red fox"], encode)
    assert [one.prompt for one in compose(goals, only, modifiers_in(only, encode), encode)] == ["a red fox"] * 2


def test_modifiers_are_counted_whatever_their_case_and_spelled_as_most_often():
    prompts = ["a, Oil Painting, 4k", "b,oil  painting", "c, oil painting , 8k", "oil painting", "d, 4K,, ", "e, 4k"]
    assert modifiers_of(prompts) == ["4k", "oil painting", "8k"]
    assert modifiers_of(prompts, 1) == ["4k"] and modifiers_of(["a b"]) == []


def predicted(run, images, out, **changes):
    command.predict(ckpt=str(run), images=images, out=str(out), **{**PREDICT, "compose": True, **changes})
    return read_predictions(out) if out.suffix != ".csv" else None


def test_the_command_writes_composed_prompts_in_every_format(finished_run, pictures, tmp_path, capsys):
    found = {}
    for ending in (".parquet", ".npz", ".jsonl"):
        columns = predicted(finished_run, str(pictures), tmp_path / f"p{ending}").columns
        found[ending] = columns["composed_prompt"]
        assert len(found[ending]) == 3 and all(isinstance(one, str) for one in found[ending])
        nearest = [row[0] for row in columns["nearest_cosines"]]
        assert (np.array(columns["composed_cosine"]) >= np.array(nearest) - 1e-3).all()
        assert f"composed prompts:\n  a: {found[ending][0]} (" in capsys.readouterr().out
    assert found[".parquet"] == found[".npz"] == found[".jsonl"]
    # Not what a blend of several models found.
    assert {"composed_prompt", "composed_cosine"} <= set(FINDINGS)
    without = predicted(finished_run, str(pictures), tmp_path / "n.npz", top_k=0).columns
    assert without["composed_prompt"] == found[".npz"] and "nearest_prompts" not in without
    plain = predicted(finished_run, str(pictures), tmp_path / "plain.npz", compose=False).columns
    assert "composed_prompt" not in plain


def test_a_part_without_a_readable_image_has_the_same_columns_and_a_killed_job_goes_on(
    finished_run, pictures, tmp_path, monkeypatch, capsys
):
    (pictures / "0.png").write_bytes(b"no")
    monkeypatch.setattr(command, "PART_IMAGES", 1)
    whole = predicted(finished_run, str(pictures), tmp_path / "whole.parquet")
    assert whole.ids == ["a", "b", "c"]
    add_to, done = Composer.add_to, []

    def dies(self, prediction):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(prediction)
        add_to(self, prediction)

    monkeypatch.setattr(Composer, "add_to", dies)
    with pytest.raises(KeyboardInterrupt):
        predicted(finished_run, str(pictures), tmp_path / "p.parquet")
    shutil.copytree(tmp_path / "p.parquet.parts", tmp_path / "q.parquet.parts")
    monkeypatch.setattr(Composer, "add_to", add_to)
    capsys.readouterr()
    again = predicted(finished_run, str(pictures), tmp_path / "p.parquet")
    assert "continuing from the parts" in capsys.readouterr().err
    assert again.columns == whole.columns
    # Other beams make another job.
    predicted(finished_run, str(pictures), tmp_path / "q.parquet", compose_beams=1)
    assert "2 parts of another job" in capsys.readouterr().err


def test_composing_in_portions_changes_nothing(finished_run, pictures, tmp_path, monkeypatch):
    one = predicted(finished_run, str(pictures), tmp_path / "a.npz").columns
    monkeypatch.setattr(composing, "_AT_ONCE", 1)
    assert (
        predicted(finished_run, str(pictures), tmp_path / "b.npz").columns["composed_prompt"] == one["composed_prompt"]
    )


def test_what_cannot_be_composed_is_told_before_a_prediction(finished_run, pictures, tmp_path):
    alone = tmp_path / "alone.safetensors"
    shutil.copy(finished_run / "checkpoints" / "best.safetensors", alone)
    for run, changes, sentence in (
        (alone, {}, "compose=true: there is no bank of prompts"),
        (finished_run, {"compose_beams": 0}, "compose_beams must be at least 1, got 0"),
        (finished_run, {"compose_phrases": 0}, "compose_phrases must be at least 1, got 0"),
        (finished_run, {"text_model": "./none"}, "target.model=./none: no such folder"),
    ):
        with pytest.raises(ValueError, match=sentence):
            predicted(run, str(pictures), tmp_path / "p.npz", **changes)
    with pytest.raises(ValueError, match="s.csv: a submission has no place for composed prompts"):
        predicted(finished_run, str(pictures), tmp_path / "s.csv")
    assert not list(tmp_path.glob("*.parts"))
