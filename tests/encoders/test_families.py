"""Each family of encoders: saved and loaded offline it is the same; its weights files are read strictly."""

import json

import pytest
import torch
from safetensors.torch import save_file

from img2prompt.build import build
from img2prompt.encoders.encoder import Encoder, Uninitialised
from img2prompt.encoders.huggingface import MODEL_TYPES
from img2prompt.regressor import Target, build_regressor, load_regressor, read_header

OPENCLIP = "img2prompt.encoders.openclip.OpenCLIP"
TIMM = "img2prompt.encoders.timm_model.Timm"
HUGGINGFACE = "img2prompt.encoders.huggingface.HuggingFace"
TINY_VIT = {"layers": 2, "width": 64, "head_width": 32}
TINY_HF = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}

# A small stand-in of each experiment's family, built by the same classes.
STAND_INS = {
    "vit_h": {"_target_": OPENCLIP, "name": "ViT-H-14", "tag": "laion2b_s32b_b79k", "vision_config": TINY_VIT},
    "vit_l": {"_target_": OPENCLIP, "name": "ViT-L-14", "tag": "openai", "vision_config": TINY_VIT},
    "vit_l_336": {"_target_": OPENCLIP, "name": "ViT-L-14-336", "tag": "openai", "vision_config": TINY_VIT},
    "vit_b": {"_target_": OPENCLIP, "name": "ViT-B-16", "tag": "openai", "vision_config": TINY_VIT},
    "vit_b_smaller_input": {
        "_target_": OPENCLIP,
        "name": "ViT-B-16",
        "tag": "openai",
        "image_size_px": 64,
        "vision_config": TINY_VIT,
    },
    "convnext_xxl": {
        "_target_": OPENCLIP,
        "name": "convnext_xxlarge",
        "tag": "laion2b_s34b_b82k_augreg_soup",
        "image_size_px": 64,
        "vision_config": {"timm_model_name": "test_convnext"},
    },
    "eva02_l": {
        "_target_": OPENCLIP,
        "name": "EVA02-L-14",
        "tag": "merged2b_s4b_b131k",
        "image_size_px": 56,
        "vision_config": {"timm_model_name": "eva02_tiny_patch14_224"},
    },
    "siglip": {
        "_target_": OPENCLIP,
        "name": "ViT-SO400M-14-SigLIP",
        "tag": "webli",
        "image_size_px": 64,
        "vision_config": {"timm_model_name": "vit_base_patch16_siglip_224"},
    },
    "timm_vit": {"_target_": TIMM, "name": "test_vit", "image_size_px": 48},
    "timm_efficientnet": {"_target_": TIMM, "name": "test_efficientnet"},
    "timm_mobilenet": {"_target_": TIMM, "name": "mobilenetv3_small_050"},
    "dinov2": {
        "_target_": HUGGINGFACE,
        "name": "x",
        "architecture": {"model_type": "dinov2", "image_size": 28, **TINY_HF},
    },
    "hf_clip": {
        "_target_": HUGGINGFACE,
        "name": "x",
        "architecture": {"model_type": "clip_vision_model", "image_size": 64, **TINY_HF},
    },
    "hf_vit": {
        "_target_": HUGGINGFACE,
        "name": "x",
        "architecture": {"model_type": "vit", "image_size": 32, **TINY_HF},
    },
    "blind": {"_target_": "img2prompt.encoders.blind.Blind"},
}


def pixels_for(encoder, count=3):
    size = encoder.preprocessing.image_size_px
    generator = torch.Generator().manual_seed(0)
    return {"images": torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)}


def regressor_of(config, **options):
    torch.manual_seed(0)
    encoder = build({**config, **options}, Encoder)
    target = Target("somebody/model", "main", 24)
    return build_regressor(encoder, {"_target_": "img2prompt.heads.Linear"}, target).eval()


