"""Evaluation: scores against formulas written out, predictors side by side, and what it writes."""

import csv
import json

import numpy as np
import pytest
import torch
from conftest import PREDICT, read_csv
from torch.nn.functional import cosine_similarity, normalize

from img2prompt.bank import read_bank
from img2prompt.cache import cache_folder
from img2prompt.commands import evaluate as command
from img2prompt.commands.evaluate import evaluate
from img2prompt.commands.predict import predict
from img2prompt.commands.settings import compose
from img2prompt.data.corruptions import CORRUPTIONS, corrupted
from img2prompt.data.kaggle import read_prompts
from img2prompt.data.targets import embeddings_of, locate
from img2prompt.evaluation import by_label, floors, length_of, nearest_other, recall, score
from img2prompt.predictions import WRITERS, Prediction


def rows(count, width=12, seed=0):
    return normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_recall_counts_the_own_prompt_among_the_distinct_ones():
    numbers = np.array([0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10])
    distinct, noise = rows(11), rows(12, seed=1)
    targets = distinct[numbers]
    said = normalize(targets + 0.9 * noise, dim=1)
    found = recall(said, targets, numbers)
    cosines = (said @ distinct.T).numpy()
    for k in (1, 5, 10):
        own = [numbers[i] in np.argsort(-cosines[i])[:k] for i in range(12)]
        assert found[f"image to text R@{k}"] == pytest.approx(np.mean(own))
        backwards = [any(numbers[i] == p for i in np.argsort(-cosines[:, p])[:k]) for p in range(11)]
        assert found[f"text to image R@{k}"] == pytest.approx(np.mean(backwards))
    assert 0 < found["image to text R@1"] < found["image to text R@10"]
    # Who says the same of all has not found any of them.
    assert recall(said[:1].expand(12, -1), targets, numbers)["text to image R@1"] <= 1 / 11
    assert recall(torch.ones(3, 4), torch.ones(3, 4), np.arange(3))["image to text R@1"] == 0


def test_floors_are_the_best_constant_and_any_other_prompt():
    numbers = np.array([0, 0, 1, 2])
    distinct = rows(3)
    targets = distinct[numbers]
    found = floors(targets, numbers)
    assert torch.allclose(found["best constant"], cosine_similarity(targets.mean(0, keepdim=True), targets), atol=1e-6)
    assert found["another prompt"][3] == pytest.approx(float((distinct[2] @ distinct[:2].T).mean()), abs=1e-5)
    assert floors(targets[:2], numbers[:2])["another prompt"].isnan().all()


def test_the_nearest_other_prompt_is_never_the_own_one():
    numbers = np.array([0, 0, 1, 2, 3])
    distinct = rows(4)
    targets = distinct[numbers]
    found = nearest_other(targets + 0.01 * rows(5, seed=3), targets, numbers)
    for row, number in enumerate(numbers):
        others = [one for one in range(4) if one != number]
        best = max(others, key=lambda one: float(distinct[one] @ targets[row]))
        assert torch.equal(found[row], distinct[best])
    assert nearest_other(targets[:2], targets[:2], numbers[:2]).isnan().all()


def test_scores_of_labels_are_those_of_their_images_and_lengths_are_counted_in_words():
    values, groups = torch.tensor([0.1, 0.2, 0.6, 0.8]), np.array([5, 5, 7, 9])
    found = by_label(values, ["a", "b", "a", "b"], groups)
    assert list(found) == ["a", "b"] and found["a"].mean == pytest.approx(0.35) and found["b"].images == 2
    assert score(values, groups).low <= score(values, groups).mean <= score(values, groups).high
    lengths = [length_of(" ".join(["word"] * count)) for count in (1, 5, 6, 40, 41)]
    assert lengths == ["1 to 5 words", "1 to 5 words", "6 to 10 words", "21 to 40 words", "more than 40 words"]


@pytest.fixture
def saved(pairs_folder, tmp_path):
    """Predictions of all images, nearly true, without a run."""
    known = dict(read_prompts(pairs_folder / "prompts.csv"))
    ids = sorted(known)
    targets = torch.from_numpy(embeddings_of([known[one] for one in ids], locate(), "fp32", "cpu", cache_folder(None)))
    said = normalize(targets + 0.5 * rows(len(ids), 384), dim=1)
    path = tmp_path / "saved.npz"
    WRITERS[".npz"](path, [Prediction(ids, said.numpy(), {"path": ids})])
    return path, ids, targets, said


