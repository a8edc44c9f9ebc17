"""What a fine-tune may do besides training all of an encoder at one size."""

import killing
import pytest
import torch
from conftest import read_csv
from hydra.errors import InstantiationException
from safetensors.torch import load_file

from img2prompt.encoders.timm_model import Timm
from img2prompt.regressor import read_header

LARGER = ("stages=progressive", "stages.finetune_larger.image_size_px=48", "trainer.max_epochs=2")
LARGER = (*LARGER, "stages.finetune_larger.epochs_scratch=3")
LARGER += tuple(f"stages.{rung}.log_every_n_steps=1" for rung in ("finetune", "finetune_larger"))


def weights(folder, rung="finetune"):
    return load_file(folder / "checkpoints" / f"{rung}.safetensors")


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_the_last_rung_has_a_larger_input_and_predicts_with_it(tmp_path, train_here, pairs_folder):
    from conftest import PREDICT

    from img2prompt.commands.predict import predict

    train_here(tmp_path / "run", *LARGER)
    checkpoints = tmp_path / "run" / "checkpoints"
    sizes = [read_header(checkpoints / f"{rung}.safetensors").encoder for rung in ("finetune", "finetune_larger")]
    assert [config["image_size_px"] for config in sizes] == [32, 48]
    first, larger = weights(tmp_path / "run"), weights(tmp_path / "run", "finetune_larger")
    moved = {key for key in first if first[key].shape != larger[key].shape}
    assert moved == {"encoder.model.pos_embed"}
    rows = {row["rung"]: row for row in read_csv(tmp_path / "run" / "ladder.csv")}
    assert float(rows["finetune_larger"]["val_cosine"]) > 0
    for rung in ("finetune", "finetune_larger"):
        out = tmp_path / f"{rung}.csv"
        predict(str(checkpoints / f"{rung}.safetensors"), str(pairs_folder / "images"), str(out), **PREDICT)
    assert (tmp_path / "finetune.csv").read_bytes() != (tmp_path / "finetune_larger.csv").read_bytes()


def test_the_steps_of_all_rungs_are_counted_on(tmp_path, train_here):
    train_here(tmp_path / "run", *LARGER)
    rows = read_csv(tmp_path / "run" / "metrics.csv")
    # Two epochs of two steps, then three.
    assert [int(row["step"]) for row in rows] == list(range(1, 11))
    assert [int(row["step"]) for row in rows if row["val/cosine"]] == [2, 4, 6, 8, 10]


def test_the_epochs_of_the_best_rung_are_merged(tmp_path, train_here):
    from img2prompt.commands.merge import _of

    train_here(tmp_path / "run", *LARGER, "trainer.keep_checkpoints=2")
    rungs = {row["rung"]: row["val_cosine"] for row in read_csv(tmp_path / "run" / "ladder.csv")}
    best = max(("finetune", "finetune_larger"), key=lambda rung: float(rungs[rung]))
    found = _of(tmp_path / "run")
    assert len(found) == 2 and all(path.name.startswith(f"{best}_step") for path in found)


def test_patch_dropout_that_no_epoch_would_see_is_refused(tmp_path, train_here):
    with pytest.raises(ValueError, match="patch_dropout=0.5 is without effect: unmasked_epochs=1 of its 1 epochs"):
        train_here(tmp_path / "run", "stages.finetune.patch_dropout=0.5", "trainer.max_epochs=1")


@pytest.mark.parametrize("number", [5, *(pytest.param(one, marks=pytest.mark.slow) for one in (2, 9))])
def test_a_run_with_a_larger_rung_goes_on_to_the_byte(number, tmp_path, train_here, monkeypatch):
    train_here(tmp_path / "whole", *LARGER)
    # Four steps at the first size, six at the second.
    with monkeypatch.context() as patch:
        killing.arm("step", number, killing.raise_killed, patch.setattr)
        with pytest.raises(killing.Killed):
            train_here(tmp_path / "halves", *LARGER, "trainer.checkpoint_every_n_steps=1")
    train_here(tmp_path / "halves", *LARGER, "trainer.checkpoint_every_n_steps=1")
    for rung in ("finetune", "finetune_larger"):
        assert equal(weights(tmp_path / "halves", rung), weights(tmp_path / "whole", rung))
    assert (tmp_path / "halves" / "metrics.csv").read_bytes() == (tmp_path / "whole" / "metrics.csv").read_bytes()


