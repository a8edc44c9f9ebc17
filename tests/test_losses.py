"""Losses against their formulas, written out once more in NumPy or by torch's own functions."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from img2prompt import losses
from img2prompt.data.sample import Batch
from img2prompt.heads import Outputs

B, D = 6, 5


def unit(count, seed):
    rows = torch.randn(count, D, generator=torch.Generator().manual_seed(seed))
    return functional.normalize(rows, dim=-1)


def batch_of(targets):
    count = len(targets)
    return Batch({}, torch.arange(count), targets, [str(i) for i in range(count)], torch.ones(count, dtype=torch.bool))


@pytest.fixture
def outputs():
    return Outputs(unit(B, 1))


@pytest.fixture
def batch():
    return batch_of(unit(B, 2))


def value(loss, outputs, batch):
    return torch.stack(list(loss(outputs, batch).values())).sum().item()


def test_losses_of_single_pairs_equal_their_formulas(outputs, batch):
    p, t = outputs.embedding.double().numpy(), batch.targets.double().numpy()
    cosines = (p * t).sum(1)
    assert value(losses.Angular(), outputs, batch) == pytest.approx(np.mean(np.arccos(cosines)) / np.pi, abs=1e-6)
    assert value(losses.MeanSquaredError(), outputs, batch) == pytest.approx(np.mean(2 - 2 * cosines) / D, abs=1e-6)
    far = np.abs(p - t)
    huber = np.where(far < 0.3, 0.5 * far**2, 0.3 * (far - 0.15)).mean()
    assert value(losses.Huber(0.3), outputs, batch) == pytest.approx(huber, abs=1e-6)


def test_the_angular_loss_has_a_gradient_where_the_angle_is_zero(batch):
    predicted = batch.targets.clone().requires_grad_()
    value = losses.Angular()(Outputs(predicted), batch)["angular"]
    value.backward()
    assert predicted.grad.isfinite().all() and value < 1e-3


def test_softmax_is_the_cross_entropy_of_the_right_target_among_those_of_the_batch(outputs, batch):
    logits = outputs.embedding @ batch.targets.T / 0.2
    expected = functional.cross_entropy(logits, torch.arange(B)).item()
    assert value(losses.Softmax(temperature=0.2), outputs, batch) == pytest.approx(expected, abs=1e-5)


def test_sigmoid_judges_every_pair_of_the_batch(outputs, batch):
    logits = outputs.embedding @ batch.targets.T * 4 - 3
    labels = 2 * torch.eye(B) - 1
    expected = -functional.logsigmoid(labels * logits).sum().item() / B
    assert value(losses.Sigmoid(scale=4, bias=-3), outputs, batch) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", [losses.Softmax, losses.Sigmoid])
def test_all_training_targets_are_negatives_where_they_are_asked_for(kind, outputs, batch):
    others = unit(9, 3)
    every = torch.cat([batch.targets, others])
    loss = kind(negatives="all")
    loss.prepare(every)
    # The same as a batch in which the others' targets are, of which only the first rows count.
    if kind is losses.Softmax:
        expected = functional.cross_entropy(outputs.embedding @ every.T / 0.05, torch.arange(B)).item()
    else:
        labels = 2 * torch.eye(B, len(every)) - 1
        expected = -functional.logsigmoid(labels * (outputs.embedding @ every.T * 10 - 10)).sum().item() / B
    assert value(loss, outputs, batch) == pytest.approx(expected, abs=1e-5)
    assert "_all" not in loss.state_dict()


@pytest.mark.parametrize("kind", [losses.Softmax, losses.Sigmoid])
def test_an_image_of_the_same_prompt_is_no_negative(kind, outputs):
    targets = unit(B, 2)
    targets[1] = targets[0]
    predicted = outputs.embedding.clone()
    predicted[1] = predicted[0]
    alone = value(kind(), Outputs(predicted[:2]), batch_of(targets[:2]))
    right = (predicted[0] * targets[0]).sum()
    expected = 0.0 if kind is losses.Softmax else -functional.logsigmoid(10 * right - 10).item()
    assert alone == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("kind", [losses.Softmax, losses.Sigmoid])
def test_logits_in_parts_give_the_same_value_and_gradient(kind, batch, monkeypatch):
    found = []
    for most in (losses._MOST_LOGITS, 2 * B):
        monkeypatch.setattr(losses, "_MOST_LOGITS", most)
        predicted = unit(B, 1).requires_grad_()
        loss = kind()
        result = torch.stack(list(loss(Outputs(predicted), batch).values())).sum()
        result.backward()
        found.append([result.detach(), predicted.grad, *(parameter.grad for parameter in loss.parameters())])
    for whole, parts in zip(*found, strict=True):
        assert torch.allclose(whole, parts, atol=1e-6)
    assert found[0][2].abs() > 0


@pytest.mark.parametrize("kind", [losses.Softmax, losses.Sigmoid])
@pytest.mark.parametrize("negatives", ["batch", "all"])
def test_autocast_changes_neither_value_nor_gradient(kind, negatives, batch):
    found = []
    for enabled in (False, True):
        loss = kind(negatives=negatives)
        loss.prepare(batch.targets)
        # Nearly right, so that a target that is its own negative would show.
        predicted = functional.normalize(batch.targets + 0.01 * unit(B, 1), dim=-1).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            result = torch.stack(list(loss(Outputs(predicted), batch).values())).sum()
        result.backward()
        found.append((result.detach(), predicted.grad))
    assert all(torch.equal(plain, cast) for plain, cast in zip(*found, strict=True))


@pytest.mark.parametrize(
    "loss",
    [losses.Cosine(), losses.Angular(), losses.MeanSquaredError(), losses.Huber(), losses.Softmax(), losses.Sigmoid()],
    ids=lambda loss: type(loss).__name__,
)
def test_descending_a_loss_turns_predictions_to_their_targets(loss, batch):
    raw = unit(B, 1).clone().requires_grad_()
    optimiser = torch.optim.Adam([raw], lr=0.05)
    before = (functional.normalize(raw, dim=-1) * batch.targets).sum(-1).mean().item()
    for _ in range(60):
        optimiser.zero_grad()
        torch.stack(list(loss(Outputs(functional.normalize(raw, dim=-1)), batch).values())).sum().backward()
        optimiser.step()
    after = (functional.normalize(raw, dim=-1) * batch.targets).sum(-1).mean().item()
    assert after > before + 0.5 * (1 - before)


def test_a_weighted_sum_weighs_its_parts(outputs, batch):
    parts = {"cosine": losses.Cosine(), "mse": losses.MeanSquaredError()}
    found = losses.WeightedSum(parts, {"mse": 3.0})(outputs, batch)
    assert found["cosine"].item() == pytest.approx(value(losses.Cosine(), outputs, batch))
    assert found["mse"].item() == pytest.approx(3 * value(losses.MeanSquaredError(), outputs, batch))
    with pytest.raises(ValueError, match="weights for huber, parts cosine, mse"):
        losses.WeightedSum(parts, {"huber": 1.0})


def test_a_weighted_sum_prepares_its_parts(outputs, batch):
    part = losses.Softmax(negatives="all")
    losses.WeightedSum({"softmax": part}, {}).prepare(batch.targets)
    assert value(part, outputs, batch) == pytest.approx(value(losses.Softmax(), outputs, batch), abs=1e-6)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: losses.Softmax(negatives="some"), "loss.negatives=some: must be one of batch, all"),
        (lambda: losses.Softmax(temperature=0), "loss.temperature must be above 0"),
        (lambda: losses.Sigmoid(scale=-1), "loss.scale must be above 0"),
        (lambda: losses.Huber(0), "loss.delta must be above 0"),
        (lambda: losses.WeightedSum({}, {}), "weights for nothing, parts none"),
    ],
)
def test_settings_of_losses_that_mean_nothing_are_refused(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
