"""SD-IPC-FT and -CT on tiny models: what moves, what the losses are, and what vary makes of it."""

from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from hydra.errors import InstantiationException
from PIL import Image
from safetensors import safe_open
from tiny_diffusion import tiny_clip
from torch.nn import functional

from img2prompt.commands import fit
from img2prompt.commands.settings import compose
from img2prompt.commands.tune import tune as tune_command
from img2prompt.commands.vary import vary
from img2prompt.sdipc.converter import Converter, load_clip
from img2prompt.sdipc.prompts import prompted_states
from img2prompt.sdipc.tuning import References, Tuning, _mixed, learning, noise_loss, tune

FT = {"name": "sdipc_ft", "epochs": 30, "lr": 1e-2, "batch_size": 2, "prompts_per_layer": 3}


def loaded(folders):
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folders[0])
    pipeline.set_progress_bar_config(disable=True)
    return Converter(load_clip(str(folders[1]), None), pipeline)


@pytest.fixture
def converter(folders):
    return loaded(folders)


@pytest.fixture(scope="module")
def references():
    drawn = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=drawn)
    return References(images, torch.randn(4, 4, 16, 16, generator=drawn), ["a red cat", "sky", "a red cat", "dog"])


def all_of(converter):
    parts = {"clip": converter.clip, **{name: getattr(converter.pipeline, name) for name in ("unet", "vae")}}
    parts["text_encoder"] = converter.pipeline.text_encoder
    return {f"{part}.{name}": one.clone() for part, model in parts.items() for name, one in model.state_dict().items()}


@torch.no_grad()
def test_without_prompts_the_image_tower_is_the_plain_one_and_with_them_it_sees_every_patch(converter):
    vision, pixels = converter.clip.vision_model, torch.randn(2, 3, 32, 32)
    layers, width = len(vision.encoder.layers), vision.config.hidden_size
    plain = vision(pixels).pooler_output
    assert torch.equal(prompted_states(vision, pixels, torch.empty(layers, 0, width)), plain)
    seen, prompts = [], torch.randn(layers, 3, width)
    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])) for layer in vision.encoder.layers
    ]
    found = prompted_states(vision, pixels, prompts)
    for hook in hooks:
        hook.remove()
    tokens = vision.pre_layrnorm(vision.embeddings(pixels))
    assert [one.shape[1] for one in seen] == [tokens.shape[1] + 3] * layers
    assert torch.equal(seen[0][:, [0, *range(4, seen[0].shape[1])]], tokens)
    assert all(torch.equal(one[:, 1:4], own.expand(2, -1, -1)) for one, own in zip(seen, prompts, strict=True))
    assert not torch.allclose(found, plain)


def test_both_terms_fall_and_nothing_moves_but_prompts_keys_and_values(converter, references):
    before = all_of(converter)
    start, said = fixed_losses(converter, references), []
    learnt = tune(converter, references, Tuning(**FT), seed=0, advance=said.append)
    after = all_of(converter)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    may_move = {name for name in before if ".attn2.to_k" in name or ".attn2.to_v" in name}
    assert moved == may_move and all(name.startswith("unet.") for name in moved)
    assert set(learnt) == {"prompts", *moved} and learnt["prompts"].shape == (2, 3, 24)
    assert len(said) == 60 and all(set(one) == {"image", "text"} for one in said)
    end = fixed_losses(converter, references)
    assert end["image"] < start["image"] - 0.02 and end["text"] < start["text"] - 0.02


@torch.no_grad()
def fixed_losses(converter, references):
    drawn = torch.Generator().manual_seed(7)
    noises = torch.randn(references.latents.shape, generator=drawn)
    times = torch.tensor([100, 300, 600, 900])
    noisy = diffusers.DDPMScheduler.from_config(converter.pipeline.scheduler.config).add_noise(
        references.latents, noises, times
    )
    conditions = {
        "image": converter.conditions(converter.convert(references.images)),
        "text": converter.text_states(references.prompts),
    }
    unet = converter.pipeline.unet
    return {name: float(noise_loss(unet, noisy, times, noises, one)) for name, one in conditions.items()}


