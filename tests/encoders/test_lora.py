"""Adapters: nothing at first, then what they learn is the same as other weights."""

import pytest
import torch
from encoders.test_blocks import FAMILIES
from encoders.test_families import pixels_for

from img2prompt.build import build
from img2prompt.encoders.encoder import Encoder
from img2prompt.encoders.lora import add_adapters, linear_layers, remove_adapters
from img2prompt.regressor import merged_state


def close(first, second):
    return bool((first - second).abs().max() <= 1e-3 * first.abs().max())


@pytest.mark.parametrize("family", ["vit_h", "timm_vit", "eva02_l", "convnext_xxl", "hf vit", "hf swin"])
def test_adapters_are_nothing_at_first_and_then_as_good_as_weights(family):
    torch.manual_seed(0)
    encoder = build(FAMILIES[family], Encoder).eval()
    plain = {key: value.clone() for key, value in encoder.state_dict().items()}
    inputs, layers = pixels_for(encoder), linear_layers(encoder)
    assert len(layers) >= 2 * len(encoder.block_modules())
    if family == "convnext_xxl":
        # Its blocks are scaled by so little at first that nothing in them is seen.
        for name, parameter in encoder.named_parameters():
            if name.endswith("gamma"):
                parameter.data.fill_(1.0)
    with torch.no_grad():
        before = encoder(inputs).pooled
        add_adapters(encoder, 2, 8)
        assert close(encoder(inputs).pooled, before)
        learns = {name for name, parameter in encoder.named_parameters() if parameter.requires_grad}
        assert learns and all(".lora_" in name for name in learns) and len(learns) == 2 * len(layers)
        for parameter in encoder.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
        learnt, merged = encoder(inputs).pooled, merged_state(encoder)
        assert not close(learnt, before)
        remove_adapters(encoder)
        assert encoder.state_dict().keys() == plain.keys() == merged.keys()
        assert torch.equal(encoder(inputs).pooled, before)
        encoder.load_state_dict(merged)
        assert close(encoder(inputs).pooled, learnt)
    # Each of them learns: none is beside what the model computes.
    add_adapters(encoder, 2, 8)
    for parameter in encoder.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.2)
    encoder(inputs).pooled.square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in encoder.parameters() if parameter.requires_grad)
    # Every parameter is still in exactly one group of the blocks.
    blocks = [id(parameter) for block in encoder.blocks() for parameter in block]
    assert sorted(blocks) == sorted(id(parameter) for parameter in encoder.parameters())
