"""Refining: kernels and weights are what their formulas say, target labels are never read, and mistakes are named."""

import csv
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, read_csv
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.kernel_ridge import KernelRidge
from torch.nn.functional import normalize

from img2prompt.cache import cache_folder
from img2prompt.commands.fit import fit
from img2prompt.commands.settings import compose
from img2prompt.data.prompts import prompt_numbers
from img2prompt.data.targets import embeddings_of, locate
from img2prompt.predictions import WRITERS, Prediction, read_predictions
from img2prompt.refine import dakl as dakl_module
from img2prompt.refine.dakl import Dakl, KernelFeatures, reduced
from img2prompt.refine.ensemble import Ensemble, assess, cross_validated, fit_weights, inner_products
from img2prompt.refine.linear import Linear
from img2prompt.refine.refiner import blend, equal, fold_numbers, mean_cosine
from img2prompt.submission import validate_submission

WIDTH = 24


def domains(source=120, target=40, seed=0, noise=0.4):
    """Images of one member [1, N, D] and their targets [N, D], of two sets that are made alike."""
    chance = torch.Generator().manual_seed(seed)
    basis, mean = torch.randn(6, WIDTH, generator=chance), 1.5 * torch.randn(WIDTH, generator=chance)
    bent = torch.eye(WIDTH) + torch.randn(WIDTH, WIDTH, generator=chance) / WIDTH**0.5
    found = []
    for count in (source, target):
        goals = normalize(torch.randn(count, 6, generator=chance) @ basis + mean, dim=1)
        seen = goals @ bent + noise * torch.randn(count, WIDTH, generator=chance) / WIDTH**0.5
        found += [normalize(seen, dim=1)[None], goals]
    return found


def kernel(rows, columns, gamma=0.01):
    """The paper's, in float64 and as it is written."""
    one, two = (normalize(each.double(), dim=1) for each in (rows, columns))
    return torch.exp(-gamma * (1 - one @ two.T) / 2).numpy()


def refined(source, goals, target, **options):
    refiner = Dakl(**options)
    refiner.fit(source, goals, np.arange(len(goals)))
    return refiner.refine(target)


@pytest.mark.parametrize("alpha", [10.0, 0.1, 1e-3, 1e-5])
def test_dakl_is_the_kernel_ridge_of_scikit_learn_on_the_whole_feature_matrix(alpha):
    source, goals, target, _ = domains()
    everything = torch.cat([source[0], target[0]])
    expected = KernelRidge(alpha=alpha, kernel="linear").fit(kernel(source[0], everything), goals.double().numpy())
    raw = expected.predict(kernel(target[0], everything))
    features = KernelFeatures(source[0], target[0], 0.01)
    found = features.predict(features.products(source[0]), goals, alpha).numpy()
    assert np.abs(found - raw).max() < 1e-5 * np.abs(raw).max()
    unit = raw / np.linalg.norm(raw, axis=1, keepdims=True)
    assert np.abs(refined(source, goals, target, alpha=alpha).numpy() - unit).max() < 1e-5


def test_the_primal_solution_is_the_dual_one():
    source, goals, target, _ = domains(60, 20)
    everything = torch.cat([source[0], target[0]])
    phi = kernel(source[0], everything)
    weights = np.linalg.solve(phi.T @ phi + 1e-3 * np.eye(len(everything)), phi.T @ goals.double().numpy())
    features = KernelFeatures(source[0], target[0], 0.01)
    found = features.predict(features.products(source[0]), goals, 1e-3).numpy()
    assert np.abs(found - kernel(target[0], everything) @ weights).max() < 1e-5


@pytest.mark.parametrize("gamma", [0.01, 2.0])
def test_the_kernel_is_symmetric_positive_and_one_on_its_diagonal(gamma):
    source, _, target, _ = domains(50, 20)
    features = KernelFeatures(source[0], target[0], gamma)
    found = (features.deviations(features.all, features.all).double() + features.mean).numpy()
    assert np.abs(found - kernel(features.all, features.all, gamma)).max() < 1e-6 * gamma
    assert np.abs(found - found.T).max() < 1e-7 and np.abs(np.diag(found) - 1).max() < 1e-6
    assert np.linalg.eigvalsh(found).min() > -1e-6


def test_products_of_features_are_told_to_the_digits_that_differ():
    """Of entries near 70 all but the last six digits are the same."""
    source, _, target, _ = domains(50, 20)
    features = KernelFeatures(source[0], target[0], 0.01)
    phi = kernel(source[0], features.all)
    found = features.products(source[0])
    assert np.abs(found.numpy() - phi @ phi.T).max() < 1e-5 * (phi @ phi.T).std()
    assert (
        np.abs(features.products(target[0], source[0]).numpy() - kernel(target[0], features.all) @ phi.T).max() < 1e-6
    )


