"""The white box: against the whole U-Net of diffusers, its latents, what it trains, and what it refuses."""

import json
import shutil

import diffusers
import numpy as np
import pytest
import torch
from conftest import read_csv
from safetensors.torch import load_file
from tiny_diffusion import tiny_stable_diffusion, tiny_stable_diffusion_xl

from img2prompt.build import build
from img2prompt.commands.export import export
from img2prompt.data.drawings import Drawings
from img2prompt.data.order import Draws
from img2prompt.data.pixels import Pixels
from img2prompt.encoders.encoder import Encoder
from img2prompt.encoders.sd_unet import SDUNet
from img2prompt.export.diffusers_folder import write_pipeline
from img2prompt.regressor import load_regressor
from img2prompt.synthesis.procedural import Procedural
from img2prompt.training.datamodule import PairData
from img2prompt.training.kept import _digest

SIZE_PX = 32


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_stable_diffusion(tmp_path_factory.mktemp("diffusion"))


@pytest.fixture(scope="module")
def pipeline(model):
    return diffusers.StableDiffusionPipeline.from_pretrained(model)


@pytest.fixture
def images():
    return torch.randint(0, 256, (3, 3, SIZE_PX, SIZE_PX), dtype=torch.uint8, generator=torch.manual_seed(0))


def loaded(model, **options):
    encoder = SDUNet(str(model), **options)
    encoder.load_pretrained()
    return encoder.eval()


def middle_of(pipeline, latents, context):
    """What the middle block says while the whole U-Net takes a step."""
    said = []
    hook = pipeline.unet.mid_block.register_forward_hook(lambda module, inputs, output: said.append(output))
    pipeline.unet(latents, 0, encoder_hidden_states=context)
    hook.remove()
    return said[0]


@torch.no_grad()
def test_it_says_what_the_middle_of_the_whole_u_net_says_of_the_clean_latent(model, pipeline, images):
    encoder = loaded(model)
    latents = pipeline.vae.encode(images.float() / 127.5 - 1).latent_dist.mode() * pipeline.vae.config.scaling_factor
    assert torch.allclose(encoder.frozen(images)["latents"], latents, atol=1e-5)
    null = pipeline.encode_prompt([""] * 3, "cpu", 1, False)[0]
    assert torch.equal(encoder.context, null[0])
    middle = middle_of(pipeline, encoder.frozen(images)["latents"], null)
    features = encoder(encoder.frozen(images), tokens=True)
    assert torch.equal(features.pooled, torch.nn.functional.adaptive_max_pool2d(middle, 1).flatten(1))
    assert torch.equal(features.tokens, middle.flatten(2).transpose(1, 2))
    assert torch.equal(encoder({"images": images}).pooled, features.pooled)
    mean = loaded(model, pool="avg")({"images": images}).pooled
    assert torch.allclose(mean, middle.mean(dim=(2, 3)), atol=1e-6) and not torch.allclose(mean, features.pooled)


@torch.no_grad()
def test_the_writing_half_is_none_of_it(model, pipeline, images, tmp_path):
    other = shutil.copytree(model, tmp_path / "other")
    unet = diffusers.UNet2DConditionModel.from_pretrained(other, subfolder="unet")
    for parameter in unet.up_blocks.parameters():
        parameter.zero_()
    unet.save_pretrained(other / "unet")
    assert torch.equal(loaded(model)({"images": images}).pooled, loaded(other)({"images": images}).pooled)


@torch.no_grad()
def test_the_text_that_conditions_it_counts(model, pipeline, images):
    encoder = loaded(model, context="a cat")
    assert torch.equal(encoder.context, pipeline.encode_prompt(["a cat"], "cpu", 1, False)[0][0])
    assert not torch.equal(encoder({"images": images}).pooled, loaded(model)({"images": images}).pooled)
    with pytest.raises(ValueError, match="encoder.context has .* CLIP tokens, and 77 are read; shorten it"):
        loaded(model, context="word " * 99)


