"""Images as conditions of a tiny Stable Diffusion 1 and the CLIP that it reads."""

import shutil

import diffusers
import pytest
import torch
from tiny_diffusion import WIDTH, tiny_stable_diffusion, tiny_stable_diffusion_xl
from transformers import CLIPModel

from img2prompt.sdipc.converter import Converter, load_clip


def loaded(folders):
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folders[0])
    pipeline.set_progress_bar_config(disable=True)
    return Converter(load_clip(str(folders[1]), None), pipeline)


@pytest.fixture(scope="module")
def converter(folders):
    return loaded(folders)


@pytest.fixture
def images():
    return torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.manual_seed(0))


@torch.no_grad()
def test_states_and_conversion_are_those_of_the_clip(converter, images):
    clip = converter.clip
    pooled = clip.vision_model(converter.pixels(images)).pooler_output
    assert torch.equal(converter.states(images), pooled)
    inverse = torch.linalg.pinv(clip.text_projection.weight.double(), atol=0.3, rtol=0)
    by_hand = (inverse @ clip.get_image_features(converter.pixels(images)).pooler_output.double().T).T
    found = converter.convert(images)
    assert torch.allclose(torch.nn.functional.cosine_similarity(found.double(), by_hand), torch.ones(3).double())
    assert torch.allclose(found.norm(dim=1), torch.full((3,), 27.5))


@torch.no_grad()
def test_texts_are_read_as_the_pipeline_and_the_clip_read_them(converter):
    texts = ["a red cat", "sky", ""]
    states = converter.text_states(texts)
    assert torch.equal(states, converter.pipeline.encode_prompt(texts, "cpu", 1, False)[0])
    tokens = converter.tokens(texts)
    assert torch.equal(converter.end_states(texts), converter.clip.text_model(tokens).pooler_output)
    norm = converter.measure_norm(["a red cat", "sky"])
    assert norm == pytest.approx(float(converter.end_states(["a red cat", "sky"]).norm(dim=1).mean()))
    converter.projector.norm.fill_(27.5)
    (sentence,) = converter.too_long(["fine", "word " * 80])
    assert sentence.startswith("word word ") and sentence.endswith(" CLIP tokens, and 77 are read")


@torch.no_grad()
def test_a_batch_of_texts_of_different_lengths_is_edited_each_at_its_own_end(converter, images):
    converted = converter.convert(images)
    texts = ["a red cat", "sky", ""]
    both = converter.conditions(converted, texts, alpha=0.0)
    ends = [len(converter.pipeline.tokenizer(text).input_ids) - 1 for text in texts]
    assert len(set(ends)) == 3
    for row, end in enumerate(ends):
        assert torch.equal(both[row, :end], converter.text_states(texts)[row, :end])
        assert torch.equal(both[row, end:], converted[row].expand(77 - end, -1))
        alone = converter.conditions(converted[row : row + 1], texts[row : row + 1], alpha=0.9)[0]
        assert torch.allclose(converter.conditions(converted, texts, alpha=0.9)[row], alone, atol=1e-4)
    plain = converter.conditions(converted)
    assert torch.equal(plain[:, 0], converter.text_states([""])[0, :1].expand(3, -1))


@torch.no_grad()
def test_the_same_seed_gives_the_same_picture_and_another_image_another(converter, images):
    conditions = converter.conditions(converter.convert(images))
    options = {"steps": 2, "size_px": 32}
    pictures = converter.pictures(conditions, [1, 2, 3], **options)
    assert pictures.dtype == torch.uint8 and pictures.shape == (3, 32, 32, 3)
    alone = converter.pictures(conditions[1:2], [2], **options)
    assert (alone[0].int() - pictures[1].int()).abs().max() <= 1
    assert torch.equal(converter.pictures(conditions, [1, 2, 3], **options), pictures)
    of_one_seed = converter.pictures(conditions, [1, 1, 1], **options)
    assert not torch.equal(of_one_seed[0], of_one_seed[1])
    weaker = converter.pictures(conditions, [1, 2, 3], guidance=1.0, **options)
    assert not torch.equal(weaker, pictures)


def test_a_clip_and_a_pipeline_that_do_not_belong_together_are_told(folders, tmp_path):
    pipeline, clip = folders
    second = diffusers.StableDiffusionPipeline.from_pretrained(tiny_stable_diffusion(tmp_path / "second"))
    with pytest.raises(ValueError, match="this pipeline is Stable Diffusion 2: it reads its text encoder's last layer"):
        Converter(load_clip(str(clip)), second)
    first = diffusers.StableDiffusionPipeline.from_pretrained(pipeline)
    larger = diffusers.DiffusionPipeline.from_pretrained(tiny_stable_diffusion_xl(tmp_path / "xl"))
    with pytest.raises(ValueError, match="this pipeline is a StableDiffusionXLPipeline; Stable Diffusion 1 is needed"):
        Converter(load_clip(str(clip)), larger)
    own, first.unet.config.in_channels = first.unet.config.in_channels, 9
    with pytest.raises(ValueError, match="U-Net takes 9 channels, and its VAE makes 4: it is for inpainting"):
        Converter(load_clip(str(clip)), first)
    first.unet.config.in_channels = own
    config = CLIPModel.from_pretrained(clip).config
    config.text_config.hidden_size = 2 * WIDTH
    with pytest.raises(ValueError, match=f"texts have {2 * WIDTH} dimensions, the pipeline's text encoder has {WIDTH}"):
        Converter(CLIPModel(config), first)
    config.text_config.hidden_size = WIDTH
    with pytest.raises(ValueError, match="the pipeline's text encoder is not this CLIP's: .* tensors differ"):
        Converter(CLIPModel(config), first)
    with pytest.raises(ValueError, match=f"clip={tmp_path / 'none'}: no such folder"):
        load_clip(str(tmp_path / "none"), None)
    half = shutil.copytree(clip, tmp_path / "half")
    whole = CLIPModel.from_pretrained(half)
    whole.vision_model.save_pretrained(half)
    with pytest.raises(ValueError, match="clip=.*half"):
        load_clip(str(half), None)


@pytest.mark.gpu
def test_images_are_converted_on_a_gpu_as_on_a_cpu(folders, images):
    here, there = loaded(folders), loaded(folders)
    gpu = Converter(there.clip.to("cuda"), there.pipeline.to("cuda"))
    with torch.no_grad():
        assert torch.allclose(
            gpu.conditions(gpu.convert(images)).cpu(), here.conditions(here.convert(images)), atol=1e-3
        )
        assert gpu.pictures(gpu.conditions(gpu.convert(images)), [0, 1, 2], steps=2).shape == (3, 32, 32, 3)