@given(st.integers(1, 80), st.sampled_from([None, 1e-3]))
@settings(deadline=None, max_examples=15)
def test_blocks_of_any_size_give_the_same(block, alpha):
    source, goals, target, _ = domains(60, 20)
    whole = refined(source, goals, target, alpha=alpha)
    # A penalty that is chosen may be small, and then float32 tells.
    error = 1e-5 if alpha else 3e-3
    assert (refined(source, goals, target, alpha=alpha, block=block) - whole).abs().max() < error


def test_longer_inputs_change_nothing_in_dakl():
    source, goals, target, _ = domains(60, 20)
    factors = torch.rand(1, 60, 1) * 10 + 0.1
    for centroids in (60, 30):
        base, longer = (
            refined(*one, alpha=1e-3, centroids=centroids)
            for one in ((source, goals, target), (source * factors, goals, 7 * target))
        )
        assert (longer - base).abs().max() < 1e-5


def test_targets_in_another_order_are_predicted_in_that_order():
    source, goals, target, _ = domains(60, 20)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    base = refined(source, goals, target, alpha=1e-3)
    assert (refined(source, goals, target[:, order], alpha=1e-3) - base[order]).abs().max() < 1e-5
    chosen = refined(source, goals, target)
    assert (refined(source, goals, target[:, order]) - chosen[order]).abs().max() < 3e-3


def test_dakl_predicts_images_and_not_one_constant_and_the_chosen_alpha_beats_the_papers():
    source, goals, target, truth = domains()
    found = refined(source, goals, target)
    constant = mean_cosine(goals.mean(0).expand_as(truth), truth)
    assert found.std(0).max() > 0.01 and mean_cosine(found, truth) > constant + 0.05
    assert mean_cosine(found, truth) > mean_cosine(refined(source, goals, target, alpha=10.0), truth) + 0.05
    assert mean_cosine(found, truth) > mean_cosine(target[0], truth)


def test_the_published_loop_would_be_seen():
    """It maps the whole kernel once for each row, and what comes of that is one constant."""
    source, goals, target, _ = domains(60, 20)
    everything = normalize(torch.cat([source[0], target[0]]).double(), dim=1)
    faulty = (everything @ everything.T).numpy()
    for _ in range(len(faulty)):
        faulty = np.exp(-0.01 * (1 - faulty) / 2)
    constant = KernelRidge(alpha=1e-3, kernel="linear").fit(faulty[:60], goals.double().numpy()).predict(faulty[60:])
    found = refined(source, goals, target, alpha=1e-3).numpy()
    assert constant.std(axis=0).max() < 1e-6 and found.std(axis=0).max() > 0.05


def test_other_images_in_the_target_change_what_dakl_says_of_one_and_not_what_ridge_does():
    source, goals, target, _ = domains(60, 20)
    alone, among = refined(source, goals, target[:, :5], alpha=1e-2), refined(source, goals, target, alpha=1e-2)
    assert (alone - among[:5]).abs().max() > 1e-5
    linear = Linear()
    linear.fit(source, goals, np.arange(60))
    assert torch.allclose(linear.refine(target)[:5], linear.refine(target[:, :5]), atol=1e-6)


def test_centroids_stand_for_the_source_and_have_the_target_of_their_nearest_sample():
    centres = normalize(torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0)), dim=1)
    owner = torch.arange(100) % 5
    samples = normalize(centres[owner] + 0.01 * torch.randn(100, WIDTH), dim=1)
    found, rows = reduced(samples, 40, seed=0)
    assert found.shape == (40, WIDTH) and torch.allclose(found.norm(dim=1), torch.ones(40), atol=1e-5)
    cosines = found @ samples.T
    assert (cosines[torch.arange(40), rows] > cosines.amax(1) - 1e-6).all() and set(owner[rows].tolist()) == {
        0,
        1,
        2,
        3,
        4,
    }
    again, _ = reduced(samples, 40, seed=0)
    assert torch.equal(found, again)
    kept, same = reduced(samples, 100, seed=0)
    assert torch.equal(kept, samples) and same.tolist() == list(range(100))


def test_dakl_with_few_centroids_is_the_kernel_ridge_on_them_and_their_samples_targets():
    source, goals, target, _ = domains(200, 40)
    centroids, rows = reduced(source[0], 60, seed=0)
    everything = torch.cat([centroids, target[0]])
    expected = KernelRidge(alpha=1e-3, kernel="linear").fit(kernel(centroids, everything), goals[rows].double().numpy())
    raw = torch.from_numpy(expected.predict(kernel(target[0], everything)))
    found = refined(source, goals, target, centroids=60, alpha=1e-3)
    assert (found - normalize(raw, dim=1)).abs().max() < 1e-4