def test_ct_is_ft_without_the_text_term_for_thirty_steps(folders, references):
    ct = compose("fit_predictor", ["predictor=sdipc_ct"])["predictor"]
    ct = Tuning(**{key: value for key, value in {**ct, "prompts_per_layer": 2}.items() if key != "_target_"})
    assert (ct.steps(5), ct.lr, ct.text_term) == (30, 5e-6, False)
    assert {ct.lr_at(step, 30) for step in range(30)} == {5e-6}
    ft = Tuning(**{**vars(ct), "name": "sdipc_ft", "text_term": False})
    with_text = Tuning(**{**vars(ct), "text_term": True, "iterations": 1})
    said, results = [[], [], []], []
    for how, one in zip((ct, ft, with_text), said, strict=True):
        results.append(tune(loaded(folders), references, how, 0, one.append))
    assert len(said[0]) == 30 and said[0] == said[1] and set(said[0][0]) == {"image"}
    assert said[2][0]["image"] == pytest.approx(said[0][0]["image"], abs=1e-5) and set(said[2][0]) == {"image", "text"}
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_a_step_follows_the_gradient_of_the_sum_of_both_losses(folders, references):
    """Equation 9, against a sum that is written out; the first step of AdamW goes by the sign of the gradient."""
    how = Tuning("sdipc_ft", epochs=None, iterations=1, lr=1e-3, schedule="constant", batch_size=4, prompts_per_layer=2)
    whole, alone = loaded(folders), loaded(folders)
    tune(whole, references, how, 0)
    tune(alone, references, replace(how, text_term=False), 0)
    grads, image_grads = ({name: one.grad for name, one in gradients(each).items()} for each in (whole, alone))
    drawn, pipeline = torch.Generator().manual_seed(_mixed(0, 0)), loaded(folders).pipeline
    noises = torch.randn(references.latents.shape, generator=drawn)
    scheduler = diffusers.DDPMScheduler.from_config(pipeline.scheduler.config)
    times = torch.randint(0, scheduler.config.num_train_timesteps, (4,), generator=drawn)
    order = np.random.default_rng([0, 0]).permutation(4)
    texts = loaded(folders).text_states(references.prompts)[order]
    noisy = scheduler.add_noise(references.latents[order], noises, times)
    unet = pipeline.unet
    functional.mse_loss(unet(noisy, times, encoder_hidden_states=texts).sample, noises).backward()
    by_hand = {name: one.grad for name, one in unet.named_parameters() if name in grads}
    assert by_hand and all(
        torch.allclose(grads[name], image_grads[name] + by_hand[name], atol=1e-6, rtol=1e-3) for name in by_hand
    )
    assert any(by_hand[name].abs().max() > 1e-4 for name in by_hand)
    # The condition of the text term does not pass through the image tower, and nothing else keeps a gradient.
    assert torch.allclose(whole.prompts.grad, alone.prompts.grad, atol=1e-7)
    parts = (whole.clip, whole.pipeline.text_encoder, whole.pipeline.vae)
    assert all(one.grad is None for part in parts for one in part.parameters())


def gradients(converter):
    return {name: one for name, one in converter.pipeline.unet.named_parameters() if one.requires_grad}


def test_the_rate_falls_by_a_cosine_and_epochs_see_every_image(references):
    how = Tuning(**FT)
    rates = [how.lr_at(step, 10) for step in range(10)]
    assert rates[0] == how.lr and rates == sorted(rates, reverse=True) and rates[5] == pytest.approx(how.lr / 2)
    from img2prompt.sdipc.tuning import _drawn

    for epoch in range(3):
        places = [_drawn(references, how, 0, 2 * epoch + part)[0] for part in range(2)]
        assert sorted(sum(places, [])) == [0, 1, 2, 3]
    other = Tuning(**{**FT, "other_of_prompt": True})
    for step in range(6):
        for place, target in zip(*_drawn(references, other, 0, step), strict=True):
            assert target == {0: 2, 2: 0}.get(place, place)