def test_the_last_epochs_see_every_patch(tmp_path, train_here, monkeypatch):
    seen = []
    encode = Timm.encode

    def watched(self, pixels):
        if self.model.training:
            block = self.model.blocks[-1]
            hook = block.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
            pooled = encode(self, pixels)
            hook.remove()
            return pooled
        return encode(self, pixels)

    monkeypatch.setattr(Timm, "encode", watched)
    options = ("stages.finetune.patch_dropout=0.5", "stages.finetune.unmasked_epochs=1", "trainer.max_epochs=3")
    train_here(tmp_path / "run", *options)
    # 32 pixels in patches of 8 are 16 and a class token; two steps in each of three epochs.
    assert seen == [9, 9, 9, 9, 17, 17]


def test_the_learning_rate_of_a_stage_is_its_share_of_the_peak(tmp_path, train_here):
    rates = {}
    for factor in (1.0, 0.25):
        run = tmp_path / str(factor)
        train_here(run, f"stages.finetune.lr_factor={factor}", "stages.finetune.log_every_n_steps=1")
        rates[factor] = [float(row["lr"]) for row in read_csv(run / "metrics.csv") if row["lr"]]
    assert rates[0.25] == pytest.approx([0.25 * rate for rate in rates[1.0]])


def test_activation_checkpointing_is_switched_on_and_changes_no_number(tmp_path, train_here, finished_run, monkeypatch):
    seen = []
    encode = Timm.encode
    watched = lambda self, pixels: (seen.append(self.model.grad_checkpointing), encode(self, pixels))[1]  # noqa: E731
    monkeypatch.setattr(Timm, "encode", watched)
    train_here(tmp_path / "run", "trainer.activation_checkpointing=true")
    assert all(seen)
    for key, value in weights(finished_run).items():
        assert torch.allclose(weights(tmp_path / "run")[key], value, atol=1e-5), key


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's compiler looks at it
def test_compiled_blocks_train_to_nearly_the_same_losses(tmp_path, train_here):
    from torch._dynamo.utils import counters

    losses = []
    for compiled in (False, True):
        run = tmp_path / str(compiled)
        counters.clear()
        train_here(run, f"trainer.compile={compiled}", "stages.finetune.log_every_n_steps=1", "optim.lr=1e-4")
        losses.append([float(row["train/cosine"]) for row in read_csv(run / "metrics.csv") if row["train/cosine"]])
        # Six blocks that are alike: one graph for training and one for scoring, and what other batch sizes want.
        assert (0 < counters["stats"]["unique_graphs"] <= 6) == compiled
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


LORA = ("stages.finetune.lora_rank=4", "optim.lr=1e-3")


def test_adapters_learn_and_are_saved_as_weights_of_their_rank(tmp_path, train_here):
    start = ("trainer.max_epochs=1", "stages.finetune.lr_factor=0")
    train_here(tmp_path / "start", *start)
    train_here(tmp_path / "run", *LORA)
    before, after = weights(tmp_path / "start"), weights(tmp_path / "run")
    assert before.keys() == after.keys()
    moved = {key for key in before if key.startswith("encoder.") and not torch.equal(before[key], after[key])}
    linear = {f"encoder.model.blocks.{i}.{name}.weight" for i in range(6) for name in LINEAR}
    assert moved == linear
    for key in linear:
        assert 1 <= torch.linalg.matrix_rank(after[key] - before[key], rtol=1e-3) <= 4
    assert not torch.equal(before["head.weight"], after["head.weight"])


LINEAR = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