def test_few_distinct_samples_warn_of_nothing_and_few_centroids_still_predict():
    source, goals, target, truth = domains()
    twice = torch.cat([source[:, :3]] * 20, dim=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert refined(twice, torch.cat([goals[:3]] * 20), target, centroids=10).isfinite().all()
    assert refined(source, goals, target, centroids=1).isfinite().all()
    found = refined(source, goals, target, centroids=60)
    assert mean_cosine(found, truth) > mean_cosine(goals.mean(0).expand_as(truth), truth)


def test_alpha_is_chosen_on_other_prompts_than_those_it_is_tried_on():
    """Six images of a prompt, each image nothing but its prompt's number: held out with its group, nothing is told."""
    chance = torch.Generator().manual_seed(1)
    goals = normalize(torch.randn(20, WIDTH, generator=chance), dim=1).repeat_interleave(6, dim=0)
    seen = normalize(torch.randn(20, WIDTH, generator=chance), dim=1).repeat_interleave(6, dim=0)
    seen = normalize(seen + 0.01 * torch.randn(120, WIDTH, generator=chance), dim=1)[None]
    scores = []
    for groups in (np.arange(20).repeat(6), np.arange(120)):
        refiner = Dakl()
        refiner.fit(seen, goals, groups)
        refiner.refine(seen[:, :4])
        scores.append(float(re.search(r"DAKL (\S+) cross-validated", refiner.lines()[1])[1]))
    assert scores[0] < 0.4 < 0.9 < scores[1]


def test_a_few_tried_centroids_choose_nearly_as_all_do(monkeypatch):
    source, goals, target, truth = domains(400, 60)
    whole = mean_cosine(refined(source, goals, target), truth)
    monkeypatch.setattr(dakl_module, "_TRIED", 80)
    assert mean_cosine(refined(source, goals, target), truth) == pytest.approx(whole, abs=0.02)


def several(count=400, seed=0, noises=(0.5, 1.0, 4.0)):
    chance = torch.Generator().manual_seed(seed)
    goals = normalize(torch.randn(count, WIDTH, generator=chance), dim=1)
    each = [normalize(goals + s * torch.randn(count, WIDTH, generator=chance) / WIDTH**0.5, dim=1) for s in noises]
    return torch.stack(each), goals


def test_fitted_weights_recover_those_that_made_the_targets():
    members = normalize(torch.randn(4, 300, WIDTH, generator=torch.Generator().manual_seed(0)), dim=-1)
    wanted = torch.tensor([0.5, 0.3, 0.2, 0.0])
    goals = blend(members, wanted)
    found = fit_weights(inner_products(members, goals))
    assert np.abs(found - wanted.numpy()).max() < 1e-4 and found.min() >= 0


@given(st.integers(0, 10_000), st.integers(1, 5))
@settings(deadline=None, max_examples=40)
def test_weights_are_never_negative_and_never_score_less_than_equal_ones_or_any_member(seed, count):
    chance = torch.Generator().manual_seed(seed)
    members, goals = torch.randn(count, 12, 6, generator=chance), torch.randn(12, 6, generator=chance)
    products = inner_products(members, goals)
    found = fit_weights(products)
    assert found.min() >= 0 and found.sum() == pytest.approx(1)
    assert products.score(found) >= products.score(np.full(count, 1 / count)) - 1e-12
    nudged = np.abs(found + 0.01 * np.random.default_rng(seed).normal(size=count))
    assert products.score(found) >= products.score(nudged) - 1e-4
    assert np.array_equal(found, fit_weights(products))


def test_a_member_that_says_the_opposite_gets_no_weight():
    members, goals = several(noises=(0.5, 1.0, 1.0))
    found = fit_weights(inner_products(members * torch.tensor([1.0, 1.0, -1.0])[:, None, None], goals))
    assert found[2] == 0 and found[0] > found[1] > 0


def test_equal_members_do_not_break_the_fit():
    members, goals = several(noises=(0.5,))
    found = fit_weights(inner_products(members.repeat(3, 1, 1), goals))
    assert np.isfinite(found).all() and found.sum() == pytest.approx(1)


def test_the_cosine_of_weights_is_that_of_their_blend():
    members, goals = several(50)
    weights = torch.tensor([0.2, 0.5, 0.3])
    expected = mean_cosine(blend(members, weights), goals)
    assert inner_products(3 * members, 2 * goals).score(weights.numpy()) == pytest.approx(expected, abs=1e-6)


def test_scaling_a_member_or_its_rows_changes_nothing():
    members, goals = several(60)
    scaled = members * torch.tensor([9.0, 0.1, 1.0])[:, None, None] * (torch.rand(3, 60, 1) + 0.1)
    assert torch.allclose(blend(scaled, equal(3)), blend(members, equal(3)), atol=1e-6)
    found, other = (fit_weights(inner_products(one, goals)) for one in (members, scaled))
    assert np.abs(found - other).max() < 1e-4


def test_members_that_cancel_each_other_out_are_told():
    members, _ = several(5, noises=(0.5,))
    with pytest.raises(ValueError, match="the members' predictions of 5 images cancel each other out"):
        blend(torch.cat([members, -members]), equal(2))


def test_the_table_is_that_of_refits():
    members, goals = several(90)
    groups = np.arange(90) // 3
    products = inner_products(members, goals)
    report = assess(products, groups)
    numbers = fold_numbers(groups)
    for left in range(3):
        rest = [one for one in range(3) if one != left]
        total = 0.0
        for fold in range(5):
            mine = torch.from_numpy(numbers == fold)
            weights = fit_weights(inner_products(members[rest][:, ~mine], goals[~mine]))
            refit = blend(members[rest][:, mine], torch.from_numpy(weights).float())
            total += mean_cosine(refit, goals[mine]) * int(mine.sum())
        assert report.without[left] == pytest.approx(total / 90, abs=1e-6)
        assert report.alone[left] == pytest.approx(mean_cosine(members[left], goals), abs=1e-6)
    assert report.equal == pytest.approx(mean_cosine(blend(members, equal(3)), goals), abs=1e-6)
    assert report.in_sample == pytest.approx(
        mean_cosine(blend(members, torch.from_numpy(report.weights).float()), goals), abs=1e-6
    )
    # The worst member is missed least.
    assert max(report.without) == report.without[2] and min(report.without) == report.without[0]


def test_images_of_a_prompt_are_never_on_both_sides_of_a_score():
    groups = np.array([7, 3, 7, 9, 3, 1, 12, 40, 9])
    folds = fold_numbers(groups)
    assert all(len(set(folds[groups == one])) == 1 for one in groups) and len(set(folds)) == 5
    members, goals = several(4)
    assert np.isnan(cross_validated(inner_products(members, goals), np.zeros(4, int)))
    assert np.isfinite(cross_validated(inner_products(members, goals), np.array([0, 0, 5, 5])))


def test_cross_validated_weights_that_do_not_beat_equal_ones_are_told_and_can_be_had():
    members, goals = several(24, noises=(1.0, 1.0, 1.0, 1.0, 1.0))
    refiner = Ensemble()
    refiner.fit(members, goals, np.arange(24))
    assert refiner.report.held_out < refiner.report.equal <= refiner.report.in_sample
    assert "do not beat equal weights when they are cross-validated; refiner.fitted=false" in refiner.lines()[-1]
    plain = Ensemble(fitted=False)
    plain.fit(members, goals, np.arange(24))
    assert plain.weights.tolist() == equal(5).tolist() and not torch.equal(refiner.weights, plain.weights)
    better = Ensemble()
    better.fit(*several(), np.arange(400))
    assert better.report.held_out > better.report.equal and "do not beat" not in "\n".join(better.lines())


# The command.

SUBJECTS = ("a red star", "an old castle", "two cats", "a robot", "the sea at night", "a portrait of a queen")
PLACES = ("in oil", "on mars", "by a child", "in the rain", "made of glass", "at dawn")
PROMPTS = [f"{subject} {place}" for subject in SUBJECTS for place in PLACES]


@pytest.fixture(scope="module")
def known():
    """MiniLM's embeddings of the prompts."""
    return torch.from_numpy(embeddings_of(PROMPTS, locate(), "fp32", "cpu", cache_folder(None)))


def member(known, prompts, noise, seed):
    chance = torch.Generator().manual_seed(seed)
    seen = known[prompts] + noise * torch.randn(len(prompts), 384, generator=chance) / 384**0.5
    return normalize(seen, dim=1).numpy()


def written(path, ids, vectors, **columns):
    names = [f"pictures/{one}.png" for one in ids]
    WRITERS[path.suffix](path, [Prediction(ids, vectors, {"path": names, **columns})])
    return str(path)


def prompts_file(path, ids, prompts):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("imgId", "prompt"), *zip(ids, prompts, strict=True)])
    return str(path)


