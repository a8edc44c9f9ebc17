"""What a head may read besides the pooled features: means of the last blocks, and the tokens of the last one."""

import pytest
import torch
from encoders.test_blocks import FAMILIES
from encoders.test_families import pixels_for

from img2prompt.build import build
from img2prompt.encoders.encoder import Encoder
from img2prompt.regressor import Target, build_regressor, load_regressor

ATTENTION = {"_target_": "img2prompt.heads.AttentionPool", "heads": 2}


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_and_tokens_come_with_the_same_pooled_features(family):
    torch.manual_seed(0)
    encoder = build(FAMILIES[family], Encoder).eval()
    inputs = pixels_for(encoder)
    with torch.no_grad():
        alone = encoder(inputs).pooled
        features = encoder(inputs, layers=2, tokens=True)
        both = encoder.encode_layers(encoder.normalise(inputs["images"]), 2)[1]
    assert torch.allclose(features.pooled[:, : encoder.width], alone, atol=1e-5)
    pooled, width = encoder.widths(2, True)
    assert features.pooled.shape == (len(alone), pooled) and features.tokens.shape[2] == width
    # In the order of the blocks; the last is the one whose tokens are given.
    channels = [said.shape[1] if said.ndim == 4 else said.shape[2] for said in both]
    assert pooled == encoder.width + sum(channels) and width == channels[-1]
    assert torch.allclose(features.pooled[:, -width:], features.tokens.mean(1), atol=1e-5)
    assert encoder.widths(0, False) == (encoder.width, 0)


@pytest.mark.parametrize("family", ["vit_h", "timm_vit", "hf vit"])
def test_the_tokens_are_the_last_blocks_own(family):
    torch.manual_seed(0)
    encoder = build(FAMILIES[family], Encoder).eval()
    last = {id(parameter) for parameter in encoder.blocks()[-1]}
    # Of the modules whose parameters are all of the last group the first is the block.
    own = ({id(parameter) for parameter in module.parameters()} for module in encoder.modules())
    block = next(m for m, held in zip(encoder.modules(), own, strict=True) if len(held) > 4 and held <= last)
    said = []
    block.register_forward_hook(lambda m, args, out: said.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        tokens = encoder(pixels_for(encoder), tokens=True).tokens
    # The class token, if there is one, may be left out.
    assert torch.allclose(tokens, said[-1][:, said[-1].shape[1] - tokens.shape[1] :], atol=1e-5)


@pytest.mark.parametrize("family", ["vit_h", "timm_vit", "hf vit"])
def test_a_head_that_pools_by_attention_begins_as_the_affine_map_and_then_reads_the_tokens(family, tmp_path):
    torch.manual_seed(0)
    encoder = build(FAMILIES[family], Encoder).eval()
    regressor = build_regressor(encoder, ATTENTION, Target("x", None, 8)).eval()
    weight, bias = torch.randn(8, encoder.width), torch.randn(8)
    regressor.head.set_affine(weight, bias)
    inputs = pixels_for(encoder)
    with torch.no_grad():
        affine = torch.nn.functional.normalize(encoder(inputs).pooled @ weight.T + bias, dim=-1)
        assert torch.allclose(regressor(inputs).embedding, affine, atol=1e-5)
        regressor.head.found.weight.normal_()
        moved = regressor(inputs).embedding
    assert not torch.allclose(moved, affine, atol=1e-2)
    regressor.save(tmp_path / "a.safetensors")
    with torch.no_grad():
        assert torch.allclose(load_regressor(tmp_path / "a.safetensors")(inputs).embedding, moved, atol=1e-6)


def test_attention_finds_the_token_that_its_query_asks_for():
    from img2prompt.encoders.encoder import Features
    from img2prompt.heads import AttentionPool

    torch.manual_seed(0)
    head = AttentionPool(4, 3, 8, heads=1).eval()
    tokens = torch.randn(2, 5, 8)
    with torch.no_grad():
        head.set_affine(torch.zeros(3, 4), torch.zeros(3))
        head.found.weight.normal_()
        head.attention.in_proj_weight.copy_(torch.eye(8).repeat(3, 1))
        head.attention.out_proj.weight.copy_(torch.eye(8))
        # So long a query has its whole weight on the token most like it.
        head.query.copy_(1000 * head.norm(tokens)[:1, 3])
        found = head(Features(torch.zeros(2, 4), tokens)).embedding[0]
        expected = torch.nn.functional.normalize(head.found(head.norm(tokens)[0, 3]), dim=-1)
    assert torch.allclose(found, expected, atol=1e-4)


def test_more_layers_than_there_are_are_refused():
    encoder = build(FAMILIES["hf vit"], Encoder)
    with pytest.raises(ValueError, match=r"head.layers=9, the encoder has 2"):
        encoder.widths(9, False)


@pytest.mark.parametrize(
    ("head", "sentence"),
    [
        ({"_target_": "img2prompt.heads.Linear", "layers": -1}, "head.layers must be at least 0, got -1"),
        ({**ATTENTION, "heads": 7}, "head.queries=1, head.heads=7: need at least 1, and heads that divide"),
        ({**ATTENTION, "queries": 0}, "head.queries=0"),
    ],
)
def test_widths_that_mean_nothing_are_refused(head, sentence):
    with pytest.raises(ValueError, match=sentence):
        build_regressor(build(FAMILIES["timm_vit"], Encoder), head, Target("x", None, 8))