@torch.no_grad()
def check_round_trip(config, path):
    regressor = regressor_of(config)
    regressor.target_mean.uniform_()
    inputs = pixels_for(regressor.encoder)
    before = regressor(inputs).embedding
    regressor.save(path, {"val_cosine": 0.5})
    loaded = load_regressor(path)
    assert (loaded(inputs).embedding - before).abs().max() <= 1e-6
    assert torch.equal(loaded.target_mean, regressor.target_mean)
    assert loaded.encoder.config == regressor.encoder.config
    assert loaded.encoder.preprocessing == regressor.encoder.preprocessing
    return read_header(path)


@pytest.mark.parametrize("family", STAND_INS)
def test_a_saved_regressor_is_loaded_offline_and_is_the_same(family, tmp_path):
    header = check_round_trip(STAND_INS[family], tmp_path / "model.safetensors")
    assert header.target == Target("somebody/model", "main", 24) and header.scores == {"val_cosine": 0.5}


def test_uninitialised_layers_draw_nothing_and_buffers_are_computed():
    before = torch.get_rng_state()
    with Uninitialised():
        torch.nn.Linear(300, 200), torch.nn.Conv2d(3, 8, 3)
        assert torch.equal(torch.get_rng_state(), before)
        empty = build(STAND_INS["eva02_l"], Encoder)
    # Rotary positions, which no checkpoint holds.
    computed = dict(build(STAND_INS["eva02_l"], Encoder).named_buffers())
    assert computed and all(torch.equal(value, computed[name]) for name, value in empty.named_buffers())


TRUE_SIZES = ["vit_b", "vit_l", "vit_l_336", "eva02_l", "siglip", "vit_h", "convnext_xxl"]


@pytest.mark.slow
@pytest.mark.parametrize("experiment", TRUE_SIZES)
def test_an_experiment_of_true_size_is_saved_and_loaded_the_same(experiment, tmp_path):
    from conftest import settings_of

    choice = dict(settings_of(f"+experiment={experiment}", "data.root=x")["encoder"])
    choice.pop("pretrained")
    check_round_trip(choice, tmp_path / "model.safetensors")


def test_the_facts_of_a_tag_hold_without_its_weights():
    siglip = regressor_of(STAND_INS["siglip"]).encoder
    assert siglip.preprocessing.mean == (0.5, 0.5, 0.5) and siglip.preprocessing.resize_mode == "squash"
    openai, laion = regressor_of(STAND_INS["vit_l"]).encoder, regressor_of(STAND_INS["vit_h"]).encoder
    assert openai.facts["quick_gelu"] is True and laion.facts["quick_gelu"] is False
    activation = type(openai.visual.transformer.resblocks[0].mlp.gelu).__name__
    assert activation == "QuickGELU"


@pytest.mark.parametrize("option", [{"mean": [0.1, 0.2, 0.3]}, {"std": [0.1, 0.2, 0.3]}])
def test_preprocessing_can_be_overridden_and_matters(option):
    plain, changed = regressor_of(STAND_INS["timm_vit"]), regressor_of(STAND_INS["timm_vit"], **option)
    inputs = pixels_for(plain.encoder)
    assert not torch.allclose(plain(inputs).embedding, changed(inputs).embedding)


@pytest.mark.parametrize(
    "family", ["vit_b", "convnext_xxl", "eva02_l", "timm_vit", "timm_efficientnet", "hf_vit", "dinov2"]
)
@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_a_local_weights_file_gives_the_encoder_it_came_from(family, ending, tmp_path):
    source = regressor_of(STAND_INS[family]).encoder
    if family == "eva02_l":
        # At another size its positions would be resampled, and so change.
        source = regressor_of(STAND_INS[family], image_size_px=224).encoder
    state = {key.split(".", 1)[1]: value.contiguous() for key, value in source.state_dict().items()}
    if family in ("vit_b", "convnext_xxl", "eva02_l"):
        # As published: both towers in one file.
        state = {f"visual.{key}": value for key, value in state.items()} | {"logit_scale": torch.zeros(())}
    path = str(tmp_path / f"weights.{ending}")
    save_file(state, path) if ending == "safetensors" else torch.save({"state_dict": state}, path)
    torch.manual_seed(1)
    fresh = build(source.config, Encoder)
    inputs = pixels_for(source)
    with torch.no_grad():
        expected = source.eval()(inputs).pooled
        assert not torch.allclose(fresh.eval()(inputs).pooled, expected, atol=1e-3)
        fresh.load_pretrained(path)
        assert torch.allclose(fresh.eval()(inputs).pooled, expected, atol=1e-6)