@pytest.fixture
def world(tmp_path, known):
    """Three members' predictions of 52 images of 26 prompts, and of ten images of ten others."""
    rows, rest = [number for number in range(26) for _ in range(2)], list(range(26, 36))
    ids, others = [f"s{number:02d}" for number in range(52)], [f"t{number:02d}" for number in range(10)]
    noises = (0.8, 1.0, 4.0)
    words = {"nearest_prompts": [["x"]] * 52, "nearest_cosines": [[0.5]] * 52}
    few = {name: values[:10] for name, values in words.items()}
    return {
        "source": [
            written(tmp_path / f"source{n}.parquet", ids, member(known, rows, noise, n), **words)
            for n, noise in enumerate(noises)
        ],
        "prompts": prompts_file(tmp_path / "prompts.csv", ids, [PROMPTS[row] for row in rows]),
        "apply_to": [
            written(tmp_path / f"target{n}.parquet", others, member(known, rest, noise, 10 + n), **few)
            for n, noise in enumerate(noises)
        ],
        "truth": prompts_file(tmp_path / "truth.csv", others, [PROMPTS[row] for row in rest]),
    }


def fitted(world, out_, *overrides, **given):
    chosen = compose("fit", ["source=x", "prompts=x", "apply_to=x", "device=cpu", *overrides])
    given = {"out": str(out_), **given}
    fit(**{**chosen, **{key: world[key] for key in ("source", "prompts", "apply_to")}, **given})
    return out_


