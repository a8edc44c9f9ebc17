"""Answers: every file is answered or named with its reason, and cosines are those of what was predicted."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from img2prompt.app import answers as module
from img2prompt.app.answers import (
    Answers,
    OwnPrompt,
    Upload,
    answers_of,
    ids_of,
    likeness,
    lines_of,
    sound,
    with_composed,
)
from img2prompt.app.cards import cards, note, ranking
from img2prompt.data.images import small_jpeg
from img2prompt.data.metadata import Label
from img2prompt.predictions import Prediction
from img2prompt.predictors.predictor import Predictor

COLOURS = ("red", "green", "blue")
HOSTILE = '<img src=x onerror=alert(1)> ${1+1} {{value}} `x` & "q"'


class Colours(Predictor):
    """Predicts the mean colour of an image, and has columns of every kind."""

    dimension = 3

    def __init__(self, **columns) -> None:
        self.columns = columns

    def prepare(self, image):
        return image.float().mean(dim=(1, 2))

    def predict_batch(self, ids, prepared):
        means = torch.stack(prepared) if prepared else torch.zeros(0, 3)
        columns = {name: [value] * len(ids) for name, value in self.columns.items()}
        return Prediction(ids, torch.nn.functional.normalize(means, dim=1).numpy(), columns)


def encode(texts):
    """Each colour is a direction; a text of none is all of them."""
    found = np.array([[float(colour in text.split()) for colour in COLOURS] for text in texts], dtype=np.float32)
    found[~found.any(axis=1)] = 1
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def picture(folder: Path, name: str, colour: str, parameters: str | None = None) -> Upload:
    info = PngImagePlugin.PngInfo()
    if parameters is not None:
        info.add_text("parameters", parameters)
    path = folder / f"{len(list(folder.iterdir()))}.png"
    Image.new("RGB", (40, 20), colour).save(path, pnginfo=info)
    return Upload(name, path)


def told(*uploads: Upload, predictor: Predictor | None = None) -> Answers:
    return answers_of(uploads, predictor or Colours(), encode, batch_size=2, threads=2)


def test_a_file_that_is_no_image_is_named_and_the_others_are_answered(tmp_path):
    broken = tmp_path / "broken"
    broken.write_bytes(b"no image")
    found = told(
        Upload("text.png", broken),
        picture(tmp_path, "a.png", "red"),
        Upload("gone.png", tmp_path / "gone"),
        picture(tmp_path, "b.png", "blue"),
    )
    assert found.prediction.ids == ["a", "b"] and found.prediction.columns["path"] == ["a.png", "b.png"]
    assert [name for name, _ in found.prediction.skipped] == ["text.png", "gone.png"]
    assert "not an image of a known format" in found.prediction.skipped[0][1]
    shown = cards(found)
    assert "text.png" in shown and "not an image of a known format" in shown and shown.count("<article") == 2


def test_of_files_that_are_all_broken_each_is_named(tmp_path):
    broken = tmp_path / "broken"
    broken.write_bytes(b"no image")
    found = told(*[Upload(f"{number}.png", broken) for number in range(3)])
    assert len(found.prediction) == 0 and found.thumbnails == [] and len(found.prediction.skipped) == 3
    assert "<article" not in cards(found)


def test_the_prompt_in_the_metadata_is_scored_against_the_prediction_as_training_would_read_it(tmp_path):
    settings = "Negative prompt: green\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 40x20"
    right = picture(tmp_path, "right.png", "red", f"((red)) <lora:green:1>\n{settings}")
    wrong = picture(tmp_path, "wrong.png", "red", f"blue\n{settings}")
    found = told(right, picture(tmp_path, "none.png", "red"), wrong).own_prompts
    assert found[0].label == Label("((red)) <lora:green:1>", "green", "A1111")
    assert found[0].cosine == pytest.approx(1.0)
    assert found[1] == OwnPrompt() and found[2].cosine == pytest.approx(0.0)


def test_metadata_that_cannot_be_trusted_are_said_to_be_so(tmp_path):
    found = told(picture(tmp_path, "a.png", "red", "no settings"))
    assert found.own_prompts[0].label is None and "it may be no prompt" in found.own_prompts[0].reason
    assert "not to be trusted" in cards(found)


def test_texts_are_ranked_by_their_cosine_with_each_image(tmp_path):
    found = told(*[picture(tmp_path, f"{colour}.png", colour) for colour in COLOURS])
    texts = lines_of("blue\n\n  red \nblue\n")
    values = likeness(texts, found, encode)
    assert texts == ["blue", "red"] and values.argmax(axis=1).tolist() == [2, 0]
    shown = ranking(texts, values, found)
    blue, red, of_images = shown.split("</section>")[:3]
    assert blue.index("blue.png") < min(blue.index("red.png"), blue.index("green.png"))
    assert red.index("red.png") < red.index("blue.png") and "The nearest text to each image" in of_images
    assert "The nearest text" not in ranking(["red"], values[1:], found)


def test_names_of_any_kind_have_an_id_each():
    assert ids_of(["a.png", "a.jpg", "a.png", "a.png", "", ".png", "b (2).png"]) == [
        *("a", "a.jpg", "a.png", "a.png (2)", "", ".png", "b (2)")
    ]
    names = ["a.png"] * 5 + ["a.png (2)"] * 2
    assert len(set(ids_of(names))) == len(names)


def test_halves_of_characters_become_text_that_can_be_written(tmp_path):
    found = told(picture(tmp_path, "a\ud800.png", "red"))
    assert sound("a\ud800é") == "a\\ud800é" and found.prediction.ids == ["a\\ud800"]
    cards(found).encode()
    assert lines_of("\udfff") == ["\\udfff"]


def test_more_than_the_page_takes_is_refused_with_the_number(tmp_path, monkeypatch):
    upload = picture(tmp_path, "a.png", "red")
    monkeypatch.setattr(module, "MOST_IMAGES", 2)
    monkeypatch.setattr(module, "MOST_TEXTS", 2)
    assert len(told(upload, upload).prediction) == 2 and lines_of("a\nb") == ["a", "b"]
    with pytest.raises(ValueError, match="3 images are more than the page takes at once, 2"):
        told(upload, upload, upload)
    with pytest.raises(ValueError, match="3 texts are more"):
        lines_of("a\nb\nc")
    with pytest.raises(ValueError, match="no image"):
        told()


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 2), (300, 200)])
def test_a_thumbnail_is_small_whatever_the_shape(size):
    image = torch.full((3, size[1], size[0]), 200, dtype=torch.uint8)
    with Image.open(io.BytesIO(small_jpeg(image, module.THUMBNAIL_PX))) as small:
        assert max(small.size) <= module.THUMBNAIL_PX and abs(small.getpixel((0, 0))[0] - 200) < 4


def test_whatever_comes_with_an_image_is_shown_as_text(tmp_path):
    settings = "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 40x20"
    columns = {
        "caption": HOSTILE,
        "nearest_prompts": [HOSTILE],
        "nearest_cosines": [0.5],
        "composed_prompt": HOSTILE,
        "composed_cosine": 0.5,
        "words": [HOSTILE],
        "word_probabilities": [0.5],
    }
    hostile = picture(tmp_path, f"{HOSTILE}.png", "red", f"{HOSTILE}\nNegative prompt: {HOSTILE}\n{settings}")
    broken = Upload(HOSTILE, tmp_path / "gone")
    found = told(hostile, broken, predictor=Colours(**columns))
    shown = cards(found) + ranking([HOSTILE, "x"], likeness([HOSTILE, "x"], found, encode), found) + note(HOSTILE)
    assert shown.count("onerror") >= 10
    # Nothing of it is a tag, an attribute's end, or a place of a template.
    assert "<img src=x" not in shown and "${" not in shown and "{{" not in shown and "`" not in shown


def test_composed_prompts_come_little_by_little_and_each_to_its_image(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_COMPOSED_AT_ONCE", 2)
    found = told(*[picture(tmp_path, f"{number}.png", "red") for number in range(5)])

    def compose(part):
        part.columns |= {"composed_prompt": [f"of {one}" for one in part.ids], "composed_cosine": [0.5] * len(part)}

    shown = [cards(one).count("Composed prompt") for one in with_composed(found, compose)]
    assert shown == [2, 4, 5]
    assert found.prediction.columns["composed_prompt"] == [f"of {one}" for one in found.prediction.ids]


def test_columns_that_the_page_does_not_know_are_shown_by_their_name(tmp_path):
    found = told(picture(tmp_path, "a.png", "red"), predictor=Colours(confidence=0.8125, remark="blurred"))
    shown = cards(found)
    assert "confidence 0.812" in shown and "Remark" in shown and "blurred" in shown and "a.png" in shown
