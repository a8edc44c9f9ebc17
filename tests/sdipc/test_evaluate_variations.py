"""The measures of variations: against torchmetrics, and against formulas written out."""

import csv
import json
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from scipy.linalg import sqrtm
from torch.nn.functional import normalize
from torchmetrics.functional.multimodal.clip_score import clip_score
from torchmetrics.image.fid import FrechetInceptionDistance

from img2prompt.commands.evaluate_variations import evaluate_variations
from img2prompt.commands.settings import compose
from img2prompt.sdipc.likeness import frechet_distance, inception, likeness
from img2prompt.sdipc.variations import TABLE, digest_of

VISION = {"layers": 2, "width": 64, "head_width": 32, "image_size": 32, "patch_size": 8}
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}


@pytest.fixture(scope="module")
def judges(tmp_path_factory):
    """Files of a tiny CLIP and of a tiny ViT, both random, and the CLIP."""
    folder = tmp_path_factory.mktemp("judges")
    torch.manual_seed(0)
    config = open_clip.get_model_config("ViT-S-32-alt")
    clip = open_clip.CLIP(config["embed_dim"], {**config["vision_cfg"], **VISION}, config["text_cfg"]).eval()
    save_file({key: value.contiguous() for key, value in clip.state_dict().items()}, folder / "clip.safetensors")
    vit = timm.create_model("vit_small_patch16_224.dino", num_classes=0, **TINY)
    save_file(vit.state_dict(), folder / "dino.safetensors")
    return folder, clip


@pytest.fixture
def varied(tmp_path, pictures):
    """A folder as `vary` leaves it: of each of three pictures two variations, which are like it and like each other."""
    folder, drawn = tmp_path / "varied", np.random.default_rng(1)
    folder.mkdir()
    rows = []
    for path in sorted(pictures.glob("*.png")):
        original = np.asarray(Image.open(path).resize((32, 32)), dtype=float)
        for number in range(2):
            noisy = (original + drawn.normal(0, 8, original.shape)).clip(0, 255).astype(np.uint8)
            name = f"{path.stem}_{number}.png"
            Image.fromarray(noisy).save(folder / name)
            text = "a red sky" if number else None
            rows.append({"file": name, "images": [str(path)], "digests": [digest_of(path)], "text": text})
    write_rows(folder, rows)
    return folder


def write_rows(folder, rows):
    (folder / TABLE).write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows_in(folder):
    return [json.loads(line) for line in (folder / TABLE).read_text().splitlines()]


def evaluated(folder, judges, *overrides):
    own = [f"clip.name=ViT-S-32-alt clip.tag=null clip.pretrained={judges[0] / 'clip.safetensors'}"]
    own += [f"+clip.vision_config.{key}={value}" for key, value in VISION.items()]
    own += [f"dino.pretrained={judges[0] / 'dino.safetensors'} +dino.image_size_px=32"]
    own += [f"+dino.model_kwargs.{key}={value}" for key, value in TINY.items()]
    arguments = " ".join([f"variations={folder} device=cpu batch_size=4", *own]).split()
    evaluate_variations(**compose("evaluate_variations", [*arguments, *overrides]))
    return {row["measure"]: row for row in json.loads((folder / "evaluation.json").read_text())["measures"]}


def test_measures_are_those_of_torchmetrics(varied, judges, tmp_path, capsys):
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("imgId,prompt\na,a dog\nb,two cats\nzz,nothing\n")
    found = evaluated(varied, judges, f"prompts={prompts}")
    assert list(found) == ["CLIP-I", "CLIP-T", "CLIP-Score", "DINO"]
    told = capsys.readouterr()
    assert "| CLIP-I | 6 | " in told.out and "1 of 6 variations have no text" in told.err
    assert (varied / "evaluation.md").read_text().splitlines()[2] in told.out
    with (varied / "evaluation.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["text"] for row in table] == ["a dog", "a red sky", "two cats", "a red sky", "", "a red sky"]
    assert table[4]["CLIP-T"] == "" and float(table[4]["CLIP-I"]) > 0
    for row in table:
        name = next((one for one in row["file"][0]), "")
        image, reference = (seen(path) for path in (varied / row["file"], tmp_path / "pictures" / f"{name}.png"))
        assert float(row["CLIP-I"]) == pytest.approx(scored(judges[1], image, reference), abs=2e-3)
        if row["text"]:
            assert float(row["CLIP-Score"]) == pytest.approx(max(0, scored(judges[1], image, row["text"])), abs=2e-3)
    mean = np.mean([float(row["DINO"]) for row in table])
    assert found["DINO"]["mean"] == pytest.approx(mean, abs=1e-3)
    assert found["DINO"]["low"] <= mean <= found["DINO"]["high"]
    # They are more like their own picture than like another one, in both.
    assert all(found[name]["mean"] > found[name]["of_any_other"] for name in ("CLIP-I", "DINO"))


def seen(path):
    """At the size of the tiny CLIP, as Pillow makes it."""
    image = Image.open(path).convert("RGB")
    scale = 32 / min(image.size)
    image = image.resize(tuple(max(32, int(side * scale)) for side in image.size), Image.Resampling.BICUBIC)
    left, top = (round((side - 32) / 2) for side in image.size)
    return torch.from_numpy(np.array(image.crop((left, top, left + 32, top + 32)))).permute(2, 0, 1)


def scored(clip, one, other):
    """By torchmetrics, which asks transformers' models."""
    mean, std = (
        torch.tensor(values).view(3, 1, 1) for values in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    )
    tokenizer = open_clip.get_tokenizer("ViT-S-32-alt")

    class Model(torch.nn.Module):
        config = SimpleNamespace(text_config=SimpleNamespace(max_position_embeddings=77))

        def get_image_features(self, pixels):
            return clip.encode_image(pixels)

        def get_text_features(self, tokens, attention_mask):
            return clip.encode_text(tokens)

    def processor(text=None, images=None, **options):
        if images is not None:
            return {"pixel_values": torch.stack([(image.float() / 255 - mean) / std for image in images])}
        tokens = tokenizer(text)
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}

    with torch.no_grad():
        return float(clip_score(one, other, lambda: (Model(), processor)))