REFINERS = ("ensemble", "dakl", "ridge")


@pytest.mark.parametrize("name", REFINERS)
def test_a_refined_file_is_what_the_refiner_says_of_the_blend(name, world, known, tmp_path, capsys):
    out = fitted(world, tmp_path / "out.parquet", f"refiner={name}", truth=world["truth"])
    found = read_predictions(out)
    assert found.ids == [f"t{number:02d}" for number in range(10)]
    assert found.columns["path"] == [f"pictures/{one}.png" for one in found.ids]
    assert set(found.columns) == {"path", "agreement"} and all(0 < one <= 1 for one in found.columns["agreement"])
    source = torch.stack([torch.from_numpy(read_predictions(path).embeddings) for path in world["source"]])
    target = torch.stack([torch.from_numpy(read_predictions(path).embeddings) for path in world["apply_to"]])
    refiner = {"ensemble": Ensemble, "dakl": Dakl, "ridge": Linear}[name]()
    rows = [number for number in range(26) for _ in range(2)]
    groups = prompt_numbers([PROMPTS[row] for row in rows])
    refiner.fit(source, known[rows], groups)
    assert np.abs(refiner.refine(target).numpy() - found.embeddings).max() < 1e-5
    assert np.allclose(np.linalg.norm(found.embeddings, axis=1), 1, atol=1e-5)
    shown = capsys.readouterr().out
    shown_rows = {re.split(r"\s{2,}", line)[0]: line.split()[-4] for line in shown.splitlines() if " to 0." in line}
    usual = {"member 1", "member 2", "member 3", "equal mean", "constant mean", "plain ridge"}
    named = {"ensemble": "ensemble", "dakl": "DAKL", "ridge": "plain ridge"}[name]
    assert set(shown_rows) == usual | {named}
    assert shown_rows[named] == f"{mean_cosine(torch.from_numpy(found.embeddings), known[26:]):.4f}"
    assert shown_rows["member 1"] == f"{mean_cosine(target[0], known[26:]):.4f}"
    assert shown_rows["equal mean"] == f"{mean_cosine(blend(target, equal(3)), known[26:]):.4f}"
    constant = known[rows].mean(0).expand(10, -1)
    assert shown_rows["constant mean"] == f"{mean_cosine(constant, known[26:]):.4f}"
    plain = Linear()
    plain.fit(source, known[rows], groups, refiner.weights.tolist())
    assert shown_rows["plain ridge"] == f"{mean_cosine(plain.refine(target), known[26:]):.4f}"


@pytest.mark.parametrize("name", REFINERS)
def test_what_is_true_of_the_target_changes_nothing_in_the_file(name, world, tmp_path, capsys):
    base = fitted(world, tmp_path / "base.npz", f"refiner={name}").read_bytes()
    assert "images of apply_to with a prompt" not in capsys.readouterr().out
    for number, prompts in enumerate((["nan"] * 10, PROMPTS[:10], [*PROMPTS[26:27], *[""] * 9])):
        truth = prompts_file(tmp_path / "other.csv", [f"t{row:02d}" for row in range(10)], prompts)
        assert fitted(world, tmp_path / f"{number}.npz", f"refiner={name}", truth=truth).read_bytes() == base
    assert "1 images of apply_to with a prompt" in capsys.readouterr().out


@pytest.mark.parametrize("ending", [*WRITERS, ".csv"])
def test_every_ending_is_read_and_written(ending, world, tmp_path):
    base = read_predictions(fitted(world, tmp_path / "base.parquet"))
    if ending == ".csv":
        out = fitted(world, tmp_path / "out.csv")
        validate_submission(out, base.ids)
        return
    changed = dict(world)
    for key in ("source", "apply_to"):
        changed[key] = []
        for path in world[key]:
            one = read_predictions(path)
            other = os.path.splitext(path)[0] + "_again" + ending
            changed[key].append(written(tmp_path / other, one.ids, one.embeddings))
    found = read_predictions(fitted(changed, tmp_path / f"out{ending}"))
    assert found.ids == base.ids and found.columns == base.columns
    assert np.array_equal(found.embeddings, base.embeddings)


