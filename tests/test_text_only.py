"""The rung before any image: CLIP's features of the prompts stand for features of images."""

import math

import killing
import open_clip
import pyarrow.parquet as pq
import pytest
import torch
from conftest import QUICK, read_csv, settings_of
from safetensors.torch import load_file, save_file
from torch.nn.functional import cosine_similarity, normalize

from img2prompt.build import build
from img2prompt.commands.train import train
from img2prompt.data.fitting import fit
from img2prompt.data.images import decode
from img2prompt.encoders.encoder import Encoder
from img2prompt.encoders.text_tower import text_tower_refusal
from img2prompt.ridge import fit_from_texts, fit_ridge, fit_upon
from img2prompt.training.checkpoint import read_state

VISION = {"layers": 2, "width": 64, "head_width": 32, "image_size": 32, "patch_size": 8}
CLIP = {"_target_": "img2prompt.encoders.openclip.OpenCLIP", "name": "ViT-S-32-alt", "vision_config": VISION}
CHOICE = ("encoder=openclip", "encoder.name=ViT-S-32-alt", "encoder.tag=null")
CHOICE += tuple(f"+encoder.vision_config.{key}={value}" for key, value in VISION.items())


@pytest.fixture(scope="module")
def clip():
    torch.manual_seed(0)
    config = open_clip.get_model_config("ViT-S-32-alt")
    return open_clip.CLIP(config["embed_dim"], {**config["vision_cfg"], **VISION}, config["text_cfg"]).eval()