def test_the_same_seed_learns_the_same_and_another_another(folders, references):
    how = Tuning(**{**FT, "epochs": 1})
    one, two, three = (tune(loaded(folders), references, how, seed) for seed in (0, 0, 1))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["prompts"], three["prompts"])


@pytest.fixture
def pairs(tmp_path):
    folder = tmp_path / "pairs"
    folder.mkdir()
    drawn = np.random.default_rng(1)
    for name in ("one", "two", "three"):
        Image.fromarray(drawn.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"a {name}")
    return folder


def tuned(folders, out, *overrides, **paths):
    settings = compose("fit_predictor", ["device=cpu", "predictor.prompts_per_layer=2", *overrides])
    settings |= {"pipeline": str(folders[0]), "clip": str(folders[1]), "out": str(out)}
    settings["data"]["root"] = str(paths["root"]) if "root" in paths else None
    settings["data"]["source"]["root"] = settings["data"]["root"]
    settings["images"] = str(paths["images"]) if "images" in paths else None
    tune_command(**settings)


def test_what_is_saved_is_small_and_vary_uses_it(folders, pairs, tmp_path, capsys):
    out = tmp_path / "tuned.safetensors"
    tuned(folders, out, "predictor=sdipc_ft", "predictor.epochs=2", "predictor.lr=0.01", root=pairs)
    told = capsys.readouterr().out
    assert "image loss" in told and "text loss" in told and f"vary ckpt={out}" in told
    unet = diffusers.UNet2DConditionModel.from_pretrained(folders[0], subfolder="unet")
    with safe_open(out, framework="pt") as file:
        names = set(file.keys())
        count = sum(file.get_tensor(name).numel() for name in names)
    own = {f"unet.{name}" for name, _ in unet.named_parameters() if ".attn2.to_k" in name or ".attn2.to_v" in name}
    assert names == own | {"prompts"} and count < 0.2 * sum(one.numel() for one in unet.parameters())
    made, models = {}, {"pipeline": str(folders[0]), "clip": str(folders[1])}
    # The file says which models it belongs to.
    for name, given in (("plain", models), ("tuned", {"ckpt": str(out)})):
        options = compose("vary", ["images=x", "out=x", "count=1", "steps=2", "device=cpu"])
        vary(**{**options, **given, "images": str(pairs / "one.png"), "out": str(tmp_path / name)})
        made[name] = (tmp_path / name / "one_0.png").read_bytes()
    assert made["plain"] != made["tuned"]
    with pytest.raises(ValueError, match="tuned.safetensors: is there already; choose another name"):
        tuned(folders, out, "predictor=sdipc_ct", images=pairs)
    other = tiny_clip(tmp_path / "other", folders[0], projected=48)
    options = compose("vary", ["images=x", "out=x", "count=1", "steps=2", "device=cpu"])
    given = {"ckpt": str(out), "clip": str(other), "images": str(pairs / "one.png"), "out": str(tmp_path / "none")}
    with pytest.raises(ValueError, match="ckpt=.*tuned.safetensors: it was tuned with another clip than clip= gives"):
        vary(**{**options, **given})
    images = tmp_path / "ct.safetensors"
    tuned(folders, images, "predictor=sdipc_ct", images=pairs)
    assert "30 steps" in capsys.readouterr().err and images.is_file()


def test_long_prompts_are_read_in_part_and_bad_images_left_out(folders, pairs, tmp_path, capsys):
    (pairs / "two.txt").write_text("word " * 80)
    (pairs / "bad.png").write_bytes(b"no")
    (pairs / "bad.txt").write_text("a line")
    tuned(folders, tmp_path / "x.safetensors", "predictor=sdipc_ft", "predictor.epochs=1", root=pairs)
    told = capsys.readouterr().err
    assert "1 prompts have more tokens than are read" in told and "bad is left out: " in told


