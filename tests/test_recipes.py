"""Every experiment composes, and its encoder is built at its true size without memory or a download."""

from pathlib import Path

import pytest
import torch
from conftest import ROOT, settings_of

from img2prompt.build import build
from img2prompt.commands.settings import checked
from img2prompt.encoders.encoder import Encoder
from img2prompt.regressor import Target, build_regressor

EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))
# Embedding width, input size, millions of parameters of the image tower, mean of red, quick GELU.
FACTS = {
    "vit_h": (1024, 224, 632, 0.48145466, False),
    "vit_l": (768, 224, 304, 0.48145466, True),
    "vit_l_336": (768, 336, 304, 0.48145466, True),
    "vit_b": (512, 224, 86, 0.48145466, True),
    "convnext_xxl": (1024, 256, 847, 0.48145466, False),
    "eva02_l": (768, 224, 304, 0.48145466, False),
    "siglip": (1152, 224, 428, 0.5, False),
    "clipart": (1280, 224, 3.4, 0.5, None),
    "align": (768, 224, 304, 0.48145466, True),
    "reverse_sd_clip": (1024, 224, 632, 0.48145466, False),
    "reverse_sd_vit": (768, 224, 86, 0.5, None),
    "reverse_sd_swin": (1536, 256, 195, 0.485, None),
    "joint_vocabulary": (768, 224, 86, 0.5, None),
}


PAPER = (
    *("reverse_sd", "reverse_sd_clip", "reverse_sd_vit", "reverse_sd_swin", "reverse_sd_unet"),
    "joint_vocabulary",
)


# Its architecture is its pipeline's, which only the Hub knows.
ELSEWHERE = {"reverse_sd", "reverse_sd_unet"}


def test_every_experiment_is_listed_here():
    assert set(EXPERIMENTS) == set(FACTS) | ELSEWHERE


@pytest.mark.parametrize("name", sorted(FACTS))
def test_an_experiment_builds_its_encoder_with_the_facts_of_its_tag(name):
    settings = checked("train", settings_of(f"+experiment={name}", "data.root=x"))
    choice = dict(settings["encoder"])
    assert choice.pop("pretrained") is True and settings["name"] == name
    width, size, millions, mean, quick_gelu = FACTS[name]
    with torch.device("meta"):
        encoder = build(choice, Encoder)
        regressor = build_regressor(encoder, settings["head"], Target("x", None, 384))
    assert encoder.width == width and encoder.preprocessing.image_size_px == size
    assert encoder.preprocessing.mean[0] == pytest.approx(mean)
    assert encoder.facts.get("quick_gelu") is quick_gelu
    assert sum(parameter.numel() for parameter in encoder.parameters()) / 1e6 == pytest.approx(millions, rel=0.02)
    assert all(parameter.is_meta for parameter in regressor.parameters())
    assert encoder.downloads()


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_opens_with_its_command_and_its_measured_number(name):
    head = Path(ROOT, "conf", "experiment", f"{name}.yaml").read_text().split("defaults:")[0]
    assert f"+experiment={name}" in head and "Hardware" in head and ("not yet measured" in head or "0." in head)


@pytest.mark.parametrize("choice", ["data=kaggle", "encoder=huggingface", "logger=wandb", "logger=tensorboard"])
def test_keys_that_every_run_has_can_be_overridden_with_any_choice(choice):
    keys = "seed=1 run_dir=r name=n resume=x init_from=i data.root=d data.count=3 data.val=0.2 data.batch_size=4"
    more = "trainer.max_epochs=1 trainer.devices=1 trainer.precision=32-true trainer.max_time=00:01:00:00"
    encoder = "encoder.name=a encoder.tag=b encoder.pretrained=false"
    settings = settings_of(choice, *keys.split(), *more.split(), *encoder.split())
    assert settings["data"]["count"] == 3 and settings["encoder"]["tag"] == "b" and settings["name"] == "n"


@pytest.mark.parametrize("name", sorted(set(FACTS) - {"clipart", "align", *PAPER}))
def test_the_experiments_of_the_clip_family_train_by_the_recipe(name):
    settings = checked("train", settings_of(f"+experiment={name}", "data.root=x"))
    assert list(settings["stages"]) == ["mean", "text_only", "probe", "finetune"]
    assert 0 < settings["optim"]["layer_decay"] < 1 and 0.999 < settings["optim"]["ema_decay"] < 1
    assert settings["optim"]["head_lr_factor"] == 10 and 1e-5 <= settings["optim"]["lr"] <= 5e-5
    assert settings["augment"]["min_area"] == 0.5 and settings["augment"]["flip"] == 0
    assert settings["loss"]["_target_"].endswith("Cosine") and settings["head"]["_target_"].endswith("Linear")


@pytest.mark.parametrize("name", PAPER)
def test_the_experiments_of_reverse_stable_diffusion_train_by_its_settings(name):
    settings = checked("train", settings_of(f"+experiment={name}", "data.root=x"))
    optim = settings["optim"]
    assert (optim["lr"], optim["layer_decay"], optim["head_lr_factor"], optim["ema_decay"]) == (1e-4, 1, 1, None)
    assert optim["warmup_fraction"] == 0 and settings["data"]["batch_size"] == 64
    assert settings["stages"]["text_only"] is None
    if name == "reverse_sd_clip":
        assert settings["head"]["hidden"] == [8192, 8192] and settings["stages"]["finetune"] is None
    else:
        assert settings["stages"]["probe"] is None
    assert settings["name"] == name
    if name in ("reverse_sd", "joint_vocabulary"):
        assert settings["head"]["vocabulary_size"] == 1000
        assert settings["loss"]["weights"] == {"cosine": 1.0, "vocabulary": 0.1, "huber": 1.0}


def test_alignment_trains_a_large_head_on_kept_features_in_large_batches():
    settings = checked("train", settings_of("+experiment=align", "data.root=x"))
    assert settings["head"]["hidden"] == 16384 and settings["loss"]["_target_"].endswith("Sigmoid")
    assert settings["data"]["batch_size"] == 32768 and settings["stages"]["finetune"] is None