@pytest.mark.parametrize("options", [["refiner=ensemble"], ["refiner=dakl", "refiner.centroids=20"], ["refiner=ridge"]])
@pytest.mark.parametrize("number", [0, 1])
def test_rows_are_matched_by_id_and_not_by_place(number, options, world, tmp_path):
    base = read_predictions(fitted(world, tmp_path / "base.parquet", *options))
    turned = dict(world)
    for key in ("source", "apply_to"):
        turned[key] = list(world[key])
        one = read_predictions(world[key][number])
        order = np.random.default_rng(0).permutation(len(one))
        ids = [one.ids[i] for i in order]
        turned[key][number] = written(tmp_path / f"{key}_turned.parquet", ids, one.embeddings[order])
    found = read_predictions(fitted(turned, tmp_path / "turned.parquet", *options))
    assert (found.ids == base.ids) == (number == 1) and sorted(found.ids) == base.ids
    same = [found.ids.index(one) for one in base.ids]
    assert [found.columns["path"][row] for row in same] == base.columns["path"]
    assert np.abs(found.embeddings[same] - base.embeddings).max() < 1e-4


def test_fitted_weights_are_saved_and_weigh_the_members_of_others(world, tmp_path):
    saved = tmp_path / "weights.json"
    fitted(world, tmp_path / "e.parquet", weights=str(saved))
    weights = json.loads(saved.read_text())
    assert list(weights) == world["source"] and sum(weights.values()) == pytest.approx(1)
    assert weights[world["source"][0]] > weights[world["source"][1]] > weights[world["source"][2]] >= 0
    alike = read_predictions(fitted(world, tmp_path / "a.parquet", "refiner=ridge")).embeddings
    weighed = read_predictions(fitted(world, tmp_path / "w.parquet", "refiner=ridge", weights=str(saved))).embeddings
    assert np.abs(alike - weighed).max() > 1e-3
    # By name, whatever their order; a list goes by the order.
    turned = {**world, **{key: world[key][::-1] for key in ("source", "apply_to")}}
    again = read_predictions(fitted(turned, tmp_path / "t.parquet", "refiner=ridge", weights=str(saved))).embeddings
    assert np.abs(again - weighed).max() < 1e-5
    saved.write_text(json.dumps([5 * one for one in weights.values()]))
    listed = read_predictions(fitted(world, tmp_path / "l.parquet", "refiner=ridge", weights=str(saved))).embeddings
    assert np.abs(listed - weighed).max() < 1e-5


def test_images_without_a_prompt_are_counted_and_left_out(world, tmp_path, capsys):
    rows = [(row["imgId"], row["prompt"]) for row in read_csv(Path(world["prompts"]))]
    few = prompts_file(tmp_path / "few.csv", *zip(*[row for row in rows if row[0] not in ("s03", "s07")], strict=True))
    found = read_predictions(fitted({**world, "prompts": few}, tmp_path / "few.parquet")).embeddings
    assert "2 images of source have no prompt and are left out: s03, s07" in capsys.readouterr().err
    cut = dict(world)
    cut["source"] = []
    for path in world["source"]:
        one = read_predictions(path)
        kept = [row for row, name in enumerate(one.ids) if name not in ("s03", "s07")]
        cut["source"].append(
            written(tmp_path / f"cut_{os.path.basename(path)}", [one.ids[i] for i in kept], one.embeddings[kept])
        )
    assert np.abs(read_predictions(fitted(cut, tmp_path / "cut.parquet")).embeddings - found).max() < 1e-6


def test_what_makes_scores_too_good_is_told(world, tmp_path, capsys):
    same = {**world, "apply_to": world["source"]}
    fitted(same, tmp_path / "out.parquet", truth=world["prompts"])
    told = capsys.readouterr().err
    assert "52 ids are in source and in apply_to: s00, s01, s02, …" in told
    assert "52 images of apply_to have a prompt of the source" in told


def test_one_member_and_one_file_are_enough(world, tmp_path):
    out = fitted(world, tmp_path / "one.parquet", source=world["source"][0], apply_to=world["apply_to"][0])
    assert np.abs(read_predictions(out).embeddings - read_predictions(world["apply_to"][0]).embeddings).max() < 1e-6


