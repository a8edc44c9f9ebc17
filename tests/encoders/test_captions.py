"""Captions that condition the white box: against BLIP's and the pipeline's own ways, kept, saved, and refused."""

import json
import shutil

import diffusers
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import read_csv
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_diffusion import tiny_captioner, tiny_stable_diffusion
from transformers import AutoProcessor, BlipForConditionalGeneration

from img2prompt.build import build
from img2prompt.encoders.captions import CONTEXT_TOKENS, Captioner, padded
from img2prompt.encoders.encoder import Encoder
from img2prompt.encoders.sd_unet import SDUNet
from img2prompt.predictors.trained import load
from img2prompt.training.kept import _digest

SIZE_PX = 32


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_stable_diffusion(tmp_path_factory.mktemp("diffusion"))


@pytest.fixture(scope="module")
def blip(tmp_path_factory):
    return tiny_captioner(tmp_path_factory.mktemp("blip"))


@pytest.fixture(scope="module")
def encoder(model, blip):
    return loaded(model, captioner=str(blip))


@pytest.fixture
def images():
    return torch.randint(0, 256, (6, 3, SIZE_PX, SIZE_PX), dtype=torch.uint8, generator=torch.manual_seed(0))


def loaded(model, **options):
    target = {"_target_": "img2prompt.encoders.sd_unet.SDUNet", "name": str(model), **options}
    encoder = build(target, Encoder)
    encoder.load_pretrained()
    return encoder.eval()


@torch.no_grad()
def test_captions_are_those_of_the_librarys_own_generation(encoder, blip, images):
    processor, whole = AutoProcessor.from_pretrained(blip), BlipForConditionalGeneration.from_pretrained(blip)
    fitted = encoder.captioner._prepared(images / 255)
    theirs = processor(images=list(images), return_tensors="pt").pixel_values
    # The library resizes whole numbers.
    assert (fitted - theirs).abs().max() < 0.03
    said = whole.generate(pixel_values=fitted, max_new_tokens=20, do_sample=False)
    captions = encoder.captioner.captions(images / 255)
    assert captions == processor.batch_decode(said, skip_special_tokens=True)
    assert len(set(captions)) > 1
    # Nothing about an image is decided by its batch.
    assert [encoder.captioner.captions(one[None] / 255)[0] for one in images] == captions


@torch.no_grad()
def test_the_context_is_what_the_pipeline_makes_of_the_caption(encoder, model, images):
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(model)
    kept = encoder.frozen(images)
    captions = encoder.captioner.captions(images / 255)
    contexts = encoder.captioner.contexts(kept["caption_tokens"])
    assert torch.equal(contexts, pipeline.encode_prompt(captions, "cpu", 1, False)[0])
    middle, hook = [], pipeline.unet.mid_block.register_forward_hook(lambda module, inputs, said: middle.append(said))
    pipeline.unet(kept["latents"], 0, encoder_hidden_states=contexts)
    hook.remove()
    assert torch.equal(encoder(kept, tokens=True).pooled, middle[0].amax(dim=(2, 3)))
    assert torch.equal(encoder({"images": images}).pooled, encoder(kept).pooled)
    plain = loaded(model)({"images": images}).pooled
    assert not torch.allclose(encoder(kept).pooled, plain)


def test_a_text_that_is_too_long_keeps_its_end():
    assert padded([7, *range(90), 8], 0) == [7, *range(75), 8]
    assert padded([7, 1, 8], 5) == [7, 1, 8] + [5] * (CONTEXT_TOKENS - 3)


def test_nothing_of_captioner_or_text_encoder_learns_and_all_of_them_is_saved(encoder, model):
    assert {name.split(".")[0] for name, _ in encoder.named_parameters()} == {"unet"}
    state = encoder.state_dict()
    assert any(name.startswith("captioner.blip.") for name in state)
    assert any(name.startswith("captioner.text_encoder.") for name in state)
    shapes = encoder.dry_run(tokens=True)
    assert shapes.pooled.shape == (1, encoder.width)


@torch.no_grad()
def test_its_config_builds_it_without_pipeline_and_captioner(encoder, model, blip, images, tmp_path):
    copies = [shutil.copytree(one, tmp_path / name) for name, one in (("model", model), ("blip", blip))]
    copied = loaded(copies[0], captioner=str(copies[1]))
    for copy in copies:
        shutil.rmtree(copy)
    again = build(json.loads(json.dumps(copied.config)), Encoder)
    again.load_state_dict(copied.state_dict())
    assert torch.equal(again.eval()({"images": images}).pooled, encoder({"images": images}).pooled)