def evaluated(pairs_folder, out, predictors, *overrides):
    listed = f"predictors={predictors}"
    settings = compose("evaluate", [listed, "data=kaggle", "device=cpu", "batch_size=8", f"out={out}", *overrides])
    settings["data"]["root"] = settings["data"]["source"]["root"] = str(pairs_folder)
    evaluate(**settings)
    return json.loads((out / "evaluation.json").read_text())


def test_predictors_stand_beside_floors_and_each_other(finished_run, pairs_folder, saved, tmp_path, capsys):
    path, ids, targets, said = saved
    report = evaluated(pairs_folder, tmp_path / "e", f"[{finished_run},{path}]")
    run, other = report["predictors"]
    assert report["images"] == 40 and run["predictor"] == str(finished_run)
    expected = cosine_similarity(said, targets)
    assert other["mean"] == pytest.approx(float(expected.mean()), abs=1e-5)
    # The same as the command that predicts says of itself.
    prompts = str(pairs_folder / "prompts.csv")
    capsys.readouterr()
    predict(str(finished_run), str(pairs_folder / "images"), str(tmp_path / "p.npz"), **PREDICT | {"prompts": prompts})
    assert (
        f"mean cosine {run['mean']:.4f} (95 % interval {run['low']:.4f} to {run['high']:.4f})"
        in capsys.readouterr().out
    )
    difference = other["against_the_first"]
    assert difference["mean"] == pytest.approx(other["mean"] - run["mean"], abs=1e-6)
    assert difference["low"] <= difference["mean"] <= difference["high"] and "against_the_first" not in run
    assert run["seconds_per_image"] > 0 and run["peak_memory_gib"] > 0.1 and other["seconds_per_image"] is None
    floor_names = set(report["floors"])
    assert {"best constant", "another prompt", f"{finished_run}: its constant mean"} <= floor_names
    assert f"{finished_run}: the nearest prompt of its bank" in floor_names
    assert report["floors"]["best constant"]["mean"] > report["floors"]["another prompt"]["mean"]
    assert other["best"][0]["cosine"] == pytest.approx(float(expected.max()), abs=1e-5)
    assert other["worst"][0]["id"] == ids[int(expected.argmin())]
    assert sum(one["images"] for one in run["by_length"].values()) == 40
    markdown = (tmp_path / "e" / "evaluation.md").read_text()
    assert f"| {finished_run} | {run['mean']:.4f} |" in markdown and "| *best constant* |" in markdown


def test_the_retrieval_floor_is_of_the_bank_that_is_named(pairs_folder, saved, tmp_path):
    path, ids, targets, said = saved
    known = dict(read_prompts(pairs_folder / "prompts.csv"))
    evaluated(pairs_folder, tmp_path / "a", f"[{path}]")
    bank = tmp_path / "bank.txt"
    bank.write_text("\n".join(dict.fromkeys(known.values())) + "\n")
    evaluated(pairs_folder, tmp_path / "b", f"[{path}]", f"bank={bank}")
    others, own = (json.loads((tmp_path / name / "evaluation.json").read_text())["floors"] for name in "ab")
    # In this bank are the very prompts, and predictions that are nearly true find them.
    assert own[f"{path}: the nearest prompt of the bank"]["mean"] == pytest.approx(1.0, abs=1e-4)
    assert others[f"{path}: the nearest prompt of the other images"]["mean"] < 0.99
    with pytest.raises(ValueError, match="bank"):
        evaluated(pairs_folder, tmp_path / "c", f"[{path}]", f"bank={tmp_path / 'none.txt'}")


def test_what_a_run_has_seen_is_told(finished_run, pairs_folder, tmp_path, capsys):
    report = evaluated(pairs_folder, tmp_path / "e", f"[{finished_run}]")
    prompts = read_bank(finished_run / "bank.parquet").prompts
    seen = sum(prompt in prompts for _, prompt in read_prompts(pairs_folder / "prompts.csv"))
    assert 0 < seen < 40 and report["predictors"][0]["prompts_of_its_bank"] == seen
    assert f"{seen} of 40 images have a prompt of its bank: its score is too good" in capsys.readouterr().err


