"""Small parts against references: ridge, search, metrics, heads, losses, files, schedule."""

import json
import math
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge as SklearnRidge

from img2prompt.data.sample import Batch
from img2prompt.encoders.encoder import Features
from img2prompt.files import link_or_copy, read_table, replacing, write_json, write_table
from img2prompt.heads import Linear, Outputs
from img2prompt.losses import Cosine
from img2prompt.metrics import bootstrap_interval, cosines
from img2prompt.ridge import fit_ridge
from img2prompt.search import nearest
from img2prompt.training.optim import AdamW


def linear_data(count=300, width=12, dimension=5, noise=0.1):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, width, generator=generator) * torch.logspace(-2, 2, width)
    truth = torch.randn(dimension, width, generator=generator) / torch.logspace(-2, 2, width)
    y = x @ truth.T + 0.5 + noise * torch.randn(count, dimension, generator=generator)
    return x, y, truth


def test_ridge_equals_scikit_learn_on_standardised_features():
    x, y, _ = linear_data()
    ridge = fit_ridge(x, y, torch.arange(len(x)), penalties=[0.3])
    mean, deviation = x.double().mean(0), x.double().std(0, correction=0)
    reference = SklearnRidge(alpha=0.3 * len(x)).fit(((x - mean) / deviation).numpy(), y.double().numpy())
    expected = reference.predict(((x - mean) / deviation).numpy())
    assert np.allclose((x @ ridge.weight.T + ridge.bias).numpy(), expected, atol=1e-4)


def test_ridge_chooses_a_weak_penalty_for_clean_data_and_a_strong_one_for_noise():
    x, y, _ = linear_data(noise=0.01)
    noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)) + 0.5
    groups = torch.arange(len(x))
    assert fit_ridge(x, y, groups).penalty < 0.01 < fit_ridge(x, noise, groups).penalty


def test_ridge_does_not_let_images_of_one_prompt_vote_for_each_other():
    generator = torch.Generator().manual_seed(2)
    # Twenty images a prompt, features that name the prompt and say nothing else: useless for a new prompt.
    prompts = torch.randn(40, 60, generator=generator)
    x = prompts.repeat_interleave(20, 0) + 0.01 * torch.randn(800, 60, generator=generator)
    y = torch.nn.functional.normalize(torch.randn(40, 8, generator=generator), dim=-1).repeat_interleave(20, 0)
    grouped = fit_ridge(x, y, torch.arange(40).repeat_interleave(20))
    leaking = fit_ridge(x, y, torch.arange(800))
    assert leaking.cosine > 0.9 and grouped.cosine < 0.4 and grouped.penalty > leaking.penalty


def test_ridge_survives_constant_features_one_group_and_more_features_than_samples():
    x = torch.cat([torch.randn(6, 20), torch.full((6, 3), 7.0)], dim=1)
    y = torch.nn.functional.normalize(torch.randn(6, 4), dim=-1)
    for groups in (torch.arange(6), torch.zeros(6, dtype=torch.int64)):
        ridge = fit_ridge(x, y, groups)
        assert ridge.weight.isfinite().all() and ridge.bias.isfinite().all()
        assert (ridge.weight[:, -3:] == 0).all()