def test_any_other_is_the_mean_over_what_is_not_ones_own():
    made, others = (normalize(torch.randn(count, 8), dim=-1) for count in (3, 4))
    own, rest = likeness(made, others, [[0], [1, 3], [2]])
    cosines = made @ others.T
    assert own[1] == pytest.approx(float(cosines[1, [1, 3]].mean()), abs=1e-6)
    assert rest[0] == pytest.approx(float(cosines[0, 1:].mean()), abs=1e-6)
    assert likeness(made, others[:1], [[0], [0], [0]])[1].isnan().all()


class Pixels(torch.nn.Module):
    """Features that can be followed: the mean of each colour."""

    num_features = 3

    def forward(self, images):
        return images.float().mean((2, 3)) / 255


def test_fid_is_the_formula(varied, pictures):
    real, made = sorted(pictures.glob("*.png")), sorted(varied.glob("*.png"))
    found = frechet_distance(FrechetInceptionDistance(feature=Pixels()), real, made, "cpu", 2, 1)
    sets = [torch.stack([seen(path) for path in paths]).double().mean((2, 3)).numpy() / 255 for paths in (real, made)]
    (mean, spread), (other_mean, other_spread) = [(one.mean(0), np.cov(one, rowvar=False)) for one in sets]
    expected = ((mean - other_mean) ** 2).sum() + np.trace(
        spread + other_spread - 2 * sqrtm(spread @ other_spread).real
    )
    assert found == pytest.approx(expected, rel=2e-2, abs=1e-6) and expected > 1e-6


def test_what_cannot_be_measured_is_said(varied, judges, pictures, tmp_path):
    def refused(message, *overrides, folder=varied):
        with pytest.raises(ValueError, match=message):
            evaluated(folder, judges, *overrides)

    refused("variations=.*nowhere: no such folder", folder=tmp_path / "nowhere")
    refused("variations=.*pictures: no variations there, with the variations.jsonl", folder=pictures)
    refused("clip.pretrained must be true or a file", "clip.pretrained=false")
    refused("/nope: no such weights file; dino.pretrained is", "dino.pretrained=/nope")
    refused("inception is of fid=true", "inception=x.pth")
    refused("inception=x.pth: no such file", "fid=true", "inception=x.pth")
    (tmp_path / "prompts.csv").write_text("imgId,prompt\nz,a dog\n")
    refused(r"none of its imgIds \(first: z\) is one of the references \(first: a\)", f"prompts={tmp_path}/prompts.csv")
    (tmp_path / "bad.pth").write_bytes(b"no weights")
    refused("inception=.*bad.pth: Inception's weights cannot be had", "fid=true", f"inception={tmp_path}/bad.pth")
    (varied / "a_0.png").write_bytes(b"no")
    refused("a_0.png: ")


def test_references_that_have_changed_are_not_compared(varied, judges, pictures, capsys):
    Image.new("RGB", (32, 32), "red").save(pictures / "a.png")
    assert evaluated(varied, judges)["CLIP-I"]["variations"] == 4
    assert "2 of 6 variations are left out: their references are gone or changed" in capsys.readouterr().err
    for path in pictures.glob("*.png"):
        path.unlink()
    with pytest.raises(ValueError, match="6 of 6 variations are left out"):
        evaluated(varied, judges)


def test_a_blend_is_compared_with_all_that_it_was_made_of(varied, judges):
    before = evaluated(varied, judges)["CLIP-I"]["mean"]
    known = {row["images"][0]: row["digests"][0] for row in rows_in(varied)}
    everything = {"images": list(known), "digests": list(known.values())}
    write_rows(varied, [{**row, **everything} for row in rows_in(varied)])
    found = evaluated(varied, judges)["CLIP-I"]
    assert found["of_any_other"] is None and found["mean"] < before


@pytest.mark.slow
def test_inception_is_built_from_a_file_and_judges(tmp_path, varied, pictures):
    from torchmetrics.image.fid import NoTrainInceptionV3

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "load", lambda *args, **kwargs: {})
        patch.setattr(NoTrainInceptionV3, "load_state_dict", lambda self, weights: None)
        drawn = NoTrainInceptionV3("inception-v3-compat", ["2048"], "drawn")
    torch.save(drawn.state_dict(), tmp_path / "inception.pth")
    real, made = sorted(pictures.glob("*.png")), sorted(varied.glob("*.png"))
    own = frechet_distance(inception(str(tmp_path / "inception.pth")), real, made, "cpu", 4, 1)
    assert np.isfinite(own)