def test_each_image_has_its_cosines_and_small_sets_their_matrix(pairs_folder, saved, tmp_path):
    path, ids, targets, said = saved
    evaluated(pairs_folder, tmp_path / "e", f"[{{predictor: {path}, as: mine}}]")
    with (tmp_path / "e" / "evaluation.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["id"] for row in table] == ids
    cosines = (said @ targets.T).numpy()
    for row, own in enumerate(table):
        assert float(own["cosine mine"]) == pytest.approx(cosines[row, row], abs=1e-5)
        assert cosines[row, ids.index(own["closest mine"])] == pytest.approx(cosines[row].max(), abs=1e-5)
    with (tmp_path / "e" / "similarity.csv").open(newline="") as file:
        matrix = list(csv.DictReader(file))
    assert len(matrix) == 40 and float(matrix[3][f"to {ids[7]}"]) == pytest.approx(cosines[3, 7], abs=1e-4)


def test_images_that_one_predictor_lacks_are_compared_by_none(finished_run, pairs_folder, saved, tmp_path, capsys):
    path, ids, _, said = saved
    WRITERS[".npz"](path, [Prediction(ids[5:], said[5:].numpy(), {"path": ids[5:]})])
    report = evaluated(pairs_folder, tmp_path / "e", f"[{finished_run},{path}]")
    assert report["images"] == 35 and report["predictors"][0]["images"] == 35
    assert "5 of 40 images are left out: not all could predict them" in capsys.readouterr().err
    left_out = read_csv(tmp_path / "e" / "skipped.csv")
    assert [row["image"] for row in left_out] == ids[:5] and {row["predictor"] for row in left_out} == {str(path)}
    assert ids[0] in (tmp_path / "e" / "report.html").read_text()
    evaluated(pairs_folder, tmp_path / "e", f"[{finished_run}]", "data.count=5")
    assert not (tmp_path / "e" / "skipped.csv").exists()


def test_views_and_names_are_of_their_predictor(finished_run, pairs_folder, tmp_path):
    tuned = finished_run / "checkpoints" / "finetune.safetensors"
    listed = f"[{{predictor: {tuned}, as: plain}},{{predictor: {tuned}, as: seen, views: [crops]}}]"
    report = evaluated(pairs_folder, tmp_path / "e", listed, "data.count=10")
    assert [one["predictor"] for one in report["predictors"]] == ["plain", "seen"] and report["images"] == 10
    assert report["predictors"][0]["mean"] != report["predictors"][1]["mean"]


def test_a_captioner_is_evaluated_by_its_keys(pairs_folder, tmp_path):
    from predictors.tiny_captioners import git

    listed = f"[{{predictor: captioner, model: {git(tmp_path / 'git')}, max_new_tokens: 4, as: git}}]"
    report = evaluated(pairs_folder, tmp_path / "e", listed, "data.count=4")
    assert report["predictors"][0]["predictor"] == "git" and report["predictors"][0]["images"] == 4


def test_what_cannot_be_evaluated_is_told_in_a_sentence(finished_run, pairs_folder, saved, tmp_path):
    path, ids, _, said = saved
    foreign = tmp_path / "foreign.npz"
    WRITERS[".npz"](foreign, [Prediction(["x"], said[:1].numpy(), {"path": ["x"]})])
    narrow = tmp_path / "narrow.npz"
    WRITERS[".npz"](narrow, [Prediction(ids, rows(40, 8).numpy(), {"path": ids})])
    for listed, sentence in (
        ("[]", "predictors=.*: must be a .list. of runs"),
        (f"[{{predictor: {finished_run}, view: [flip]}}]", "view is no key of .*finished; did you mean views?"),
        ("[blib]", "blib is no run, no checkpoint, no saved predictions and no predictor; did you mean blip"),
        ("[nowhere.safetensors]", "nowhere.safetensors: no such checkpoint"),
        ("[nowhere.npz]", "nowhere.npz: no such file"),
        (f"[{foreign}]", "foreign.npz: none of its ids .first: x. is an image of the data .first: "),
        (f"[{narrow}]", "predicts 8 numbers, .*MiniLM.* has 384; give the text encoder"),
        (f"[{path},{path}]", "predictors: two are called .*saved.npz; give one of them another name"),
        ("[{predictor: retrieval, bnak: x}]", "predictors: bnak is no key of retrieval; did you mean bank"),
        ("[{predictor: retrieval}]", "predictor.bank must be given"),
        ("[{predictor: retrieval, bank: typo.txt}]", "predictors: retrieval: bank=typo.txt: no such file"),
        ("[captioner]", "predictors: captioner needs model: {predictor: captioner, model: …}"),
        ("[{predictor: captioner, model: 3}]", "predictors: captioner.model=3: must be text"),
        ("[{predictor: retrivel, bank: x}]", "predictors: no predictor retrivel; did you mean retrieval"),
        ("[{as: x}]", "predictors: expected a path, a name or"),
        ("[sdipc_ft]", "sdipc_ft is no run"),
        (f"[{{predictor: {path}, views: [flip]}}]", "is saved, and has no views of images"),
        ("[{predictor: retrieval, bank: x, views: [flop]}]", "views=.*: flop is none"),
    ):
        with pytest.raises(ValueError, match=sentence):
            evaluated(pairs_folder, tmp_path / "e", listed)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="out=.*file: a file; give a folder"):
        evaluated(pairs_folder, tmp_path / "file", f"[{path}]")
    with pytest.raises(ValueError, match="data.root must be given"):
        evaluate(**compose("evaluate", [f"predictors=[{path}]"]))
    assert not (tmp_path / "e").exists()