def test_a_classifier_in_the_file_is_dropped(tmp_path):
    import timm

    whole = timm.create_model("test_efficientnet", num_classes=10).eval()
    save_file(whole.state_dict(), tmp_path / "w.safetensors")
    encoder = build(STAND_INS["timm_efficientnet"], Encoder)
    encoder.load_pretrained(str(tmp_path / "w.safetensors"))
    pixels = encoder.normalise(pixels_for(encoder)["images"])
    with torch.no_grad():
        expected = whole.forward_head(whole.forward_features(pixels), pre_logits=True)
        assert torch.allclose(encoder.eval().encode(pixels), expected, atol=1e-6)


@pytest.mark.parametrize("family", ["vit_b", "timm_vit", "eva02_l"])
def test_positions_are_resampled_to_a_larger_input_and_all_else_is_kept(family, tmp_path):
    native = {"timm_vit": 160, "eva02_l": 224}.get(family, 224)
    source = build({**STAND_INS[family], "image_size_px": native}, Encoder)
    prefix = "" if family == "timm_vit" else "visual."
    state = {prefix + key.split(".", 1)[1]: value.contiguous() for key, value in source.state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    larger = build({**STAND_INS[family], "image_size_px": 2 * native}, Encoder)
    larger.load_pretrained(str(tmp_path / "w.safetensors"))
    resampled = []
    for key, value in larger.state_dict().items():
        before = source.state_dict()[key]
        if before.shape == value.shape:
            assert torch.equal(before, value)
        else:
            resampled.append(key)
            # Twice as fine in both directions: four positions average to the one that they came from, about.
            small, large = before.reshape(-1, before.shape[-1]), value.reshape(-1, value.shape[-1])
            side = int(len(small) ** 0.5)
            grid = large[-4 * side * side :].T.reshape(1, -1, 2 * side, 2 * side)
            pooled = torch.nn.functional.avg_pool2d(grid, 2).reshape(-1, side * side).T
            assert torch.corrcoef(torch.stack([pooled.flatten(), small[-side * side :].flatten()]))[0, 1] > 0.8
    assert len(resampled) == 1


def test_wrong_weights_files_are_named(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "marker"), "w"))

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "text.safetensors").write_text("hello")
    (tmp_path / "text.pt").write_text("hello")
    save_file({"something": torch.zeros(1)}, tmp_path / "other.safetensors")
    for family in ("vit_b", "timm_vit", "hf_vit"):
        encoder = build(STAND_INS[family], Encoder)
        for name, sentence in {
            "none.pt": "no such weights file",
            "evil.pt": "refused, it holds more than plain tensors",
            "text.safetensors": "cannot be read as weights",
            "text.pt": "cannot be read as weights|refused",
            "other.safetensors": "not the weights of",
        }.items():
            with pytest.raises(ValueError, match=f"{name}.*({sentence})"):
                encoder.load_pretrained(str(tmp_path / name))
    assert not (tmp_path / "marker").exists()


