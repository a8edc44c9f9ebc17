"""Zero-shot classification by the names of classes."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import read_csv
from torch.nn.functional import normalize

from img2prompt.cache import cache_folder
from img2prompt.classification import class_embeddings, mean_per_class, ranked, texts_of
from img2prompt.commands.evaluate_classes import evaluate_classes
from img2prompt.commands.settings import chosen_config, compose
from img2prompt.data.targets import embeddings_of, locate
from img2prompt.predictions import WRITERS, Prediction, read_predictions


def rows(count, width=12, seed=0):
    return normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_an_image_is_of_the_class_whose_texts_are_nearest():
    texts, said, own = rows(10), rows(30, seed=1), torch.arange(30) % 5
    classes = class_embeddings(texts, 2)
    pairs = texts.numpy().reshape(5, 2, 12).mean(1)
    expected = said.numpy() @ (pairs / np.linalg.norm(pairs, axis=1, keepdims=True)).T
    guess, others = ranked(said, classes, own)
    assert guess.tolist() == expected.argmax(1).tolist()
    order = np.argsort(-expected, axis=1)
    assert others.tolist() == [int(np.where(order[row] == own[row].item())[0][0]) for row in range(30)]
    assert texts_of(["a cat", "{}"], ["{}", "a {} of {}"]) == ["a cat", "a a cat of a cat", "{}", "a {} of {}"]


def test_who_says_the_same_of_all_tells_no_class_apart():
    classes = rows(1).expand(4, -1)
    guess, others = ranked(rows(8, seed=2), classes, torch.arange(8) % 4)
    assert others.tolist() == [3] * 8 and not (guess == torch.arange(8) % 4).any()
    shares = mean_per_class(torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0, 0, 2]), 4)
    assert shares[:3].tolist()[0] == 0.5 and shares[2] == 1.0 and shares[[1, 3]].isnan().all()


@pytest.fixture
def zoo(tmp_path, pairs_folder):
    """Three classes of four drawings, a stray one, and predictions of which one is of another class."""
    pictures = iter(sorted((pairs_folder / "images").iterdir()))
    folder, ids, names = tmp_path / "zoo", [], []
    for name in ("polar_bear", "fire-engine", "tea cup"):
        (folder / name / "deep").mkdir(parents=True)
        for number in range(4):
            place = folder / name / ("deep" if number == 3 else "") / f"{name[:2]}{number}.png"
            shutil.copy(next(pictures), place)
            ids.append(place.stem)
            names.append(name.replace("_", " ").replace("-", " "))
    shutil.copy(next(pictures), folder / "stray.png")
    said = torch.from_numpy(
        embeddings_of([f"a photo of a {name}" for name in names], locate(), "fp32", "cpu", cache_folder(None))
    )
    said = normalize(said + 0.3 * rows(12, 384), dim=1)
    said[0] = said[11]
    WRITERS[".npz"](tmp_path / "said.npz", [Prediction(ids, said.numpy(), {})])
    return folder, tmp_path / "said.npz"


def settings(folder, out, *overrides):
    given = [f"classes={folder}", f"out={out}", "device=cpu", "batch_size=4", *overrides]
    return compose(chosen_config("evaluate", given), given)


def test_a_folder_of_classes_is_classified_by_its_names(zoo, finished_run, tmp_path, capsys):
    folder, said = zoo
    evaluate_classes(**settings(folder, tmp_path / "e", f"predictors=[{said},{{predictor: {finished_run}, as: run}}]"))
    captured = capsys.readouterr()
    assert "stray.png: in no folder of a class" in captured.err
    assert read_csv(tmp_path / "e" / "classification.skipped.csv")[0]["reason"] == "in no folder of a class"
    assert "12 images of 3 classes" in captured.out and "*the most frequent class* | 0.3333" in captured.out
    found = json.loads((tmp_path / "e" / "classification.json").read_text())
    first, second = found["predictors"]
    assert first["top 1"]["mean"] == pytest.approx(11 / 12) and "top 5" not in first
    assert first["per class"] == pytest.approx({"polar_bear": 0.75, "fire-engine": 1.0, "tea cup": 1.0})
    assert first["mean per class"] == pytest.approx(11 / 12)
    assert second["against_the_first"]["mean"] == pytest.approx(second["top 1"]["mean"] - 11 / 12, abs=1e-6)
    table = {row["id"]: row for row in read_csv(tmp_path / "e" / "classification.csv")}
    assert table["po0"][f"guess {said}"] == "tea cup" and table["po0"]["class"] == "polar_bear"
    assert (tmp_path / "e" / "classification.md").read_text().startswith("12 images of 3 classes")


def test_templates_change_what_a_class_is(zoo, tmp_path):
    folder, said = zoo
    ids = read_predictions(said).ids
    WRITERS[".npz"](said, [Prediction(ids, rows(12, 384, seed=3).numpy(), {})])
    evaluate_classes(**settings(folder, tmp_path / "a", f"predictors=[{said}]"))
    other = "templates=['{} {} fire engine, a red fire engine with a ladder','a blurry fire engine and a {}']"
    evaluate_classes(**settings(folder, tmp_path / "b", f"predictors=[{said}]", other))
    one, two = (read_csv(tmp_path / name / "classification.csv") for name in "ab")
    assert one != two and [row["class"] for row in one] == [row["class"] for row in two]


@pytest.mark.parametrize(
    "override, sentence",
    [
        ("templates=['a photo']", "each must be a text with {}"),
        ("templates=[]", "each must be a text with {}"),
        ("classes=nowhere", "no such folder"),
        ("predictors=[nothing]", "no run, no checkpoint"),
        ("batch_size=0", "at least 1"),
    ],
)
def test_bad_input_is_told_in_a_sentence(zoo, tmp_path, override, sentence):
    folder, said = zoo
    with pytest.raises(ValueError, match=sentence):
        evaluate_classes(**settings(folder, tmp_path / "e", f"predictors=[{said}]", override))
    assert not (tmp_path / "e").exists()


def test_classes_of_one_name_or_of_one_folder_are_refused(zoo, tmp_path):
    folder, said = zoo
    shutil.copytree(folder / "polar_bear", folder / "polar bear")
    with pytest.raises(ValueError, match="polar bear and polar_bear are embedded equally"):
        evaluate_classes(**settings(folder, tmp_path / "e", f"predictors=[{said}]"))
    # To the text encoder capitals are nothing.
    (folder / "polar bear").rename(folder / "Polar_Bear")
    with pytest.raises(ValueError, match="Polar_Bear and polar_bear are embedded equally"):
        evaluate_classes(**settings(folder, tmp_path / "e", f"predictors=[{said}]"))
    shutil.rmtree(folder / "Polar_Bear")
    (folder / "animal").symlink_to(folder / "polar_bear")
    with pytest.raises(ValueError, match="animal and polar_bear are the same folder"):
        evaluate_classes(**settings(folder, tmp_path / "e", f"predictors=[{said}]"))
    with pytest.raises(ValueError, match="at least two; found 1"):
        evaluate_classes(**settings(folder / "tea cup", tmp_path / "e", f"predictors=[{said}]"))


def test_a_class_without_images_can_be_chosen(zoo, tmp_path, capsys):
    folder, said = zoo
    (folder / "boat").mkdir()
    evaluate_classes(**settings(folder, tmp_path / "e", f"predictors=[{said}]"))
    captured = capsys.readouterr()
    assert "1 classes have no image (first: boat)" in captured.err and "12 images of 4 classes" in captured.out
    assert json.loads((tmp_path / "e" / "classification.json").read_text())["floors"]["chance"] == 0.25
