"""What changes how an encoder trains and not what it is: fewer patches, fewer blocks, larger inputs, less memory."""

import pytest
import torch
from encoders.test_blocks import FAMILIES
from encoders.test_families import pixels_for

from img2prompt.build import build
from img2prompt.encoders.encoder import Encoder
from img2prompt.regressor import Target, build_regressor, load_regressor

TRANSFORMERS = ["vit_h", "timm_vit", "eva02_l", "siglip"]


def encoder_of(family, **more):
    torch.manual_seed(0)
    return build({**FAMILIES[family], **more}, Encoder)


def tokens_in(encoder, inputs):
    """How many tokens the last block is given."""
    seen = []
    hook = encoder.block_modules()[-1].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    encoder(inputs)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_patches_are_left_out_in_training_alone(family):
    encoder = encoder_of(family)
    inputs = pixels_for(encoder)
    whole = tokens_in(encoder.train(), inputs)
    expected = encoder.eval()(inputs).pooled
    encoder.set_patch_dropout(0.5)
    assert torch.equal(encoder(inputs).pooled, expected)
    part = tokens_in(encoder.train(), inputs)
    # Class tokens stay: at most one of them here.
    assert whole // 2 <= part <= whole // 2 + 1 < whole
    assert not torch.equal(encoder(inputs).pooled, encoder(inputs).pooled)
    features = encoder(inputs, layers=1, tokens=True)
    assert features.tokens.shape[1] < whole
    encoder.set_patch_dropout(0.0)
    assert tokens_in(encoder, inputs) == whole


@pytest.mark.parametrize("family", ["convnext_xxl", "timm_efficientnet", "hf vit"])
def test_patch_dropout_is_refused_where_there_are_no_patches_to_leave_out(family):
    with pytest.raises(ValueError, match="it has no patches that could be left out"):
        encoder_of(family).set_patch_dropout(0.5)


@pytest.mark.parametrize("family", ["vit_h", "timm_vit", "eva02_l", "convnext_xxl", "hf convnext"])
def test_blocks_are_left_out_in_training_alone_and_as_often_as_asked(family):
    plain, encoder = encoder_of(family), encoder_of(family, drop_path=0.9)
    encoder.load_state_dict(plain.state_dict())
    inputs = pixels_for(encoder)
    with torch.no_grad():
        assert torch.equal(encoder.eval()(inputs).pooled, plain.eval()(inputs).pooled)
        # What stays is made larger for what is left out, so that nothing is as it was.
        assert not torch.equal(encoder.train()(inputs).pooled, plain.train()(inputs).pooled)
    assert encoder.config["drop_path"] == 0.9


def test_a_block_is_left_out_for_whole_images_and_its_mean_is_kept():
    from img2prompt.encoders.dropping import drop_blocks

    torch.manual_seed(0)
    blocks = [torch.nn.Linear(4, 4) for _ in range(3)]
    values = torch.randn(1, 1, 4).expand(4000, 2, 4)
    plain = [block(values[:1]) for block in blocks]
    drop_blocks(blocks, 0.4)
    for rate, block, after in zip((0.0, 0.2, 0.4), blocks, plain, strict=True):
        found = block.train()(values)
        left_out = (found == values).flatten(1).all(1)
        assert left_out.float().mean().item() == pytest.approx(rate, abs=0.03)
        assert torch.allclose(found.mean(0), after[0], atol=0.1)