def test_evaluate_takes_either_kind_by_its_keys(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "img2prompt.commands.evaluate_variations.evaluate_variations", lambda **given: asked.append(given["variations"])
    )
    command.main(["variations=x"])
    assert asked == ["x"]


def test_the_robustness_card_says_how_the_score_changes(finished_run, pairs_folder, saved, tmp_path, capsys):
    tuned = finished_run / "checkpoints" / "finetune.safetensors"
    listed = f"[{{predictor: {tuned}, as: run}},{{predictor: {saved[0]}, as: saved}}]"
    report = evaluated(pairs_folder, tmp_path / "e", listed, "robustness=true", "data.count=8")
    run, other = report["predictors"]
    assert list(run["robustness"]) == list(CORRUPTIONS) and other["robustness"] == {}
    for one in run["robustness"].values():
        assert one["change"]["mean"] == pytest.approx(one["mean"] - run["mean"], abs=1e-6)
        assert one["change"]["low"] <= one["change"]["mean"] <= one["change"]["high"]
    assert run["robustness"]["grey"]["change"]["mean"] != 0
    assert "| robustness | run |" in capsys.readouterr().out


def test_corruptions_are_what_they_are_called():
    image = torch.randint(0, 256, (3, 40, 60), dtype=torch.uint8, generator=torch.manual_seed(0))
    found = {name: corrupted(image, name) for name in CORRUPTIONS}
    assert found["half size"].shape == (3, 20, 30) and found["middle"].shape == (3, 30, 45)
    assert torch.equal(found["middle"], image[:, 5:35, 7:52]) and torch.equal(found["flip"], image.flip(-1))
    grey = found["grey"]
    assert torch.equal(grey[0], grey[1]) and torch.equal(grey[1], grey[2])
    errors = [float((found[f"jpeg {quality}"].float() - image.float()).abs().mean()) for quality in (95, 75, 50)]
    assert 0 < errors[0] < errors[1] < errors[2]
    assert found["blur"].float().var() < image.float().var()
    assert 0 < int((found["watermark"] != image).any(0).sum()) < 40 * 60
    for name in CORRUPTIONS:
        assert corrupted(image[:, :1, :1], name).dtype == torch.uint8


def test_robustness_of_saved_predictions_is_refused_and_beside_others_told(
    finished_run, pairs_folder, saved, tmp_path, capsys
):
    path, *_ = saved
    with pytest.raises(ValueError, match="robustness=true: saved predictions cannot be made again"):
        evaluated(pairs_folder, tmp_path / "e", f"[{path}]", "robustness=true")
    evaluated(pairs_folder, tmp_path / "e", f"[{finished_run},{path}]", "robustness=true", "data.count=4")
    assert "robustness: not of" in capsys.readouterr().err
