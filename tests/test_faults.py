"""Faults that training code for this task has been seen to have: none of them is here."""

import math
import pickle

import pytest
import torch

from img2prompt.commands import table
from img2prompt.commands.sentences import sentence_of
from img2prompt.encoders.timm_model import Timm
from img2prompt.training.checkpoint import LAST, PREVIOUS, read_state
from img2prompt.training.datamodule import PairData
from img2prompt.training.optim import AdamW


@pytest.fixture
def steps(monkeypatch):
    """What each optimiser step of a run was given: learning rates, and gradients that are cut to one vector."""
    seen = []
    step = torch.optim.AdamW.step

    def watched(self, *args, **options):
        rates = [(group["lr"], group["peak_lr"]) for group in self.param_groups]
        grads = [p.grad.flatten() for group in self.param_groups for p in group["params"] if p.grad is not None]
        seen.append((rates, torch.cat(grads).clone()))
        return step(self, *args, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    return seen


def test_the_learning_rate_follows_its_formula_at_every_step(tmp_path, train_here, steps):
    train_here(tmp_path / "run", "optim.warmup_fraction=0.25", "optim.lr=1e-3", "trainer.max_epochs=4")
    assert len(steps) == 8
    for number, (rates, _) in enumerate(steps):
        # Two of eight steps warm up; the other six are half a cosine, which ends after the last.
        factor = (number + 1) / 2 if number < 2 else 0.5 * (1 + math.cos(math.pi * (number - 2) / 6))
        assert all(rate == pytest.approx(peak * factor) for rate, peak in rates)
        assert AdamW(warmup_fraction=0.25).lr_factor(number, 8) == pytest.approx(factor)


def test_gradients_are_clipped_by_their_common_norm_and_keep_their_direction(tmp_path, train_here, steps):
    train_here(tmp_path / "free", "trainer.gradient_clip_norm=null", "trainer.max_epochs=1")
    free = steps[0][1]
    steps.clear()
    bound = 0.5 * free.norm().item()
    train_here(tmp_path / "bound", f"trainer.gradient_clip_norm={bound}", "trainer.max_epochs=1")
    assert steps[0][1].norm().item() == pytest.approx(bound, rel=1e-4)
    assert torch.cosine_similarity(steps[0][1], free, dim=0).item() == pytest.approx(1, abs=1e-4)


def test_prompts_are_embedded_before_the_first_step_and_never_again(tmp_path, train_here, steps, monkeypatch):
    calls = []
    embed = table.embeddings_of
    monkeypatch.setattr(table, "embeddings_of", lambda *args: (calls.append(len(steps)), embed(*args))[1])
    train_here(tmp_path / "run")
    assert len(steps) == 8 and calls and set(calls) == {0}


def test_each_epoch_has_an_order_of_its_own(tmp_path, train_here, monkeypatch):
    seen = []
    of = PairData.train_batch
    monkeypatch.setattr(PairData, "train_batch", lambda *args: (seen.append(batch := of(*args)), batch)[1])
    train_here(tmp_path / "run")
    rows = [batch.rows.tolist() for batch in seen]
    epochs = [first + second for first, second in zip(rows[::2], rows[1::2], strict=True)]
    assert len(epochs) == 4 and len({tuple(epoch) for epoch in epochs}) == 4
    assert all(epoch != sorted(epoch) and len(set(epoch)) == len(epoch) for epoch in epochs)


def test_scores_are_taken_in_evaluation_mode_and_training_goes_on_after_them(tmp_path, train_here, monkeypatch):
    seen = []
    encode = Timm.encode

    def watched(self, pixels):
        seen.append((torch.is_grad_enabled(), self.model.training))
        return encode(self, pixels)

    monkeypatch.setattr(Timm, "encode", watched)
    train_here(tmp_path / "run", "head.dropout=0.5", "trainer.max_epochs=3")
    assert set(seen) == {(True, True), (False, False)}
    # A score after each epoch, and training again after it.
    assert seen.count((True, True)) == 6 and seen.index((False, False)) < len(seen) - 1 - seen[::-1].index((True, True))


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_hostile_state_executes_nothing(wrapped, tmp_path, train_here, unfinished):
    marker = tmp_path / "marker"

    class Hostile:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    state = {**read_state(unfinished / "checkpoints"), "crc32": 0, "optimizer": Hostile()}
    for name in (LAST, PREVIOUS):
        path = unfinished / "checkpoints" / name
        if wrapped:
            torch.save(state, path)
        else:
            path.write_bytes(pickle.dumps(Hostile(), protocol=2))
    # As if the last rung had not been climbed yet.
    ladder = unfinished / "ladder.csv"
    ladder.write_text("".join(ladder.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(ValueError, match="damaged training state"):
        train_here(unfinished)
    assert not marker.exists()


def test_a_state_with_more_than_a_stage_writes_is_refused(unfinished, tmp_path):
    state = read_state(unfinished / "checkpoints")
    torch.save({**state, "crc32": 0, "hyper_parameters": {"_instantiator": "os.system"}}, tmp_path / LAST)
    with pytest.raises(ValueError, match="not what a stage writes"):
        read_state(tmp_path)


@pytest.mark.parametrize(
    ("command", "keys"),
    [
        ("train", ("data.batch_size", "trainer.accumulate_grad_batches", "trainer.activation_checkpointing")),
        ("predict", ("batch_size",)),
        ("merge", ("batch_size", "device=cpu")),
        ("fit", ("refiner.centroids", "device=cpu")),
    ],
)
def test_a_gpu_without_enough_memory_is_told_which_settings_need_less(command, keys):
    told = sentence_of(command, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    assert all(key in told for key in keys) and "2.00 GiB" in told