def small_architecture(model_type):
    if model_type.startswith(("convnext", "dinov3_convnext")):
        return {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
    if model_type.startswith("swin"):
        return {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8], "image_size": 224}
    return {**TINY_HF, "image_size": 56, "patch_size": 14}


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_huggingface_model_is_loaded_from_what_its_authors_save(model_type, tmp_path):
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(3)
    config = AutoConfig.for_model(model_type, **small_architecture(model_type))
    published = AutoModel.from_config(config).eval()
    published.save_pretrained(tmp_path)
    choice = {"_target_": HUGGINGFACE, "name": str(tmp_path)}
    encoder = build(choice, Encoder).eval()
    inputs = pixels_for(encoder)
    pixels = encoder.normalise(inputs["images"])
    for path in (None, str(tmp_path / "model.safetensors")):
        encoder = build(choice, Encoder).eval()
        encoder.load_pretrained(path)
        with torch.no_grad():
            expected = published(pixel_values=pixels)
            if getattr(expected, "pooler_output", None) is None or model_type in ("vit", "deit"):
                expected = expected.last_hidden_state.mean(1)
            else:
                expected = expected.pooler_output.flatten(1)
            first, second = encoder(inputs).pooled, encoder(inputs).pooled
        assert torch.allclose(first, expected, atol=1e-5) and torch.equal(first, second)
    larger = build({**choice, "image_size_px": 2 * encoder.preprocessing.image_size_px}, Encoder).eval()
    larger.load_pretrained()
    with torch.no_grad():
        seen = larger(pixels_for(larger)).pooled
    assert seen.shape == first.shape and seen.isfinite().all()
    check_round_trip(larger.config, tmp_path / "larger.safetensors")


def test_a_huggingface_folder_is_read_with_its_preprocessing_and_weights(tmp_path):
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(3)
    model = Dinov2Model(Dinov2Config(**{**TINY_HF, "image_size": 28})).eval()
    model.save_pretrained(tmp_path)
    wanted = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "size": {"shortest_edge": 28}, "resample": 2}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(wanted))
    encoder = build({"_target_": HUGGINGFACE, "name": str(tmp_path)}, Encoder)
    encoder.load_pretrained()
    assert encoder.preprocessing.mean == (0.1, 0.2, 0.3) and encoder.preprocessing.interpolation == "bilinear"
    inputs = pixels_for(encoder)
    with torch.no_grad():
        expected = model(encoder.normalise(inputs["images"])).pooler_output
        assert torch.allclose(encoder.eval()(inputs).pooled, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"_target_": OPENCLIP, "name": "ViT-Q-14"}, "encoder.name=ViT-Q-14: unknown to open_clip; did you mean"),
        (
            {"_target_": OPENCLIP, "name": "ViT-L-14", "tag": "opnai"},
            "encoder.tag=opnai: ViT-L-14 has the tags openai,",
        ),
        ({"_target_": OPENCLIP, "name": "ViT-L-14", "vision_config": {"layer": 2}}, "layer: no such field.*layers"),
        ({"_target_": TIMM, "name": "resnet5O"}, "encoder.name=resnet5O: unknown to timm; did you mean"),
        ({"_target_": TIMM, "name": "resnet50", "tag": "none"}, "encoder.tag=none: resnet50 has the tags"),
        ({"_target_": TIMM, "name": "test_vit", "model_kwargs": {"dept": 2}}, "encoder.model_kwargs: test_vit: .*dept"),
        ({"_target_": HUGGINGFACE, "name": "nobody/nothing"}, "neither a folder with config.json nor a model"),
        ({"_target_": HUGGINGFACE, "name": "x", "architecture": {"model_type": "bert"}}, "bert is not one of beit"),
        ({"_target_": TIMM, "name": "test_vit", "resize_mode": "stretch"}, "resize_mode must be one of"),
        ({"_target_": TIMM, "name": "test_vit", "interpolation": "nearest"}, "interpolation must be one of"),
    ],
)
def test_unknown_names_tags_and_fields_say_what_there_is(config, sentence):
    with pytest.raises(ValueError, match=sentence):
        build(config, Encoder)