def test_captions_are_kept_by_the_captioner_and_latents_by_the_vae(encoder, model, blip, tmp_path):
    other = shutil.copytree(blip, tmp_path / "other")
    changed = BlipForConditionalGeneration.from_pretrained(other)
    torch.nn.init.normal_(changed.text_decoder.cls.predictions.bias)
    changed.save_pretrained(other)
    second = loaded(model, captioner=str(other))
    assert _digest(second, "latents") == _digest(encoder, "latents") == _digest(loaded(model), "latents")
    assert _digest(second, "caption_tokens") != _digest(encoder, "caption_tokens")


WHITE_BOX = (
    *("encoder=sd_unet", "encoder.image_size_px=32", "~encoder.model_kwargs", "optim.warmup_fraction=0"),
    *("stages.probe=null", "stages.text_only=null", "trainer.max_epochs=2", "optim.lr=1e-4"),
)


def test_a_run_keeps_captions_beside_latents_and_predicts_without_either(train_here, model, blip, tmp_path):
    given = (*WHITE_BOX, f"encoder.name={model}", "encoder.pretrained=true")
    said, cache = f"encoder.captioner={blip}", tmp_path / "cache"
    train_here(tmp_path / "null", *given, f"cache_dir={cache}")
    latents = sorted(cache.glob("latents/*/*.rows"))
    train_here(tmp_path / "kept", *given, said, f"cache_dir={cache}")
    # The latents are those of the run before.
    assert sorted(cache.glob("latents/*/*.rows")) == latents and len(list(cache.glob("caption_tokens/*/*.rows"))) == 1
    train_here(tmp_path / "live", *given, said, f"cache_dir={cache}", "data.cache=none")
    of_kept, of_live, of_null = (
        [float(row["val/cosine"]) for row in read_csv(tmp_path / name / "metrics.csv")]
        for name in ("kept", "live", "null")
    )
    assert of_kept == pytest.approx(of_live, abs=2e-3) and of_kept != of_null
    drawing = tmp_path / "drawing.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(drawing)
    assert load(tmp_path / "kept").predict([str(drawing)]).embeddings.shape == (1, 384)


def test_captions_are_not_blended(train_here, model, blip, tmp_path):
    given = (*WHITE_BOX, f"encoder.name={model}", f"encoder.captioner={blip}", "encoder.pretrained=true")
    with pytest.raises(ValueError, match="augment.mixup=0.2: captions cannot be blended"):
        train_here(tmp_path / "run", *given, "augment.mixup=0.2")


def test_a_second_run_captions_nothing_that_is_kept(train_here, model, blip, tmp_path, monkeypatch):
    given = ("encoder=sd_unet", "encoder.image_size_px=32", "~encoder.model_kwargs", "trainer.max_epochs=1")
    given += (f"encoder.name={model}", "encoder.pretrained=true", f"encoder.captioner={blip}", "stages.text_only=null")
    asked, captions = [], Captioner.captions

    def counting(self, images):
        asked.append(len(images))
        return captions(self, images)

    monkeypatch.setattr(Captioner, "captions", counting)
    cache = f"cache_dir={tmp_path / 'cache'}"
    train_here(tmp_path / "first", *given, cache)
    first, held = sum(asked), len(pq.read_table(tmp_path / "first" / "validation.parquet"))
    asked.clear()
    train_here(tmp_path / "second", *given, cache)
    # What is left: one blank image to know the shape, and scores of rungs.
    assert sum(asked) == first - 40 and 40 > 4 * held


def test_what_is_no_captioner_is_refused_in_a_sentence(model, blip, tmp_path):
    with pytest.raises(ValueError, match="encoder.context and encoder.captioner: .* give one"):
        SDUNet(str(model), context="a cat", captioner=str(blip))
    with pytest.raises(
        ValueError, match=f"encoder.captioner={tmp_path}: no BLIP there .nothing of its own.; give a BLIP"
    ):
        SDUNet(str(model), captioner=str(tmp_path))
    with pytest.raises(ValueError, match="no BLIP there .clip_text_model.; give a BLIP that captions"):
        SDUNet(str(model), captioner=str(model / "text_encoder"))
    half = shutil.copytree(blip, tmp_path / "half")
    state = load_file(half / "model.safetensors")
    save_file({name: one for name, one in state.items() if "crossattention" not in name}, half / "model.safetensors")
    with pytest.raises(ValueError, match="no BlipForConditionalGeneration: .* of its tensors are not there"):
        loaded(model, captioner=str(half))