def test_mistakes_get_one_sentence_and_nothing_is_written(world, tmp_path, known):
    ids = [f"s{number:02d}" for number in range(52)]
    vectors = member(known, [0] * 52, 1.0, 5)
    others = written(tmp_path / "others.parquet", [f"x{number}" for number in range(52)], vectors)
    fewer = written(tmp_path / "fewer.parquet", ids[:40], vectors[:40])
    narrow = written(tmp_path / "narrow.parquet", ids, vectors[:, :100])
    narrow_target = written(tmp_path / "narrow_target.parquet", ["a"], vectors[:1, :100])
    nobody = prompts_file(tmp_path / "nobody.csv", ["z"], ["a dog"])
    source, target = world["source"], world["apply_to"]
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "minus.json").write_text("[1, -1, 1]")
    (tmp_path / "two.json").write_text("[1, 1]")
    (tmp_path / "named.json").write_text('{"a.parquet": 1}')
    goal = tmp_path / "out.parquet"
    cases = [
        (
            {"source": [source[0], others, source[2]]},
            "others.parquet: 52 images of .*source0.parquet are not in it .s00, s01, s02, …",
        ),
        ({"source": [source[0], fewer, source[2]]}, "fewer.parquet: 12 images of .* are not in it .s40, s41, s42, …"),
        ({"source": [fewer, source[1], source[2]]}, "fewer.parquet: 12 images of .*source1.parquet are not in it .s40"),
        (
            {"source": [source[0], narrow, source[2]]},
            "narrow.parquet: its embeddings have 100 numbers, those of .* 384",
        ),
        ({"apply_to": target[:2]}, "apply_to has 2 prediction files and source 3; give the same members"),
        ({"source": [], "apply_to": []}, "source must name a prediction file"),
        (
            {"source": narrow, "apply_to": target[0]},
            "target0.parquet: its embeddings have 384 numbers, those of .* 100",
        ),
        (
            {"source": narrow, "apply_to": narrow_target},
            "the predictions have 100 numbers an image, .*MiniLM-L6-v2 384; give",
        ),
        (
            {"source": narrow, "apply_to": narrow_target, "out": str(tmp_path / "o.csv")},
            "a submission has 384 values an image, these predictions 100",
        ),
        ({"source": [source[0], source[1], "none.parquet"]}, "none.parquet: no such file"),
        ({"prompts": nobody}, "nobody.csv: none of its 1 imgIds with a prompt .first: z. is an id of .*source0"),
        ({"truth": nobody}, "nobody.csv: none of its 1 imgIds with a prompt .first: z. is an id of .*target0"),
        ({"prompts": None}, "prompts must be given"),
        ({"prompts": "none.csv"}, "none.csv: no such file"),
        ({"truth": "none.csv"}, "none.csv: no such file"),
        ({"out": source[1]}, "out=.*source1.parquet: would replace what it is made from"),
        ({"out": target[1]}, "out=.*target1.parquet: would replace what it is made from"),
        ({"out": "out.txt"}, "out=out.txt: the ending must be one of .parquet, .npz, .jsonl, .csv"),
        ({"weights": "w.txt"}, "weights=w.txt: the ending must be .json"),
        ({"text_model": "./none"}, "no such folder"),
        ({"device": "cuda:99"}, "device=cuda:99: not available here"),
    ]
    for name, sentence in (
        ("bad.json", "no JSON file that can be read"),
        ("minus.json", "expected 3 numbers of at least 0"),
        ("two.json", "expected 3 numbers of at least 0"),
        ("named.json", "it weighs a.parquet, and source is .*source0.parquet"),
        ("none.json", "no such file; refiner=ensemble"),
    ):
        cases.append(({"weights": str(tmp_path / name), "refiner": "dakl"}, f"weights=.*{name}: {sentence}"))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for changed, sentence in cases:
        name = changed.pop("refiner", "ensemble")
        with pytest.raises(ValueError, match=sentence) as told:
            fitted(world, goal, f"refiner={name}", **changed)
        assert "\n" not in str(told.value)
    for options, sentence in (
        (["refiner=dakl", "refiner.centroids=0"], "refiner.centroids must be at least 1, got 0"),
        (["refiner=dakl", "refiner.gamma=-1"], "refiner.gamma must be above 0, got -1"),
        (["refiner=dakl", "refiner.alpha=0"], "refiner.alpha must be above 0, got 0"),
        (["refiner=dakl", "refiner.alpha=1e-30", "refiner.gamma=1e-9"], "refiner.alpha=1e-30: so small that"),
        (["refiner=dakl", "refiner.alpha=much"], "refiner.alpha=much: must be a number or null"),
        (["source=5"], r"source=5: must be text or a \[list\]"),
        (["truth=5"], "truth=5: must be text or null"),
    ):
        with pytest.raises(Exception, match=sentence):
            fitted(world, goal, *options)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("ending", WRITERS)