def test_what_cannot_be_written_is_known_before_anything_is_loaded(folders, pairs, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("img2prompt.commands.tune.load_converter", None)
    with pytest.raises(OSError, match="file"):
        tuned(folders, tmp_path / "file" / "x.safetensors", "predictor=sdipc_ct", images=pairs)


def test_what_cannot_be_tuned_is_told_in_a_sentence(folders, pairs, tmp_path):
    out = tmp_path / "x.safetensors"
    for overrides, paths, sentence in (
        (("predictor=sdipc_ft",), {}, "predictor=sdipc_ft: give data.root=, images with prompts"),
        (("predictor=sdipc_ft",), {"images": pairs}, "predictor.text_term=true needs prompts"),
        (("predictor=sdipc_ct", "predictor.epochs=1"), {"images": pairs}, "one of them says how long"),
        (("predictor=sdipc_ct", "predictor.iterations=0"), {"images": pairs}, "one of them says how long, and is at"),
        (("predictor=sdipc_ct", "predictor.schedule=linear"), {"images": pairs}, "predictor.schedule=linear: must be"),
        (("predictor=sdipc_ct", "size_px=33"), {"images": pairs}, "size_px must be a multiple of 2 above 0, got 33"),
        (("predictor=sdipc_ct", "size_px=-2"), {"images": pairs}, "size_px must be a multiple of 2 above 0, got -2"),
    ):
        with pytest.raises((ValueError, InstantiationException), match=sentence):
            tuned(folders, out, *overrides, **paths)
    assert not out.exists()
    from img2prompt.sdipc.tuning import apply_tuning, read_tuning, save_tuning

    out.write_bytes(b"no")
    with pytest.raises(ValueError, match="ckpt=.*: cannot be read"):
        read_tuning(out)
    how = Tuning(**FT)
    about = {"pipeline": "x", "revision": None, "clip": "x", "clip_revision": None, "norm": 27.5, "floor": 0.3}
    save_tuning(out, {"prompts": torch.zeros(2, 3, 25)}, how, {**about, "norm": "x"})
    with pytest.raises(ValueError, match="ckpt=.*: its header is damaged .norm."):
        read_tuning(out)
    save_tuning(out, {"prompts": torch.full((2, 3, 24), float("nan"))}, how, about)
    with pytest.raises(ValueError, match="its prompts are damaged"):
        apply_tuning(str(out), read_tuning(out)[1], loaded(folders))
    save_tuning(out, {"prompts": torch.zeros(2, 3, 25)}, how, about)
    with pytest.raises(ValueError, match="its prompts .2, 3, 25. are of another CLIP"):
        apply_tuning(str(out), read_tuning(out)[1], loaded(folders))
    save_tuning(out, {"unet.x": torch.zeros(2)}, how, about)
    with pytest.raises(ValueError, match="of another U-Net, or damaged: 9 tensors .first: unet.down"):
        apply_tuning(str(out), read_tuning(out)[1], loaded(folders))
    whole = learning(loaded(folders), 0, 0)
    save_tuning(out, {name: torch.full_like(one, float("nan")) for name, one in whole.items()}, how, about)
    with pytest.raises(ValueError, match="to_k.weight is of another U-Net, or damaged"):
        apply_tuning(str(out), read_tuning(out)[1], loaded(folders))


def test_fit_takes_either_kind_by_its_keys(monkeypatch):
    asked = []
    monkeypatch.setattr("img2prompt.commands.tune.tune", lambda **settings: asked.append(settings["predictor"]["name"]))
    fit.main(["predictor=sdipc_ct", "images=x"])
    assert asked == ["sdipc_ct"]