@pytest.mark.parametrize(
    "family", ["vit_h", "timm_vit", "eva02_l", "siglip", "convnext_xxl", "timm_efficientnet", "hf vit", "hf swin"]
)
def test_a_larger_input_keeps_the_weights_and_is_saved(family, tmp_path):
    encoder = encoder_of(family)
    before = encoder.preprocessing.image_size_px
    regressor = build_regressor(encoder, {"_target_": "img2prompt.heads.Linear"}, Target("x", None, 8)).eval()
    small = {key: value.clone() for key, value in encoder.state_dict().items()}
    encoder.set_image_size(2 * before)
    large = encoder.state_dict()
    # Only what belongs to places may have another shape.
    moved = [key for key, value in small.items() if value.shape != large[key].shape]
    assert all("pos" in key or "index" in key or "mask" in key for key in moved)
    assert all(torch.equal(small[key], large[key]) for key in small if key not in moved)
    assert encoder.preprocessing.image_size_px == 2 * before
    inputs = {"images": torch.randint(0, 256, (2, 3, 2 * before, 2 * before), dtype=torch.uint8)}
    with torch.no_grad():
        expected = regressor(inputs).embedding
        regressor.save(tmp_path / "larger.safetensors")
        loaded = load_regressor(tmp_path / "larger.safetensors")
        assert loaded.encoder.preprocessing.image_size_px == 2 * before
        assert torch.allclose(loaded(inputs).embedding, expected, atol=1e-5)


def test_windows_stay_as_large_as_they_were(tmp_path):
    small = {"embed_dim": 16, "depths": [2, 1], "num_heads": [1, 2]}
    config = {"_target_": "img2prompt.encoders.timm_model.Timm", "name": "swin_tiny_patch4_window7_224"}
    encoder = build({**config, "model_kwargs": small}, Encoder).eval()
    regressor = build_regressor(encoder, {"_target_": "img2prompt.heads.Linear"}, Target("x", None, 8)).eval()
    tables = [value.shape for key, value in encoder.state_dict().items() if "bias_table" in key]
    encoder.set_image_size(448)
    assert [value.shape for key, value in encoder.state_dict().items() if "bias_table" in key] == tables
    inputs = {"images": torch.randint(0, 256, (1, 3, 448, 448), dtype=torch.uint8)}
    regressor.save(tmp_path / "larger.safetensors")
    with torch.no_grad():
        loaded = load_regressor(tmp_path / "larger.safetensors")(inputs).embedding
        assert torch.allclose(loaded, regressor(inputs).embedding, atol=1e-5)


def test_resampled_positions_are_those_of_the_same_places():
    encoder = encoder_of("vit_h")
    grid = encoder.visual.grid_size[0]
    ramp = torch.linspace(-1, 1, grid)[:, None].expand(grid, grid).reshape(-1)
    with torch.no_grad():
        encoder.visual.positional_embedding[1:] = ramp[:, None]
    encoder.set_image_size(2 * encoder.preprocessing.image_size_px)
    rows = encoder.visual.positional_embedding[1:, 0].view(2 * grid, 2 * grid)
    # A ramp from above to below is one at the new size too, and the same from left to right.
    assert (rows.diff(dim=0)[grid // 2 : -grid // 2] > 0).all() and torch.allclose(rows[:, 0], rows[:, -1], atol=1e-5)


@pytest.mark.parametrize("family", ["vit_h", "timm_vit", "eva02_l", "convnext_xxl", "timm_efficientnet", "hf vit"])
def test_activations_computed_again_give_the_same_gradients_and_are_not_kept(family):
    found = []
    for on in (False, True):
        encoder = encoder_of(family).train()
        if on:
            encoder.checkpoint_activations()
        kept = []

        def count(tensor, kept=kept):
            kept.append(tensor.numel())
            return tensor

        inputs = pixels_for(encoder)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            torch.manual_seed(1)
            encoder(inputs).pooled.square().sum().backward()
        found.append((sum(kept), [p.grad for p in encoder.parameters() if p.grad is not None]))
    (much, first), (little, second) = found
    assert len(first) == len(second) and all(
        torch.allclose(a, b, atol=1e-6) for a, b in zip(first, second, strict=True)
    )
    assert little < 0.7 * much


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_a_rate_that_means_nothing_is_refused(rate):
    with pytest.raises(ValueError, match=f"encoder.drop_path must be from 0 to below 1, got {rate}"):
        encoder_of("timm_vit", drop_path=rate)
    with pytest.raises(ValueError, match="RN50 has no stochastic depth"):
        build({"_target_": "img2prompt.encoders.openclip.OpenCLIP", "name": "RN50", "drop_path": 0.1}, Encoder)
    with pytest.raises(ValueError, match="clip_vision_model has no stochastic depth"):
        encoder_of("hf clip_vision_model", drop_path=0.1)