@given(st.integers(1, 40), st.integers(1, 7), st.integers(1, 13), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_nearest_equals_a_full_search_whatever_the_block(rows, count, block, seed):
    generator = torch.Generator().manual_seed(seed)
    bank = torch.nn.functional.normalize(torch.randn(rows, 6, generator=generator), dim=-1)
    queries = torch.nn.functional.normalize(torch.randn(3, 6, generator=generator), dim=-1)
    cosine, found = nearest(queries, bank, count, block_rows=block)
    full = (queries @ bank.T).sort(dim=1, descending=True)
    assert torch.allclose(cosine, full.values[:, :count], atol=1e-6)
    assert torch.allclose((queries @ bank.T).gather(1, found), cosine, atol=1e-6)


def test_cosines_ignore_length_and_the_interval_covers_the_mean():
    a, b = torch.randn(50, 8), torch.randn(50, 8)
    assert torch.allclose(cosines(a, b), cosines(3 * a, 0.1 * b), atol=1e-6)
    values = torch.rand(400, generator=torch.Generator().manual_seed(0))
    low, high = bootstrap_interval(values)
    # The normal approximation of the same interval.
    half = 1.96 * values.std() / math.sqrt(400)
    assert low == pytest.approx(float(values.mean() - half), abs=0.005)
    assert high == pytest.approx(float(values.mean() + half), abs=0.005)


def test_images_of_one_prompt_do_not_make_the_interval_narrower():
    values = torch.rand(50, generator=torch.Generator().manual_seed(0))
    ten_each = values.repeat_interleave(10)
    low, high = bootstrap_interval(ten_each, np.arange(50).repeat(10))
    once = bootstrap_interval(values)
    assert (low, high) == pytest.approx(once, abs=1e-9)
    alone = bootstrap_interval(ten_each)
    assert alone[1] - alone[0] < 0.5 * (high - low)


def test_the_loss_is_one_minus_the_cosine():
    predicted, target = (torch.nn.functional.normalize(torch.randn(6, 5), dim=-1) for _ in range(2))
    batch = Batch({}, torch.arange(6), target, list("abcdef"), torch.ones(6, dtype=torch.bool))
    assert Cosine()(Outputs(target), batch)["cosine"].item() == pytest.approx(0, abs=1e-6)
    assert Cosine()(Outputs(-target), batch)["cosine"].item() == pytest.approx(2, abs=1e-6)
    expected = 1 - cosines(predicted, target).mean()
    assert Cosine()(Outputs(predicted), batch)["cosine"].item() == pytest.approx(expected.item(), abs=1e-6)


def test_a_head_gives_unit_length_and_drops_features_only_while_training():
    head = Linear(16, 5, dropout=0.5)
    features = Features(torch.randn(4, 16))
    assert not torch.equal(head(features).embedding, head(features).embedding)
    head.eval()
    assert torch.equal(head(features).embedding, head(features).embedding)
    assert torch.allclose(head(features).embedding.norm(dim=-1), torch.ones(4), atol=1e-6)


def test_the_learning_rate_warms_up_then_only_falls_to_zero():
    optim = AdamW(warmup_fraction=0.1)
    factors = [optim.lr_factor(step, 100) for step in range(100)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert all(a >= b for a, b in zip(factors[9:], factors[10:], strict=False))
    assert factors[-1] < 0.001 and max(factors) == 1
    assert factors[55] == pytest.approx(0.5, abs=0.01)


def test_every_parameter_is_in_exactly_one_group_and_norms_and_biases_do_not_decay(finished_run):
    from img2prompt.regressor import load_regressor

    regressor = load_regressor(finished_run / "checkpoints" / "finetune.safetensors")
    optimizer = AdamW(lr=1e-3, head_lr_factor=7.0).build(regressor, pretrained=True)
    seen = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(seen) == sorted(id(parameter) for parameter in regressor.parameters())
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in regressor.named_parameters():
        assert (decays[id(parameter)] > 0) == (parameter.ndim > 1), name
        assert rates[id(parameter)] == pytest.approx(7e-3 if name.startswith("head") else 1e-3), name


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_behind(tmp_path):
    path = tmp_path / "results.json"
    write_json(path, {"old": 1})
    with pytest.raises(ValueError):
        write_json(path, {"new": float("nan")})
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert json.loads(path.read_text()) == {"old": 1} and os.listdir(tmp_path) == ["results.json"]


def test_written_files_have_ordinary_permissions(tmp_path):
    mask = os.umask(0o022)
    os.umask(mask)
    write_json(tmp_path / "a.json", {})
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_link_replaces_what_was_there(tmp_path):
    (tmp_path / "a").write_text("a")
    (tmp_path / "b").write_text("b")
    link_or_copy(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "a" and sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_tables_come_back_as_they_went(tmp_path):
    write_table(tmp_path / "t.csv", [{"a": 'x,"y"\n', "b": 1}, {"a": "z", "c": 2.5}])
    assert read_table(tmp_path / "t.csv") == [{"a": 'x,"y"\n', "b": "1", "c": ""}, {"a": "z", "b": "", "c": "2.5"}]
    assert read_table(tmp_path / "none.csv") == []
