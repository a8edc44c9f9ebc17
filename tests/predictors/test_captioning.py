"""Captioners as predictors, on random models of the real classes."""

import json

import numpy as np
import open_clip
import pytest
import torch
from conftest import PREDICT, read_csv
from PIL import Image
from safetensors.torch import save_file
from tiny_captioners import FAMILIES, words_in
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer, ViTConfig, ViTModel

from img2prompt.commands.predict import predict
from img2prompt.commands.settings import compose
from img2prompt.data.targets import TextEncoder, locate
from img2prompt.predictions import read_predictions
from img2prompt.predictors.coca import Captioner as CoCa
from img2prompt.predictors.huggingface import Captioner

COCA = "coca-tiny"
# The tiny one has few places.
BLIP = ("predictor=blip", "predictor.max_new_tokens=8")


@pytest.fixture(scope="session")
def captioners(tmp_path_factory):
    """A folder for each family."""
    folder = tmp_path_factory.mktemp("captioners")
    return {name: make(folder / name) for name, make in FAMILIES.items()}


@pytest.fixture(scope="session")
def images():
    drawn = torch.Generator().manual_seed(0)
    sizes = [(40, 50), (16, 16), (90, 30)]
    return [torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=drawn) for size in sizes]


@pytest.fixture(scope="session")
def coca(tmp_path_factory):
    """The weights of a tiny CoCa, whose name open_clip knows from now on."""
    folder = tmp_path_factory.mktemp("coca")
    text = {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    config = {
        "embed_dim": 32,
        "vision_cfg": {
            "image_size": 32,
            "layers": 1,
            "width": 32,
            "head_width": 16,
            "patch_size": 8,
            "attentional_pool": True,
            "attn_pooler_heads": 2,
            "output_tokens": True,
        },
        "text_cfg": {**text, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {**text, "attn_pooler_heads": 2},
        "custom_text": True,
    }
    (folder / f"{COCA}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / f"{COCA}.json")
    torch.manual_seed(0)
    model = open_clip.create_model(COCA)
    with torch.no_grad():
        for parameter in model.parameters():
            # Else it would say the same of everything.
            parameter.normal_(std=1.0)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "coca.safetensors")
    return folder / "coca.safetensors"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_caption_is_what_the_library_says_of_the_image_alone(family, captioners, images):
    folder = str(captioners[family])
    for beams, text in ((1, None), (2, None)):
        captioner = Captioner(folder, None, text, 8, beams, "cpu", "fp32")
        together = captioner.say([captioner.fit(image) for image in images])
        assert together == [captioner.say([captioner.fit(image)])[0] for image in images]
        assert beams > 1 or len(set(together)) > 1
        if family != "llava":
            model, words = (
                AutoModelForImageTextToText.from_pretrained(folder).eval(),
                AutoTokenizer.from_pretrained(folder),
            )
            pixels = AutoImageProcessor.from_pretrained(folder)(images=images, return_tensors="pt").pixel_values
            said = model.generate(pixel_values=pixels, max_new_tokens=8, num_beams=beams)
            assert together == words.batch_decode(said, skip_special_tokens=True)


def test_captions_begin_as_they_are_told_and_questions_change_answers(captioners, images):
    for family in ("blip", "git", "vit_gpt2", "blip_2"):
        begun = Captioner(str(captioners[family]), None, "a red", 6, 1, "cpu", "fp32")
        said = begun.say([begun.fit(image) for image in images])
        assert all(caption.replace("[DEC] ", "").startswith("a red") for caption in said), said
    answers = []
    for question in (None, "a cat of sky"):
        asked = Captioner(str(captioners["llava"]), None, question, 8, 1, "cpu", "fp32")
        answers.append(asked.say([asked.fit(image) for image in images]))
    assert answers[0] != answers[1]


def test_half_precision_is_another_precision(captioners, images):
    half = Captioner(str(captioners["blip"]), None, None, 8, 1, "cpu", "bf16")
    assert half.model.dtype == torch.bfloat16 and len(half.say([half.fit(images[0])])) == 1


def test_coca_says_the_likeliest_next_word_each_time(coca, images):
    captioner = CoCa(COCA, 20, "cpu", "fp32")
    captioner.load(str(coca))
    fitted = [captioner.fit(image) for image in images]
    assert all(one.shape == (3, 32, 32) for one in fitted)
    tokens = captioner.tokens(torch.stack(fitted))
    mean, std = (
        torch.tensor(one).view(3, 1, 1) for one in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    )
    with torch.no_grad():
        # All at once, with every word known.
        told = captioner.model((torch.stack(fitted) / 255 - mean) / std, tokens, output_labels=False)["logits"]
    end = 49407
    for row, logits in zip(tokens.tolist(), told, strict=True):
        assert row[0] == 49406
        for place, token in enumerate(row[1:]):
            if place + 1 < 5:
                logits[place, end] = -torch.inf
            assert token == int(logits[place].argmax())
            if token == end:
                break
    said = captioner.say(fitted)
    assert len(set(said)) > 1 and said == [captioner.say([one])[0] for one in fitted]
    assert len(CoCa(COCA, 6, "cpu", "fp32").tokens(torch.stack(fitted))[0]) == 6


def predicted(out, images, *overrides, **more):
    settings = compose("predict", [f"images={images}", f"out={out}", "device=cpu", "batch_size=2", *overrides])
    predict(**settings | more)
    return read_predictions(out)


@pytest.mark.parametrize("ending", ["parquet", "npz", "jsonl"])
def test_the_command_writes_captions_and_their_embeddings(ending, captioners, pictures, tmp_path, capsys):
    (pictures / "broken.png").write_bytes(b"no")
    model = f"predictor.model={captioners['git']}"
    found = predicted(tmp_path / f"p.{ending}", pictures, "predictor=captioner", model)
    assert found.ids == ["a", "b", "c"] and all(found.columns["caption"])
    expected = TextEncoder(locate()).embed(found.columns["caption"])
    assert np.allclose(found.embeddings, expected, atol=1e-5)
    assert "broken.png" in capsys.readouterr().err


def test_blip_and_coca_are_predictors_by_name(captioners, coca, pictures, tmp_path, capsys):
    (tmp_path / "truth.csv").write_text("imgId,prompt\na,a red cat\nb,sky\n")
    both = [
        predicted(tmp_path / "b.parquet", pictures, *BLIP, f"predictor.model={captioners['blip']}"),
        predicted(
            tmp_path / "c.parquet",
            pictures,
            "predictor=coca",
            f"predictor.model={COCA}",
            f"predictor.pretrained={coca}",
            prompts=str(tmp_path / "truth.csv"),
        ),
    ]
    assert both[0].columns["caption"] != both[1].columns["caption"]
    told = capsys.readouterr().out
    assert "mean cosine" in told and "constant mean of the predictions" in told
    assert f"a: {both[0].columns['caption'][0]}" in told


def test_a_submission_has_captions_embeddings_and_their_mean_for_what_cannot_be_read(captioners, pictures, tmp_path):
    (pictures / "broken.png").write_bytes(b"no")
    out = tmp_path / "s.csv"
    settings = compose("predict", [f"images={pictures}", f"out={out}", *BLIP, "device=cpu"])
    settings["predictor"]["model"] = str(captioners["blip"])
    predict(**settings)
    values = np.array([float(row["val"]) for row in read_csv(out)]).reshape(4, 384)
    assert np.allclose(np.linalg.norm(values, axis=1), 1, atol=1e-3)
    mean = values[:3].mean(0)
    assert np.allclose(values[3], mean / np.linalg.norm(mean), atol=1e-4) and not np.allclose(values[0], values[3])


def test_a_job_goes_on_only_with_the_same_captioner(captioners, pictures, tmp_path, capsys, monkeypatch):
    def died(*args):
        raise KeyboardInterrupt

    model = f"predictor.model={captioners['blip']}"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setitem(__import__("img2prompt.predictions").predictions.WRITERS, ".npz", died)
        predicted(tmp_path / "p.npz", pictures, *BLIP, model)
    predicted(tmp_path / "p.npz", pictures, "predictor=blip", model, "predictor.max_new_tokens=2")
    assert "1 parts of another job" in capsys.readouterr().err


def test_what_is_no_captioner_is_told_in_a_sentence(captioners, pictures, tmp_path):
    wordless = tmp_path / "wordless"
    AutoModelForImageTextToText.from_pretrained(captioners["vit_gpt2"]).save_pretrained(wordless)
    AutoImageProcessor.from_pretrained(captioners["vit_gpt2"]).save_pretrained(wordless)
    mute = tmp_path / "mute"
    ViTModel(
        ViTConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    ).save_pretrained(mute)
    words_in(mute)
    for overrides, sentence in (
        (["predictor=captioner", f"predictor.model={wordless}"], "predictor.model=.*wordless: .*[Tt]okenizer"),
        (["predictor=captioner", f"predictor.model={mute}"], "predictor.model=.*mute: a vit says nothing of images"),
        (["predictor=blip", f"predictor.model={tmp_path}/none"], "predictor.model=.*none: no such folder"),
        (["predictor=blip", "predictor.beams=0"], "predictor.beams must be at least 1, got 0"),
        (["predictor=blip", "precision=fp8"], "precision must be one of fp32, bf16, got 'fp8'"),
        (["predictor=coca", "predictor.model=ViT-B-32"], "predictor.model=ViT-B-32: no CoCa of open_clip"),
        (["predictor=coca", "predictor.tag=best"], "predictor.tag=best: coca_ViT-L-14 has the tags"),
        (["predictor=coca", "predictor.pretrained=false"], "predictor.pretrained must be true or a file"),
        (["predictor=coca", "predictor.max_tokens=3"], "predictor.max_tokens must be above 5, got 3"),
    ):
        with pytest.raises(ValueError, match=sentence):
            predicted(tmp_path / "x.parquet", pictures, *overrides)
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    with pytest.raises(ValueError, match="ckpt must be given"):
        predict(None, str(tmp_path / "x.png"), str(tmp_path / "x.npz"), **PREDICT)