def test_all_of_the_reading_half_learns_and_nothing_of_the_vae(model, images):
    encoder = loaded(model).train()
    names = {name for name, _ in encoder.named_parameters()}
    grouped = [id(parameter) for block in encoder.blocks() for parameter in block]
    assert sorted(grouped) == sorted(map(id, encoder.parameters())) and len(encoder.blocks()) == 4
    assert names and all(name.startswith("unet.") for name in names)
    assert any(name.startswith("vae.") for name in encoder.state_dict())
    encoder.requires_grad_(True)({"images": images}).pooled.sum().backward()
    # What asks for keys and values of the text is behind the null prompt, and learns too.
    assert {name for name, parameter in encoder.named_parameters() if parameter.grad is None} == set()


def test_activations_that_are_computed_again_give_the_same_gradients(model, images):
    gradients = []
    for again in (False, True):
        encoder = loaded(model).train()
        if again:
            encoder.checkpoint_activations()
        encoder({"images": images}).pooled.sum().backward()
        gradients.append([parameter.grad for parameter in encoder.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@torch.no_grad()
def test_its_config_builds_it_without_the_pipeline(model, images, tmp_path):
    copy = shutil.copytree(model, tmp_path / "copy")
    encoder = build({"_target_": "img2prompt.encoders.sd_unet.SDUNet", "name": str(copy), "pool": "avg"}, Encoder)
    encoder.load_pretrained()
    shutil.rmtree(copy)
    again = build(json.loads(json.dumps(encoder.config)), Encoder)
    again.load_state_dict(encoder.state_dict())
    assert torch.equal(again.eval()({"images": images}).pooled, encoder.eval()({"images": images}).pooled)


@torch.no_grad()
def test_it_reads_images_of_other_sizes(model):
    encoder = build({"_target_": "img2prompt.encoders.sd_unet.SDUNet", "name": str(model)}, Encoder).eval()
    encoder.set_image_size(48)
    assert encoder.config["image_size_px"] == encoder.preprocessing.image_size_px == 48
    assert encoder({"images": torch.zeros(1, 3, 48, 48, dtype=torch.uint8)}).pooled.shape == (1, 64)
    with pytest.raises(ValueError, match="encoder.image_size_px=30: .* takes multiples of 4 px"):
        encoder.set_image_size(30)


# What Stable Diffusion 2.0 (768-v) and 1.5 say of their U-Nets, where they differ from the class's defaults.
TRUE_SIZES = {
    "2.0": (
        96,
        768,
        {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": True},
    ),
    "1.5": (64, 512, {"attention_head_dim": 8, "cross_attention_dim": 768}),
}


@pytest.mark.parametrize("version", sorted(TRUE_SIZES))
def test_at_its_true_size_it_reads_1280_channels_of_the_published_input(version):
    sample_size, size_px, own = TRUE_SIZES[version]
    vae = {
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
        "latent_channels": 4,
    }
    with torch.device("meta"):
        unet, vae = diffusers.UNet2DConditionModel(sample_size=sample_size, **own), diffusers.AutoencoderKL(**vae)
        encoder = SDUNet(version, architecture={"unet": dict(unet.config), "vae": dict(vae.config)})
    half = [unet.conv_in, unet.time_embedding, unet.down_blocks, unet.mid_block]
    assert sum(one.numel() for one in encoder.parameters()) == sum(
        one.numel() for part in half for one in part.parameters()
    )
    assert encoder.width == 1280 and encoder.preprocessing.image_size_px == size_px
    assert encoder.vae.config.scaling_factor == 0.18215
    assert encoder.dry_run(tokens=True).tokens.shape == (1, (size_px // 64) ** 2, 1280)


def test_other_models_are_refused_in_a_sentence(model, tmp_path):
    with pytest.raises(
        ValueError, match="another architecture .addition_embed_type text_time.; Stable Diffusion 1 and 2"
    ):
        SDUNet(str(tiny_stable_diffusion_xl(tmp_path / "xl")))
    with pytest.raises(ValueError, match=f"encoder.name={tmp_path}: no pipeline of diffusers, it has no model_"):
        SDUNet(str(tmp_path))
    painting = shutil.copytree(model, tmp_path / "painting")
    config = json.loads((painting / "unet" / "config.json").read_text())
    (painting / "unet" / "config.json").write_text(json.dumps(config | {"in_channels": 9}))
    with pytest.raises(ValueError, match="the U-Net reads 9 channels and the VAE makes 4; .* not those for inpainting"):
        SDUNet(str(painting))
    for options, sentence in (
        ({"pool": "sum"}, "encoder.pool=sum: must be one of max, avg"),
        ({"drop_path": 0.1}, "encoder.drop_path=0.1: a U-Net has no stochastic depth"),
        ({"image_size_px": 33}, "encoder.image_size_px=33: "),
    ):
        with pytest.raises(ValueError, match=sentence):
            SDUNet(str(model), **options)
    with pytest.raises(ValueError, match="encoder.pretrained=x.safetensors: must be true or false here"):
        SDUNet(str(model)).load_pretrained("x.safetensors")


WHITE_BOX = (
    *("encoder=sd_unet", "encoder.image_size_px=32", "~encoder.model_kwargs", "optim.warmup_fraction=0"),
    *("stages.probe=null", "stages.text_only=null", "trainer.max_epochs=2", "optim.lr=1e-4"),
)


def trained(train_here, model, folder, *overrides):
    given = (*WHITE_BOX, f"encoder.name={model}", "encoder.pretrained=true")
    # The settings of the tests choose another encoder first.
    return train_here(folder, *given, *overrides)


def picture_of(folder):
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline("a red star", num_inference_steps=2, generator=torch.manual_seed(0), output_type="np").images[0]


def test_the_trained_half_goes_back_into_a_pipeline_that_makes_pictures(model, train_here, tmp_path, capsys):
    run = tmp_path / "run"
    trained(train_here, model, run)
    checkpoint = run / "checkpoints" / "finetune.safetensors"
    given = {"ckpt": str(checkpoint), "format": "diffusers", "pipeline": None, "revision": None}
    export(**given, out=str(tmp_path / "written"))
    whole = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "written", subfolder="unet").state_dict()
    before = diffusers.UNet2DConditionModel.from_pretrained(model, subfolder="unet").state_dict()
    half = load_regressor(checkpoint).encoder.unet.state_dict()
    assert whole.keys() == before.keys() > half.keys()
    assert all(torch.equal(value, half.get(key, before[key])) for key, value in whole.items())
    assert f"with {sum(not torch.equal(half[key], before[key]) for key in half)} of its" in capsys.readouterr().out
    # And as a folder that img2prompt opens.
    export(ckpt=str(checkpoint), format="safetensors", out=str(tmp_path / "plain"))
    assert "cosine at least 1.0000000" in capsys.readouterr().out
    one, two = picture_of(tmp_path / "written"), picture_of(model)
    assert one.shape == two.shape and not (one == two).all()
    # An untrained half leaves the pipeline as it was.
    encoder = loaded(model)
    assert write_pipeline(encoder, str(model), None, tmp_path / "same") == 0
    assert (picture_of(tmp_path / "same") == two).all()
    for name in ("written", "same"):
        assert sorted(path.name for path in (tmp_path / name).iterdir() if path.is_dir()) == sorted(
            path.name for path in model.iterdir() if path.is_dir()
        )
    assert not list(tmp_path.glob(".*.tmp"))


def test_what_cannot_be_written_back_is_told_in_a_sentence(model, finished_run, tmp_path):
    given = {"format": "diffusers", "pipeline": None, "revision": None}
    with pytest.raises(ValueError, match="the encoder of .* is test_vit, and encoder=sd_unet is needed"):
        export(**given, ckpt=str(finished_run / "checkpoints" / "finetune.safetensors"), out=str(tmp_path / "x"))
    with pytest.raises(ValueError, match="is there already and is kept"):
        export(**given, ckpt=str(finished_run), out=str(tmp_path))
    with pytest.raises(ValueError, match="format=onyx: no such format; did you mean onnx?"):
        export(**{**given, "format": "onyx"}, ckpt=str(finished_run), out=str(tmp_path / "x"))
    other = shutil.copytree(model, tmp_path / "other")
    unet = diffusers.UNet2DConditionModel.from_pretrained(other, subfolder="unet")
    wider = diffusers.UNet2DConditionModel.from_config({**unet.config, "attention_head_dim": [4, 8]})
    wider.save_pretrained(other / "unet")
    for folder, sentence in (
        (other, "another architecture .attention_head_dim .4, 8. there, .2, 4. in the checkpoint"),
        (tiny_stable_diffusion_xl(tmp_path / "xl"), "StableDiffusionXLPipeline; Stable Diffusion 1 or 2 is needed"),
    ):
        with pytest.raises(ValueError, match=sentence):
            write_pipeline(loaded(model), str(folder), None, tmp_path / "out")
    config = json.loads((model / "scheduler" / "scheduler_config.json").read_text())
    noise = shutil.copytree(model, tmp_path / "noise")
    (noise / "scheduler" / "scheduler_config.json").write_text(json.dumps(config | {"prediction_type": "epsilon"}))
    with pytest.raises(ValueError, match="prediction_type epsilon there, v_prediction in the checkpoint"):
        write_pipeline(loaded(model), str(noise), None, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*.tmp"))


@torch.no_grad()
def test_live_latents_are_those_that_are_kept_also_where_the_rest_is_in_bf16(model, images):
    encoder, seen = loaded(model), []
    hook = encoder.unet.conv_in.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    with torch.autocast("cpu", torch.bfloat16):
        encoder({"images": images})
    hook.remove()
    assert torch.equal(seen[0].float(), encoder.frozen(images)["latents"])


def test_latents_are_kept_by_all_that_they_depend_on_and_nothing_else(model, tmp_path):
    found = [_digest(loaded(model), "latents"), _digest(loaded(model, context="a cat"), "latents")]
    scaled = shutil.copytree(model, tmp_path / "scaled")
    config = json.loads((scaled / "vae" / "config.json").read_text())
    (scaled / "vae" / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.5}))
    assert found[0] == found[1] != _digest(loaded(scaled), "latents")


def test_a_row_that_is_not_kept_is_replaced(tmp_path):

    class Four:
        def of(self, rows):
            good = [row for row in rows if row != 2]
            return good, {"latents": torch.zeros(len(good), 1)}

    draws = Draws(np.arange(6), np.arange(6), np.ones(6), np.arange(6, dtype=np.uint64))
    source = Drawings(6, 1, 0, Procedural(8))
    pixels = Pixels(source.find().samples, 8, "bicubic", "shortest")
    data = PairData(pixels.samples, torch.eye(6), pixels, np.arange(6), np.arange(1), draws, 6, 1, 0)
    batch = data.with_kept(Four()).train_batch("finetune", 0)
    assert len(batch.rows) == 6 and 2 not in batch.rows.tolist()


def test_a_run_trains_it_on_latents_that_are_kept_on_disk(model, train_here, tmp_path):
    kept, live = tmp_path / "kept", tmp_path / "live"
    cache = (f"cache_dir={tmp_path / 'cache'}",)
    trained(train_here, model, kept, *cache)
    latents = list((tmp_path / "cache" / "latents").glob("*/*.rows"))
    assert len(latents) == 1
    trained(train_here, model, live, *cache, "data.cache=none")
    one, two = (read_csv(run / "metrics.csv") for run in (kept, live))
    assert [float(row["val/cosine"]) for row in one] == pytest.approx(
        [float(row["val/cosine"]) for row in two], abs=2e-3
    )
    # A second run computes none of them again, and an image that is cropped otherwise each time is no kept one.
    again = tmp_path / "again"
    trained(train_here, model, again, *cache)
    assert (again / "metrics.csv").read_bytes() == (kept / "metrics.csv").read_bytes()
    assert list((tmp_path / "cache" / "latents").glob("*/*.rows")) == latents
    trained(train_here, model, tmp_path / "cropped", f"cache_dir={tmp_path / 'other'}", "augment.min_area=0.5")
    assert not (tmp_path / "other" / "latents").exists()
    # The VAE is as it came, and the U-Net is not.
    state = load_file(kept / "checkpoints" / "finetune.safetensors")
    fresh = loaded(model).state_dict()
    moved = {name for name, value in fresh.items() if not torch.equal(value, state[f"encoder.{name}"])}
    assert moved and all(name.startswith("unet.") for name in moved)
    assert load_regressor(kept / "checkpoints" / "finetune.safetensors").encoder.width == 64