@pytest.mark.parametrize("number", [5, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_with_adapters_goes_on_to_the_byte(number, tmp_path, train_here, monkeypatch):
    options = (*LORA, "optim.ema_decay=0.9", "stages.finetune.unfrozen_blocks=3")
    train_here(tmp_path / "whole", *options)
    with monkeypatch.context() as patch:
        killing.arm("step", number, killing.raise_killed, patch.setattr)
        with pytest.raises(killing.Killed):
            train_here(tmp_path / "halves", *options, "trainer.checkpoint_every_n_steps=1")
    train_here(tmp_path / "halves", *options, "trainer.checkpoint_every_n_steps=1")
    assert equal(weights(tmp_path / "halves"), weights(tmp_path / "whole"))
    assert (tmp_path / "halves" / "metrics.csv").read_bytes() == (tmp_path / "whole" / "metrics.csv").read_bytes()
    # Of the blocks the last three learn.
    still = weights(tmp_path / "whole")["encoder.model.blocks.2.mlp.fc1.weight"]
    train_here(tmp_path / "start", "trainer.max_epochs=1", "stages.finetune.lr_factor=0")
    assert torch.equal(weights(tmp_path / "start")["encoder.model.blocks.2.mlp.fc1.weight"], still)


def test_a_rung_that_was_the_best_when_it_was_stopped_is_so_no_more_when_another_is(tmp_path, train_here, monkeypatch):
    import json

    from img2prompt.training import callbacks

    score, sound = callbacks.Keep._score, callbacks.Keep._keep

    def flattered(self, cosine, module, whole):
        sound(self, cosine if whole else 0.99, module, whole)

    with monkeypatch.context() as patch:
        patch.setattr(callbacks.Keep, "_keep", flattered)
        train_here(tmp_path / "run", "trainer.max_time=00:00:00:00")
    assert score is callbacks.Keep._score
    train_here(tmp_path / "run", "trainer.max_time=00:01:00:00")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["best_rung"] == "mean"
    assert equal(weights(tmp_path / "run", "best"), weights(tmp_path / "run", "mean"))
    assert read_header(tmp_path / "run" / "checkpoints" / "best.safetensors").scores["rung"] == "mean"


@pytest.mark.parametrize("content", [None, "", "rung,val_cosine\nmean,0.5\n", "garbage"])
def test_a_lost_or_damaged_ladder_is_told_and_nothing_is_climbed_anew(content, unfinished, train_here):
    ladder, before = unfinished / "ladder.csv", weights(unfinished)
    if content is None:
        ladder.unlink()
    else:
        ladder.write_text(content)
    with pytest.raises(ValueError, match="ladder.csv: damaged"):
        train_here(unfinished)
    assert equal(weights(unfinished), before)


def test_init_from_goes_on_at_another_input_size_and_with_the_very_head(tmp_path, train_here, finished_run):
    start = f"init_from={finished_run}"
    train_here(tmp_path / "larger", start.replace(str(finished_run), best_of(finished_run)), "encoder.image_size_px=48")
    assert read_header(tmp_path / "larger" / "checkpoints" / "finetune.safetensors").encoder["image_size_px"] == 48
    with pytest.raises(ValueError, match="its head has layers=0, this run's 2; choose the same"):
        train_here(tmp_path / "layers", f"init_from={best_of(finished_run)}", "head.layers=2")


def best_of(run):
    return str(run / "checkpoints" / "finetune.safetensors")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("stages=progressive", "stages.finetune_larger.image_size_px=37"), "finetune_larger.image_size_px=37: "),
        (("stages.finetune.lora_rank=2", "stages.finetune.unfrozen_blocks=0"), "no block would learn"),
        (("loss=softmax", "data.batch_size=1"), "data.batch_size=1: a batch of one has no negatives"),
        (("loss=cosine_softmax", "data.batch_size=1"), "data.batch_size=1: a batch of one has no negatives"),
        (("+stages.best=${stages.finetune}",), "stages.best: checkpoints/best.safetensors is another file"),
        (("head=mlp", "head.hidden=0"), "head.hidden must be at least 1, got 0"),
        (
            tuple(f"stages.{rung}=null" for rung in ("mean", "text_only", "probe", "finetune")),
            "stages: no rung is left to climb",
        ),
        (("stages.finetune.lora_rank=0",), "stages.finetune.lora_rank must be at least 1, got 0"),
        (("stages.finetune.patch_dropout=0.5", "encoder.name=test_resnet"), "it has no patches that could be left out"),
        (("stages.finetune.patch_dropout=1.5",), "stages.finetune.patch_dropout must be from 0 to below 1"),
        (("stages.finetune.lora_rank=1000",), "lora_rank=1000: no layer of the blocks has a weight of a rank above 64"),
        (("stages=progressive", "stages.finetune_larger.lr_factor=-1"), "stages.finetune_larger.lr_factor must be"),
        (("stages.finetune.lr_factor=-1",), "stages.finetune.lr_factor must be at least 0, got -1"),
        (
            ("stages=progressive", "stages.finetune_larger.image_size_px=0"),
            "image_size_px must be at least 1",
        ),
        (("encoder.drop_path=1.0",), "encoder.drop_path must be from 0 to below 1, got 1.0"),
        (("stages.finetune.unfrozen_blocks=99",), "unfrozen_blocks=99: the encoder has 7 blocks"),
    ],
)
def test_what_an_encoder_cannot_do_is_refused_before_anything_is_read(options, sentence, tmp_path, train_here):
    own = ("~encoder.model_kwargs.patch_size",) if "encoder.name=test_resnet" in options else ()
    # Hydra wraps what a constructor raises; the door takes its sentence out.
    with pytest.raises((ValueError, InstantiationException), match=sentence):
        train_here(tmp_path / "run", "data.root=nowhere", *options, *own)