@pytest.fixture(scope="module")
def clip_file(clip, tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "clip.safetensors"
    save_file({key: value.contiguous() for key, value in clip.state_dict().items()}, path)
    return path


def planted(count, seed, gap=0.0, length=1.0, noise=0.3):
    """Features of texts and of images of the same things, and their targets: 24 numbers, seen through fixed maps."""
    fixed = torch.Generator().manual_seed(0)
    to_space, to_target = torch.randn(24, 48, generator=fixed), torch.randn(24, 32, generator=fixed)
    apart = normalize(torch.randn(48, generator=fixed), dim=0)
    chance = torch.Generator().manual_seed(seed)
    things = torch.randn(count, 24, generator=chance) + 0.5
    texts, images = ((things + noise * torch.randn(count, 24, generator=chance)) @ to_space for _ in range(2))
    images = length * (normalize(images, dim=-1) + gap * apart)
    return normalize(texts, dim=-1), images, normalize(things @ to_target, dim=-1)


def cosine(weight, bias, images, targets):
    return cosine_similarity(images @ weight.T + bias, targets).mean().item()


def test_a_map_fitted_on_texts_serves_images_of_any_length():
    texts, _, targets = planted(2000, 1)
    weight, bias = fit_from_texts(texts, targets)
    found = []
    for length in (1.0, 17.0):
        _, images, wanted = planted(500, 2, length=length)
        found.append(cosine(weight, bias, images, wanted))
    constant = cosine_similarity(targets.mean(0).expand(500, -1), wanted).mean().item()
    assert found[0] == pytest.approx(found[1], abs=1e-5) and found[0] > 0.9 > constant + 0.2


def test_the_mean_of_a_few_images_closes_the_gap_between_texts_and_images():
    texts, _, targets = planted(2000, 1)
    _, some, _ = planted(200, 3, gap=1.5, length=7.0)
    _, images, wanted = planted(500, 2, gap=1.5, length=7.0)
    blind, told = fit_from_texts(texts, targets), fit_from_texts(texts, targets, some)
    assert cosine(*told, images, wanted) > cosine(*blind, images, wanted) + 0.02
    assert cosine(*told, images, wanted) > 0.9


def test_a_good_beginning_helps_ridge_with_few_images_and_a_bad_one_does_no_harm():
    texts, _, targets = planted(2000, 1)
    known = fit_from_texts(texts, targets)
    _, few, few_targets = planted(40, 4)
    _, images, wanted = planted(500, 2)
    groups = torch.arange(40)
    anew = fit_ridge(few, few_targets, groups)
    alone = cosine(anew.weight, anew.bias, images, wanted)
    assert cosine(*fit_upon(*known, few, few_targets, groups), images, wanted) > alone + 0.05
    bad = (torch.randn(32, 48, generator=torch.Generator().manual_seed(9)), known[1])
    upon = fit_upon(*bad, few, few_targets, groups)
    assert torch.equal(upon[0], anew.weight) and torch.equal(upon[1], anew.bias)


@pytest.mark.parametrize("prefixed", [False, True])
def test_features_of_prompts_are_those_of_the_whole_model(prefixed, clip, tmp_path):
    weights = clip.state_dict()
    if prefixed:
        # Newer models keep their text tower under a name.
        weights = {
            key if key.startswith(("visual.", "logit")) else f"text.{key}": value for key, value in weights.items()
        }
    save_file({key: value.contiguous() for key, value in weights.items()}, tmp_path / "w.safetensors")
    prompts = ["a red fish", "two stars over the sea", "x " * 200]
    encoder = build(CLIP, Encoder)
    assert encoder.text_refusal(str(tmp_path / "w.safetensors")) is None
    found = encoder.text_features(prompts, str(tmp_path / "w.safetensors"), "cpu", lambda count: None)
    with torch.no_grad():
        expected = clip.encode_text(open_clip.get_tokenizer("ViT-S-32-alt")(prompts))
    assert torch.allclose(found, expected, atol=1e-5)


def test_encoders_without_a_text_tower_say_why(clip, tmp_path):
    tower = {key: value.contiguous() for key, value in clip.state_dict().items() if key.startswith("visual.")}
    save_file(tower, tmp_path / "tower.safetensors")
    encoder = build(CLIP, Encoder)
    assert encoder.text_refusal(str(tmp_path / "tower.safetensors")).endswith("holds no text tower")
    other = build({"_target_": "img2prompt.encoders.timm_model.Timm", "name": "test_vit"}, Encoder)
    assert other.text_refusal() == "the encoder has no text tower"
    assert "tokenizer on the Hub" in text_tower_refusal("ViT-SO400M-14-SigLIP")
    assert text_tower_refusal("EVA02-L-14") is None


@pytest.fixture(scope="module")
def run(tmp_path_factory, pairs_folder, clip_file):
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(settings(pairs_folder, clip_file), folder)
    return folder


def settings(pairs_folder, clip_file, *more):
    usual = (f"data.root={pairs_folder}", f"encoder.pretrained={clip_file}", "trainer.max_epochs=0")
    return settings_of(*QUICK, *CHOICE, *usual, *more)


def test_a_run_climbs_it_before_the_probe(run):
    rungs = {row["rung"]: row for row in read_csv(run / "ladder.csv")}
    assert list(rungs) == ["mean", "text_only", "probe", "finetune"]
    assert rungs["text_only"]["note"] == "" and rungs["text_only"]["val_cosine"]
    weights = load_file(run / "checkpoints" / "text_only.safetensors")
    assert weights["head.bias"].count_nonzero() == 0 and weights["head.weight"].count_nonzero() > 0


def test_its_head_is_the_ridge_of_the_training_prompts_alone(run, pairs_folder, clip):
    from img2prompt.bank import read_bank

    bank = read_bank(run / "bank.parquet")
    distinct = {prompt: place for place, prompt in reversed(list(enumerate(bank.prompts)))}
    prompts = sorted(distinct)
    with torch.no_grad():
        texts = clip.encode_text(open_clip.get_tokenizer("ViT-S-32-alt")(prompts))
    targets = torch.as_tensor(bank.embeddings)[[distinct[prompt] for prompt in prompts]]
    weight, _ = fit_from_texts(texts, targets)
    found = load_file(run / "checkpoints" / "text_only.safetensors")["head.weight"]
    # The folds are of another order here, so the penalty may be another; what is said of a text is nearly the same.
    said = cosine_similarity(texts @ found.T, texts @ weight.T)
    assert said.min() > 0.9


@pytest.mark.parametrize(
    ("option", "rung", "changes"),
    [
        ("stages.text_only.images=8", "text_only", True),
        ("head.layers=1", "text_only", True),
        ("stages.probe=null", "text_only", False),
    ],
)
def test_its_options_change_what_they_should(option, rung, changes, run, tmp_path, pairs_folder, clip_file):
    train(settings(pairs_folder, clip_file, option), tmp_path / "run")
    first = load_file(run / "checkpoints" / f"{rung}.safetensors")
    second = load_file(tmp_path / "run" / "checkpoints" / f"{rung}.safetensors")
    same = all(first[key].shape == value.shape and torch.equal(first[key], value) for key, value in second.items())
    assert same != changes


RECIPE = (
    "stages=progressive",
    "trainer.max_epochs=2",
    "stages.finetune_larger.image_size_px=48",
    "optim.layer_decay=0.7",
    "optim.ema_decay=0.9",
    "optim.lr=1e-3",
    "head.dropout=0.2",
    "head.layers=1",
    "augment=crop",
    "augment.mixup=0.2",
    "encoder.drop_path=0.3",
    "stages.finetune.patch_dropout=0.5",
    "stages.finetune_larger.lora_rank=2",
    "trainer.accumulate_grad_batches=2",
    "trainer.activation_checkpointing=true",
    "loss=cosine_softmax",
)


def test_pairs_whose_image_is_near_its_prompt_are_easy(tmp_path, pairs_folder, clip_file, clip):
    from img2prompt.data.difficulty import read_scores
    from img2prompt.data.kaggle import Kaggle
    from img2prompt.training.curriculum import USED

    first = (
        "curriculum=easy_first",
        "curriculum.scorer=clip_alignment",
        "data.batch_size=4",
        "stages.probe=null",
        "trainer.max_epochs=2",
    )
    train(settings(pairs_folder, clip_file, *first, "curriculum.stages=2", "stages.text_only=null"), tmp_path / "run")
    samples = {sample.id: sample for sample in Kaggle(pairs_folder).find().samples}
    used = pq.read_table(tmp_path / "run" / USED)["id"].to_pylist()
    scores = read_scores(tmp_path / "run" / USED, [samples[one] for one in used])
    encoder = build({**CLIP, "tag": None}, Encoder)
    encoder.load_pretrained(str(clip_file))
    want = encoder.preprocessing
    for one, score in list(zip(used, scores, strict=True))[:4]:
        sample = samples[one]
        image = fit(decode(sample.source.read(sample.location)), 32, want.interpolation, want.resize_mode)
        with torch.no_grad():
            of_image = encoder.eval()({"images": image[None]}).pooled
            of_text = clip.encode_text(open_clip.tokenize([sample.prompt]))
        assert cosine_similarity(of_image, of_text).item() == pytest.approx(score, abs=1e-4)


@pytest.fixture(scope="module")
def by_the_recipe(tmp_path_factory, pairs_folder, clip_file):
    folder = tmp_path_factory.mktemp("runs") / "recipe"
    train(settings(pairs_folder, clip_file, *RECIPE), folder)
    return folder


def test_all_of_the_recipe_trains_together(by_the_recipe, clip_file):
    rungs = {row["rung"]: row for row in read_csv(by_the_recipe / "ladder.csv")}
    assert list(rungs) == ["mean", "text_only", "probe", "finetune", "finetune_larger"]
    assert all(row["val_cosine"] for row in rungs.values())
    before = {f"encoder.{key}": value for key, value in load_file(clip_file).items() if key.startswith("visual.")}
    after = load_file(by_the_recipe / "checkpoints" / "finetune.safetensors")
    moved = {key: (after[key] - value).abs().mean().item() for key, value in before.items()}
    # Each block less than the one above it, and all of them.
    first, last = (moved[f"encoder.visual.transformer.resblocks.{i}.mlp.c_fc.weight"] for i in (0, 1))
    assert all(value > 0 for value in moved.values()) and moved["encoder.visual.conv1.weight"] < first < last
    state = read_state(by_the_recipe / "checkpoints")
    assert state["ema"] and state["loss"]["parts.softmax.log_scale"].item() != pytest.approx(-math.log(0.05), abs=1e-6)


@pytest.mark.parametrize("number", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_all_of_the_recipe_goes_on_to_the_byte(number, by_the_recipe, tmp_path, pairs_folder, clip_file, monkeypatch):
    options = settings(pairs_folder, clip_file, *RECIPE, "trainer.checkpoint_every_n_steps=1")
    with monkeypatch.context() as patch:
        killing.arm("step", number, killing.raise_killed, patch.setattr)
        with pytest.raises(killing.Killed):
            train(options, tmp_path / "run")
    train(options, tmp_path / "run")
    for name in ("finetune.safetensors", "finetune_larger.safetensors", "best.safetensors", "../metrics.csv"):
        assert (tmp_path / "run" / "checkpoints" / name).read_bytes() == (
            by_the_recipe / "checkpoints" / name
        ).read_bytes()


def test_a_run_that_goes_on_after_it_gives_the_same_probe(run, tmp_path, pairs_folder, clip_file, monkeypatch):
    from img2prompt.training import finetune

    with monkeypatch.context() as patch:
        patch.setattr(finetune, "fit_upon", lambda *args: (_ for _ in ()).throw(InterruptedError))
        with pytest.raises(InterruptedError):
            train(settings(pairs_folder, clip_file), tmp_path / "halves")
    train(settings(pairs_folder, clip_file), tmp_path / "halves")
    for rung in ("text_only", "probe"):
        name = f"checkpoints/{rung}.safetensors"
        assert (run / name).read_bytes() == (tmp_path / "halves" / name).read_bytes()