def test_files_that_cannot_be_read_are_named_with_the_reason(ending, tmp_path):
    vectors = np.eye(3, 8, dtype=np.float32)
    path = tmp_path / f"p{ending}"

    def broken(ids, rows):
        WRITERS[ending](path, [Prediction(ids, rows)])
        return path

    bad = vectors.copy()
    bad[1, 2] = np.inf
    zero = vectors * [[1], [1], [0]]
    cases = [(["a", "b", "a"], vectors, "id a comes twice"), (["a", "b", "c"], zero.astype(np.float32), "of c is zero")]
    if ending != ".jsonl":
        cases.append((["a", "b", "c"], bad, r"the embedding of b is not finite \(1 of 3 are so\)"))
    for ids, rows, sentence in cases:
        with pytest.raises(ValueError, match=f"p{ending}: .*{sentence}"):
            read_predictions(broken(ids, rows))
    if ending != ".npz":
        with pytest.raises(ValueError, match="there are no predictions in it|not predictions that predict.py wrote"):
            read_predictions(broken([], np.empty((0, 8), np.float32)))
    for content in (b"", b"PK\x03\x04 no", b"PAR1 no", b"\xff\xfe", b"[1]\n"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="not predictions that predict.py wrote|no predictions in it") as told:
            read_predictions(path)
        assert "\n" not in str(told.value)
    path.unlink()
    for gone in (path, tmp_path):
        with pytest.raises(ValueError, match="no such file|are read from .parquet, .npz, .jsonl"):
            read_predictions(gone)


def test_files_of_another_make_are_refused(tmp_path):
    def lines(*rows):
        (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / "p.jsonl"

    def arrays(**given):
        np.savez(tmp_path / "p.npz", **given)
        return tmp_path / "p.npz"

    def table(**columns):
        pq.write_table(pa.table(columns), tmp_path / "p.parquet")
        return tmp_path / "p.parquet"

    row = {"id": "a", "embedding": [1.0, 0.0]}
    unit = np.eye(2, dtype=np.float32)
    for make, sentence in (
        (lambda: lines(row, {"id": "b", "embedding": [1.0]}), "line 2: embeddings of other widths, 1 and 2"),
        (lambda: lines(row, {"id": "b"}), "line 2 is no object with id and embedding"),
        (lambda: lines(row, {"id": 5, "embedding": [1.0, 0.0]}), "its ids are no text"),
        (lambda: lines({**row, "path": "x"}, {**row, "id": "b"}), "1 values of path for 2 ids"),
        (lambda: lines(row, {"id": "b", "embedding": ["x", 0]}), "could not convert"),
        (lambda: lines(row, {"id": "b", "embedding": [float("nan"), 0]}), "embedding of b is not finite"),
        (lambda: arrays(ids=["a", "b"]), "embeddings"),
        (lambda: lines({"id": "a", "embedding": {"x": 1}}), "not predictions that predict.py wrote"),
        (lambda: arrays(ids=["a"], embeddings=unit), "2 values of embeddings for 1 ids"),
        (lambda: arrays(ids=["a", "b"], embeddings=unit[0]), r"not numbers \[N, D\]"),
        (lambda: arrays(ids=np.array(["a", "b"], object), embeddings=unit), "allow_pickle"),
        (lambda: table(id=["a"]), "embedding"),
        (lambda: table(id=["a", "b"], embedding=[[1.0], [1.0, 2.0]]), "holds no vectors of one width"),
        (
            lambda: table(id=["a", None], embedding=pa.array([[1.0], [1.0]], pa.list_(pa.float32(), 1))),
            "has empty places",
        ),
    ):
        with pytest.raises(ValueError, match=sentence):
            read_predictions(make())


@pytest.mark.slow
def test_fit_works_as_a_user_runs_it(world, tmp_path):
    strange = tmp_path / "run=1, (best)"
    strange.mkdir()
    for key in ("source", "apply_to"):
        for path in world[key]:
            os.rename(path, strange / os.path.basename(path))
    names = {
        key: ",".join(f'"{strange.name}/{os.path.basename(path)}"' for path in world[key])
        for key in ("source", "apply_to")
    }
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'offline'}"}
    command = [
        sys.executable,
        "-m",
        "img2prompt",
        "fit",
        *(f"{key}=[{names[key]}]" for key in names),
        "prompts=prompts.csv",
    ]
    done = subprocess.run(
        [*command, "truth=truth.csv", "out=o (1).csv", "device=cpu", "refiner=dakl", "refiner.centroids=20"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for words in (
        "DAKL of 3 members, fitted to 52 images of 26 prompts",
        "52 source images are reduced to 20",
        "plain ridge",
        "constant mean",
        "10 images refined: o (1).csv",
    ):
        assert words in done.stdout
    assert (tmp_path / "o (1).csv").is_file()
    wrong = subprocess.run([*command, "sorce=x"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert wrong.returncode == 1 and "sorce: no such key; did you mean source?" in wrong.stderr
    wrong = subprocess.run([*command, "refiner=dalk"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert wrong.returncode == 1 and "refiner=dalk: no such choice; did you mean dakl?" in wrong.stderr
