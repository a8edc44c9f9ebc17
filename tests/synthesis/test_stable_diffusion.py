"""Pictures by diffusion: against diffusers' own pipeline, a sampler written out, and models that fail."""

import re
import shutil

import diffusers
import numpy as np
import pytest
import torch
from tiny_diffusion import tiny_stable_diffusion, tiny_stable_diffusion_xl
from transformers import CLIPTextModel

from img2prompt.synthesis import stable_diffusion
from img2prompt.synthesis.produce import is_blank
from img2prompt.synthesis.sampling import SCHEDULERS
from img2prompt.synthesis.stable_diffusion import StableDiffusion

PROMPTS, SEEDS = ["a red star", "two cats, on a mat", "a red star"], [1, 2, 3]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_stable_diffusion(tmp_path_factory.mktemp("diffusion")))


def made(model, **options):
    return StableDiffusion(model, **{"size_px": 32, "steps": 4, "device": "cpu", "dtype": "fp32", **options})


def images_of(generator, prompts, seeds):
    """float32 [B, 3, H, W], before they become bytes."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        bytes_of = stable_diffusion._bytes
        patch.setattr(stable_diffusion, "_bytes", lambda images: (seen.append(images), bytes_of(images))[1])
        generator.generate(prompts, seeds)
    return torch.cat(seen)


def own_ddim(model):
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="leading", steps_offset=1, set_alpha_to_one=False, clip_sample=False
    )
    return pipeline


def test_host_exact_is_what_diffusers_own_pipeline_makes_of_the_same_latents(model):
    generator = made(model, preset="host_exact", steps=None)
    sampling = generator.sampling
    assert (sampling.steps, sampling.guidance, sampling.schedulers) == (50, [9.0], ["ddim"])
    latents = torch.cat([torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in SEEDS])
    theirs = own_ddim(model)(
        PROMPTS, num_inference_steps=50, guidance_scale=9.0, height=32, width=32, latents=latents, output_type="pt"
    ).images
    ours = images_of(generator, PROMPTS, SEEDS).clamp(0, 1)
    assert theirs.std() > 0.05 and (ours - theirs).abs().max() < 1e-5


USUAL = ("ddim", "dpm++", "euler_ancestral")


@pytest.mark.parametrize(
    "name", [*USUAL, *(pytest.param(one, marks=pytest.mark.slow) for one in sorted(set(SCHEDULERS) - set(USUAL)))]
)
def test_every_scheduler_equals_the_pipelines(model, name):
    pipeline = own_ddim(model)
    config = diffusers.DiffusionPipeline.from_pretrained(model).scheduler.config
    kind, options = SCHEDULERS[name]
    pipeline.scheduler = getattr(diffusers, kind).from_config(config, **options)
    dice = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    theirs = pipeline(
        PROMPTS, num_inference_steps=5, guidance_scale=6.0, height=32, width=32, generator=dice, output_type="pt"
    ).images
    ours = images_of(made(model, scheduler=name, steps=5, guidance=6.0), PROMPTS, SEEDS).clamp(0, 1)
    assert (ours - theirs).abs().max() < 1e-5


@torch.no_grad()
def test_v_prediction_and_guidance_follow_their_formulas(model):
    pipeline = own_ddim(model)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1 - betas, 0).float()
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(7))
    told, untold = (pipeline.encode_prompt([text], "cpu", 1, False)[0] for text in ("a red star", "blurry"))
    for time, before in ((501, 1), (1, None)):  # two steps of 500, counted from one
        v_told, v_untold = (pipeline.unet(x, time, encoder_hidden_states=one).sample for one in (told, untold))
        v = v_untold + 5.0 * (v_told - v_untold)
        alpha, alpha_before = alphas[time], alphas[before if before is not None else 0]
        # Salimans and Ho (2022): v = sqrt(alpha) noise - sqrt(1 - alpha) x0
        x0 = alpha.sqrt() * x - (1 - alpha).sqrt() * v
        noise = alpha.sqrt() * v + (1 - alpha).sqrt() * x
        x = alpha_before.sqrt() * x0 + (1 - alpha_before).sqrt() * noise
    expected = pipeline.vae.decode(x / pipeline.vae.config.scaling_factor).sample / 2 + 0.5
    generator = made(model, preset="host_exact", steps=2, guidance=5.0, negative_prompt="blurry")
    assert torch.allclose(images_of(generator, ["a red star"], [7]), expected, atol=1e-4)


def test_a_picture_depends_on_its_prompt_and_seed_and_not_on_its_batch(model):
    generator = made(model)
    together = generator.generate(PROMPTS, SEEDS)
    alone = [generator.generate([prompt], [seed])[0] for prompt, seed in zip(PROMPTS, SEEDS, strict=True)]
    assert together.dtype == np.uint8 and together.shape == (3, 32, 32, 3)
    assert np.abs(together.astype(int) - np.stack(alone)).max() <= 1
    assert (generator.generate(PROMPTS, SEEDS) == together).all()
    # Another seed, and another prompt, are other pictures.
    assert (together[0] != together[2]).mean() > 0.5
    assert (generator.generate(["a blue ship"], [1])[0] != together[0]).any()


def test_what_is_drawn_for_a_picture_is_recorded_and_is_in_effect(model):
    varied = made(model, guidance=[2, 12], negative_prompt=["", "blurry"], scheduler=["ddim", "euler"])
    seeds = list(range(12))
    pictures, details = varied.generate(["a cat"] * 12, seeds), [varied.details(seed) for seed in seeds]
    assert {one.pop("compiled") for one in details} == {False}
    assert {one["scheduler"] for one in details} == {"ddim", "euler"}
    assert {one["negative_prompt"] for one in details} == {"", "blurry"}
    assert len({one["guidance"] for one in details}) > 8 and all(2 <= one["guidance"] <= 12 for one in details)
    for seed, picture, one in zip(seeds, pictures, details, strict=True):
        alone = made(model, **one).generate(["a cat"], [seed])[0]
        assert np.abs(alone.astype(int) - picture).max() <= 1
    one = details[0]
    for other in (
        {"guidance": one["guidance"] + 3},
        {"negative_prompt": "a dog"},
        {"scheduler": "dpm++"},
        {"steps": 7},
    ):
        assert (made(model, **{**one, **other}).generate(["a cat"], [0])[0] != pictures[0]).any(), other


def test_a_picture_never_depends_on_what_others_of_its_batch_are_drawn(model):
    # A weight of nearly one beside larger ones, and an empty negative prompt beside others.
    varied = made(model, guidance=[1, 9], negative_prompt=["", "blurry"])
    seeds = [seed for seed in range(200) if varied.details(seed)["guidance"] < 1.2][:2] + [0, 1, 2]
    together = varied.generate(["a cat"] * len(seeds), seeds)
    for seed, picture in zip(seeds, together, strict=True):
        assert np.abs(varied.generate(["a cat"], [seed])[0].astype(int) - picture).max() <= 1


def test_compiled_pictures_do_not_depend_on_the_sizes_that_came_before(model, monkeypatch):
    shapes = []
    forward = diffusers.UNet2DConditionModel.forward

    def watched(self, sample, *args, **options):
        shapes.append(len(sample))
        return forward(self, sample, *args, **options)

    monkeypatch.setattr(diffusers.UNet2DConditionModel, "forward", watched)
    options = []
    compiling = lambda self, **given: options.append(given)  # noqa: E731
    monkeypatch.setattr(torch.nn.Module, "compile", compiling)
    generator = made(model, compile=True, scheduler=["ddim", "euler"], steps=2)
    seeds = list(range(11))
    names = [generator.details(seed)["scheduler"] for seed in seeds]
    assert 0 < names.count("ddim") < 11
    pictures = generator.generate(["a cat"] * 11, seeds)
    # A graph for each size, and few sizes: parts of a batch are filled up to a power of two.
    assert options == [{"dynamic": False}] * 2
    assert {size // 2 & (size // 2 - 1) for size in shapes} == {0}
    alone = made(model, scheduler=["ddim", "euler"], steps=2).generate(["a cat"] * 11, seeds)
    assert np.abs(pictures.astype(int) - alone).max() <= 1


def test_values_that_are_not_finite_make_a_black_picture_and_float32_another(model, monkeypatch, tmp_path):
    generator = made(model, dtype="bf16")
    usual = made(model, dtype="bf16").generate(PROMPTS, SEEDS)
    assert not is_blank(usual[0])
    forward = diffusers.UNet2DConditionModel.forward

    def failing(self, sample, *args, **options):
        (found,) = forward(self, sample, *args, **options)
        if found.dtype == torch.bfloat16:
            found[len(found) // 2 + 1] = float("nan")  # of the second prompt
        return (found,)

    monkeypatch.setattr(diffusers.UNet2DConditionModel, "forward", failing)
    pictures = generator.generate(PROMPTS, SEEDS)
    assert (pictures[1] == 0).all() and (pictures[[0, 2]] == usual[[0, 2]]).all()
    precise = generator.generate(PROMPTS[1:2], SEEDS[1:2], precise=True)
    assert not is_blank(precise[0])
    assert (precise[0] == made(model, dtype="bf16").generate(PROMPTS[1:2], SEEDS[1:2], precise=True)).all()
    monkeypatch.undo()
    # In float32 it is the picture of the weights as they were saved, and not of rounded ones.
    exact = made(model, dtype="fp32").generate(PROMPTS[1:2], SEEDS[1:2])
    assert (precise == exact).all() and not (precise == usual[1:2]).all()
    # Also where a part was saved in half precision, and says so.
    half = shutil.copytree(model, tmp_path / "half")
    text = CLIPTextModel.from_pretrained(half / "text_encoder", dtype=torch.float16)
    text.save_pretrained(half / "text_encoder")
    assert not is_blank(made(str(half), dtype="bf16").generate(PROMPTS[:1], SEEDS[:1], precise=True)[0])
    # Back in bf16, and not a bit of the weights lost.
    assert (generator.generate(PROMPTS, SEEDS) == usual).all()


def test_any_other_pipeline_is_sampled_by_itself(tmp_path):
    model = str(tiny_stable_diffusion_xl(tmp_path))
    generator = made(model, preset=None, scheduler="euler", steps=3, guidance=5.0, negative_prompt="blurry")
    together = generator.generate(PROMPTS, SEEDS)
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    dice = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    theirs = pipeline(
        PROMPTS,
        negative_prompt=["blurry"] * 3,
        num_inference_steps=3,
        guidance_scale=5.0,
        height=32,
        width=32,
        generator=dice,
        output_type="pt",
    ).images
    expected = (theirs * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert np.abs(together.astype(int) - expected).max() <= 1
    drawn = made(model, preset=None, scheduler="own", guidance=5.0, negative_prompt=["", "blurry"])
    several = drawn.generate(["a cat"] * 6, range(6))
    for seed in range(6):
        assert np.abs(drawn.generate(["a cat"], [seed])[0].astype(int) - several[seed]).max() <= 1
    with pytest.raises(ValueError, match="StableDiffusionXLPipeline takes one guidance for all"):
        made(model, preset=None, scheduler="euler", guidance=[3, 5]).generate(PROMPTS, SEEDS)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"preset": "slow"}, "generator.preset=slow: must be one of host_exact, fast, direct_512, plain, or null"),
        ({"preset": None}, "generator.preset=null needs scheduler, steps, guidance and size_px"),
        ({"scheduler": "ddpm"}, "generator.scheduler=ddpm: must be one of own, ddim, dpm++"),
        ({"scheduler": []}, "generator.scheduler=: must be one of own, ddim, dpm++"),
        ({"steps": 0}, "generator.steps must be at least 1, got 0"),
        (
            {"guidance": [9, 3]},
            "generator.guidance=[9.0, 3.0]: must be a number from 1, which is none, or [least, most]",
        ),
        ({"guidance": 0.5}, "generator.guidance=[0.5]: must be a number from 1, which is none, or [least, most]"),
        ({"negative_prompt": []}, "generator.negative_prompt=[]: must be a text, a list of texts, or null"),
        ({"size_px": 100}, "generator.size_px must be a multiple of 8, got 100"),
        ({"saved_px": 0}, "generator.saved_px must be from 1 to size_px=32, or null, got 0"),
        ({"saved_px": 64}, "generator.saved_px must be from 1 to size_px=32, or null, got 64"),
        ({"dtype": "int8"}, "generator.dtype=int8: must be one of bf16, fp16, fp32"),
        (
            {"device": "auto"},
            "no GPU is there for the diffusion model; generator=procedural draws without one, and device=cpu",
        ),
        ({"device": "meta"}, "device=meta: must be auto, cpu, cuda or cuda:1"),
        ({"device": "gpu"}, "device=gpu: must be auto, cpu, cuda or cuda:1"),
        ({"device": "cuda"}, "device=cuda: no GPU is there for the diffusion model; generator=procedural"),
    ],
)
def test_settings_that_mean_nothing_are_told_in_a_sentence(options, sentence, model, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        made(model, **options).load()


def test_a_model_that_is_not_there_is_told_with_where_it_has_gone(model, tmp_path):
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "model_index.json").write_text('{"_class_name": "NoSuchPipeline"}')
    # Weights that could hold a program are no choice.
    pickled = tmp_path / "pickled"
    shutil.copytree(model, pickled)
    for path in pickled.rglob("*.safetensors"):
        torch.save({}, path.with_suffix(".bin"))
        path.unlink()
    for name in (
        str(pickled),
        "stabilityai/stable-diffusion-2",
        str(tmp_path),
        "/nowhere/sd",
        "~/sd",
        str(tmp_path / "odd"),
    ):
        sentence = {
            str(tmp_path): "no pipeline of diffusers, it has no model_index.json",
            "/nowhere/sd": "no such folder",
            "~/sd": "no such folder",
        }.get(name, "cannot be loaded .* by now")
        with pytest.raises(ValueError, match=f"generator.model={re.escape(name)}: {sentence}") as told:
            made(name).generate(["a cat"], [0])
        assert "\n" not in str(told.value)


def test_a_pipeline_that_needs_an_image_is_refused(model):
    images = diffusers.StableDiffusionImg2ImgPipeline(
        **diffusers.StableDiffusionPipeline.from_pretrained(model).components, requires_safety_checker=False
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("img2prompt.synthesis.pipeline.load_pipeline", lambda *given: images)
        with pytest.raises(ValueError, match="StableDiffusionImg2ImgPipeline makes images of images"):
            made(model).load()


def test_a_folder_is_known_by_what_is_in_it(model, tmp_path):
    copy = shutil.copytree(model, tmp_path / "elsewhere" / "model")
    one, two = made(model), made(str(copy))
    assert one.settings["weights"] and one.download is None
    (copy / ".DS_Store").write_bytes(b"what lies beside the parts")
    one.load()
    two.load()
    assert one.settings == two.settings and one.settings["model"] == "model"
    config = copy / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace("v_prediction", "epsilon"))
    other = made(str(copy))
    other.load()
    assert other.settings["weights"] != one.settings["weights"]
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    trained = made(str(copy))
    trained.load()
    assert trained.settings["weights"] not in (one.settings["weights"], other.settings["weights"])
    hub = made("someone/model", revision="main")
    assert hub.settings["weights"] is None and hub.download.repository == "someone/model"


@pytest.mark.gpu
@pytest.mark.parametrize("scheduler", ["ddim", "dpm++"])
def test_the_host_never_waits_for_the_gpu_between_two_steps(scheduler, model, monkeypatch):
    generator = made(model, device="cuda", dtype="bf16", scheduler=scheduler, compile=False)
    generator.generate(PROMPTS, SEEDS)
    forward, calls = diffusers.UNet2DConditionModel.forward, []

    def watched(self, *args, **options):
        calls.append(1)
        torch.cuda.set_sync_debug_mode("error" if len(calls) < 4 else "default")
        return forward(self, *args, **options)

    monkeypatch.setattr(diffusers.UNet2DConditionModel, "forward", watched)
    generator.generate(PROMPTS, SEEDS)
    assert len(calls) == 4


@pytest.mark.gpu
def test_on_a_gpu_in_bf16_a_picture_is_that_of_another_run(model):
    generator = made(model, device="cuda", dtype="bf16")
    together = generator.generate(PROMPTS, SEEDS)
    assert (made(model, device="cuda", dtype="bf16").generate(PROMPTS, SEEDS) == together).all()
    assert np.abs(generator.generate(PROMPTS[:1], SEEDS[:1])[0].astype(int) - together[0]).max() <= 1
