"""The blocks of an encoder: every parameter once, in the order in which an image meets them."""

import pytest
import torch
from encoders.test_families import HUGGINGFACE, STAND_INS, pixels_for, small_architecture

from img2prompt.build import build
from img2prompt.encoders.encoder import Encoder
from img2prompt.encoders.huggingface import MODEL_TYPES
from img2prompt.regressor import Target, build_regressor
from img2prompt.training.optim import AdamW

FAMILIES = {name: config for name, config in STAND_INS.items() if name != "blind"} | {
    f"hf {kind}": {
        "_target_": HUGGINGFACE,
        "name": "x",
        "architecture": {"model_type": kind, **small_architecture(kind)},
    }
    for kind in MODEL_TYPES
}
# The groups of some whose depth is known: what embeds the image, and the blocks.
DEPTHS = {"vit_h": 1 + 2, "timm_vit": 1 + 6, "hf vit": 1 + 2, "hf dinov2": 1 + 2}


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_hold_every_parameter_once_in_the_order_of_the_forward_pass(family):
    torch.manual_seed(0)
    encoder = build(FAMILIES[family], Encoder).eval()
    blocks = encoder.blocks()
    assert sorted(id(p) for block in blocks for p in block) == sorted(id(p) for p in encoder.parameters())
    assert len(blocks) == DEPTHS.get(family, len(blocks)) and len(blocks) > 2
    called = []
    for module in encoder.modules():
        own = [id(p) for p in module.parameters(recurse=False)]
        if own and not list(module.children()):
            module.register_forward_pre_hook(lambda module, args, own=own: called.extend(own))
    with torch.no_grad():
        encoder(pixels_for(encoder))
    first = {parameter: place for place, parameter in reversed(list(enumerate(called)))}
    starts = [min((first[id(p)] for p in block if id(p) in first), default=None) for block in blocks]
    known = [start for start in starts if start is not None]
    assert known == sorted(known) and len(known) >= len(blocks) - 1


@pytest.mark.parametrize("family", FAMILIES)
def test_each_block_learns_slower_than_the_one_above_it_and_all_parameters_learn(family):
    encoder = build(FAMILIES[family], Encoder)
    regressor = build_regressor(encoder, {"_target_": "img2prompt.heads.Linear"}, Target("x", None, 8))
    optim = AdamW(lr=1e-3, head_lr_factor=7.0, layer_decay=0.6, weight_decay=0.1)
    groups = optim.build(regressor, pretrained=True).param_groups
    rates = {id(p): (group["peak_lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(rates) == sum(len(group["params"]) for group in groups) == len(list(regressor.parameters()))
    blocks = encoder.blocks()
    for i, block in enumerate(blocks):
        for parameter in block:
            lr, decay = rates[id(parameter)]
            assert lr == pytest.approx(1e-3 * 0.6 ** (len(blocks) - 1 - i))
            assert decay == (0.1 if parameter.ndim > 1 else 0.0)
    assert all(rates[id(parameter)][0] == pytest.approx(7e-3) for parameter in regressor.head.parameters())


def test_what_is_frozen_stays_and_the_rest_learns(tmp_path, train_here):
    from img2prompt.regressor import load_regressor

    train_here(tmp_path / "all", "trainer.max_epochs=0")
    for count in (0, 2):
        train_here(tmp_path / str(count), f"stages.finetune.unfrozen_blocks={count}", "trainer.max_epochs=1")
    train_here(tmp_path / "every", "trainer.max_epochs=1")
    after = {
        name: load_regressor(tmp_path / name / "checkpoints" / "finetune.safetensors") for name in ("0", "2", "every")
    }
    blocks = {name: regressor.encoder.blocks() for name, regressor in after.items()}
    size = len(blocks["every"])
    moved = {
        name: [
            any(not torch.equal(a, b) for a, b in zip(block, other, strict=True))
            for block, other in zip(groups, blocks["0"], strict=True)
        ]
        for name, groups in blocks.items()
    }
    assert moved["2"] == [False] * (size - 2) + [True] * 2 and all(moved["every"])
    assert not torch.equal(after["0"].head.weight, after["2"].head.weight)
    with pytest.raises(ValueError, match="unfrozen_blocks=99: the encoder has 7 blocks"):
        train_here(tmp_path / "99", "stages.finetune.unfrozen_blocks=99")


def test_no_gradient_is_recorded_before_the_first_block_that_learns(tmp_path, train_here, monkeypatch):
    from img2prompt.training.module import RegressorModule

    seen = []
    step = RegressorModule.training_step

    def watched(self, batch, batch_idx):
        model = self.regressor.encoder.model
        hooks = [
            block.register_forward_hook(lambda module, args, out: seen.append((out.requires_grad, module.training)))
            for block in model.blocks
        ]
        loss = step(self, batch, batch_idx)
        for hook in hooks:
            hook.remove()
        return loss

    monkeypatch.setattr(RegressorModule, "training_step", watched)
    train_here(tmp_path / "run", "stages.finetune.unfrozen_blocks=2", "trainer.max_epochs=1")
    assert seen[:6] == [(False, False)] * 4 + [(True, True)] * 2
