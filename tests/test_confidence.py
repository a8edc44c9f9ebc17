"""Confidence: calibrated where the truth is known, learnt by runs, and used by predict, fit and evaluate."""

import json

import numpy as np
import pytest
from conftest import PREDICT, read_csv

from img2prompt.commands import fit
from img2prompt.commands.arguments import quoted_paths
from img2prompt.commands.aside import Chosen
from img2prompt.commands.calibrate import calibrate
from img2prompt.commands.evaluate import evaluate
from img2prompt.commands.predict import predict
from img2prompt.commands.settings import chosen_config, compose
from img2prompt.files import read_table
from img2prompt.predictions import WRITERS, Prediction, read_predictions, taken
from img2prompt.refine.confidence import calibrated, read_confidence, reliability

USED = {**PREDICT, "top_k": 5}


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def known(count, seed=0, width=24):
    """Predictions with noise of known strength, which their norm tells; targets, groups of two, and the true cosines'
    expectation, which is 1 / sqrt(1 + strength²) in many dimensions.
    """
    drawn = np.random.default_rng(seed)
    targets = unit(drawn.normal(size=(count, width)))
    strength = drawn.uniform(0.1, 3.0, count)
    said = unit(targets + strength[:, None] * unit(drawn.normal(size=(count, width))))
    columns = {"norm": (1 / strength).tolist(), "nearest_cosines": drawn.uniform(0, 1, (count, 5)).tolist()}
    ids = [f"i{number}" for number in range(count)]
    return (
        Prediction(ids, said.astype(np.float32), columns),
        targets,
        np.arange(count) // 2,
        1 / np.sqrt(1 + strength**2),
    )


def test_expected_cosines_are_the_true_ones_on_data_where_these_are_known():
    prediction, targets, groups, _ = known(3000)
    found = calibrated(prediction, targets, groups)
    other, other_targets, _, expected = known(3000, seed=1)
    said = found(other)
    told = reliability(said, (other.embeddings * other_targets).sum(1))
    assert told.calibration_error < 0.02 and told.spearman > 0.8
    assert np.abs(said - expected).mean() < 0.03
    # What it says of itself, of prompts that it was not fitted to, is what others find.
    assert found.checked.calibration_error < 0.02 and abs(found.checked.spearman - told.spearman) < 0.05
    assert found.features == ["nearest", "margin", "norm", "typical"]
    assert sum(one["images"] for one in found.checked.bins) == 3000
    sure = said > 0.8
    assert (other.embeddings * other_targets).sum(1)[sure].mean() == pytest.approx(said[sure].mean(), abs=0.02)


def test_where_nothing_tells_all_are_expected_to_be_average():
    prediction, targets, groups, _ = known(2000)
    drawn = np.random.default_rng(5)
    blind = Prediction(prediction.ids, prediction.embeddings, {"norm": drawn.uniform(0, 1, 2000).tolist()})
    found = calibrated(blind, targets, groups)
    cosines = (prediction.embeddings * targets).sum(1)
    assert abs(found.checked.spearman) < 0.1
    assert found(blind).std() < 0.1 * cosines.std()
    constant = Prediction(prediction.ids, np.tile(unit(targets.mean(0)[None]), (2000, 1)).astype(np.float32), {})
    same = calibrated(constant, targets, groups)
    assert np.ptp(same(constant)) == 0 and same.checked.spearman is None
    assert same(constant)[0] == pytest.approx(float((constant.embeddings * targets).sum(1).mean()), abs=1e-6)


def test_the_check_sees_no_prompt_on_both_sides():
    # The cosine is a matter of the prompt, and each prompt has a norm of its own: known prompts look predictable.
    drawn = np.random.default_rng(0)
    groups = np.repeat(np.arange(8), 50)
    targets = unit(drawn.normal(size=(8, 16)))[groups]
    strength = drawn.permutation(np.linspace(0.1, 4.0, 8))[groups]
    said = unit(targets + strength[:, None] * unit(drawn.normal(size=(400, 16))))
    norms = (drawn.permutation(8)[groups] + drawn.uniform(0, 0.1, 400)).tolist()
    prediction = Prediction([str(number) for number in range(400)], said.astype(np.float32), {"norm": norms})
    honest = calibrated(prediction, targets, groups).checked
    leaking = calibrated(prediction, targets, np.arange(400)).checked
    assert honest.calibration_error > 2 * leaking.calibration_error


def test_a_handful_of_images_makes_no_claims():
    # A fold of so few is told the mean of the others, which is no rank.
    for count in (20, 22, 24):
        ranks = [calibrated(*known(count, seed)[:3]).checked.spearman for seed in range(20)]
        assert all(one is None or one > 0 for one in ranks)
    drawn = np.random.default_rng(0)
    perfect = reliability(np.full(15, 0.5), drawn.normal(0.5, 0.1, 15))
    assert perfect.calibration_error is None and perfect.spearman is None and len(perfect.bins) == 1
    assert len(reliability(drawn.uniform(0, 1, 45), drawn.uniform(0, 1, 45)).bins) == 4


def test_what_was_learnt_is_read_again_as_it_was(tmp_path):
    prediction, targets, groups, _ = known(200)
    found = calibrated(prediction, targets, groups, {"rung": "probe"})
    found.save(tmp_path / "c.json")
    again = read_confidence(tmp_path / "c.json")
    assert again == found and np.array_equal(again(prediction), found(prediction))
    whole = json.loads((tmp_path / "c.json").read_text())
    for change in (
        {"weights": [1.0]},
        {"weights": [float("nan")] * 4},
        {"knots": [[1.0, 0.5], [0.0, 0.6]]},
        {"knots": []},
        {"features": ["nearest", "margin", "norm", "height"]},
        {"checked": 3},
        {"more": 1},
        {"mean": []},
    ):
        (tmp_path / "d.json").write_text(json.dumps(whole | change))
        with pytest.raises(ValueError, match="d.json: no confidence that img2prompt fit wrote"):
            read_confidence(tmp_path / "d.json")
    with pytest.raises(ValueError, match="refiner=confidence writes"):
        read_confidence(tmp_path / "none.json")


def test_predictions_of_another_kind_are_refused():
    prediction, targets, groups, _ = known(200)
    found = calibrated(prediction, targets, groups)
    for columns, sentence in (
        ({**prediction.columns, "agreement": [0.5] * 200}, "means of some"),
        ({"norm": prediction.columns["norm"]}, "5 nearest prompts"),
        ({**prediction.columns, "nearest_cosines": [[0.5, 0.4]] * 200}, "5 nearest prompts"),
        ({"nearest_cosines": prediction.columns["nearest_cosines"]}, "a norm"),
    ):
        with pytest.raises(ValueError, match=sentence):
            found(Prediction(prediction.ids, prediction.embeddings, columns))
    with pytest.raises(ValueError, match="24 numbers, these have 12"):
        found(Prediction(prediction.ids, prediction.embeddings[:, :12], prediction.columns))
    with pytest.raises(ValueError, match="too few"):
        calibrated(taken(prediction, range(19)), targets[:19], groups[:19])
    with pytest.raises(ValueError, match="of 1 prompts"):
        calibrated(prediction, targets, np.zeros(200, dtype=np.int64))


@pytest.fixture(scope="module")
def sure_run(tmp_path_factory, train_here):
    """A run with enough validation images to learn confidence from."""
    folder = tmp_path_factory.mktemp("sure") / "run"
    train_here(folder, "data.val=0.6", "trainer.max_epochs=1")
    return folder


def test_a_run_learns_how_sure_its_best_checkpoint_is(sure_run, pairs_folder, tmp_path, capsys):
    found = read_confidence(sure_run / "confidence.json")
    best = read_table(sure_run / "ladder.csv")
    assert found.of["rung"] in {row["rung"] for row in best} and found.images >= 20
    out = tmp_path / "p.parquet"
    predict(str(sure_run), str(pairs_folder / "images"), str(out), **USED)
    said = read_predictions(out)
    assert said.columns["confidence"] == pytest.approx(found(said), abs=1e-6)
    assert len(said) == 40
    # However many neighbours are shown.
    for top_k in (0, 2):
        predict(str(sure_run), str(pairs_folder / "images"), str(out), **{**USED, "top_k": top_k})
        fewer = read_predictions(out)
        assert fewer.columns["confidence"] == pytest.approx(said.columns["confidence"], abs=1e-6)
        shown = fewer.columns.get("nearest_prompts", [[]] * 40)
        assert shown == [one[:top_k] for one in said.columns["nearest_prompts"]]
    # Another rung is another model, and of views it was not learnt.
    other = next(one for one in ("finetune", "probe") if one != found.of["rung"])
    for options, told in (
        ({"ckpt": str(sure_run / "checkpoints" / f"{other}.safetensors")}, ""),
        ({"views": ["flip"]}, "confidence is left out"),
        ({"confidence": None}, ""),
    ):
        capsys.readouterr()
        predict(**{"ckpt": str(sure_run), "images": str(pairs_folder / "images"), "out": str(out), **USED, **options})
        assert "confidence" not in read_predictions(out).columns
        assert told in capsys.readouterr().err


def test_what_is_not_sure_enough_is_set_aside(sure_run, pairs_folder, tmp_path, capsys):
    images, prompts = str(pairs_folder / "images"), str(pairs_folder / "prompts.csv")
    # The best rung may be the mean, whose norms are all one.
    model = str(sure_run / "checkpoints" / "finetune.safetensors")
    predict(model, images, str(tmp_path / "all.npz"), **USED)
    whole = read_predictions(tmp_path / "all.npz")
    # A confidence of our own, which tells these images apart.
    norms = np.array(whole.columns["norm"])
    own = json.loads((sure_run / "confidence.json").read_text())
    own |= {
        "of": {},
        "features": ["norm"],
        "weights": [1.0],
        "knots": [[float(norms.min()), 0.1], [float(norms.max()), 0.9]],
    }
    (tmp_path / "own.json").write_text(json.dumps(own))
    least = float(np.median(np.interp(norms, [norms.min(), norms.max()], [0.1, 0.9])))
    for ending in (".parquet", ".npz", ".jsonl"):
        out = tmp_path / f"p{ending}"
        options = {**USED, "prompts": prompts, "confidence": str(tmp_path / "own.json"), "min_confidence": least}
        predict(model, images, str(out), **options)
        kept, aside = read_predictions(out), read_predictions(tmp_path / f"p.aside{ending}")
        assert sorted(kept.ids + aside.ids) == sorted(whole.ids) and 0 < len(aside) < len(whole)
        assert min(kept.columns["confidence"]) >= least - 1e-6 > max(aside.columns["confidence"]) - 2e-6
    printed = capsys.readouterr().out
    assert (
        f"{len(aside)} of 40 images are under min_confidence" in printed and "without those set aside: mean" in printed
    )
    with pytest.raises(ValueError, match="all 40 images are under min_confidence=0.95"):
        predict(model, images, str(tmp_path / "q.npz"), **{**options, "min_confidence": 0.95})
    assert not (tmp_path / "q.npz").exists() and len(read_predictions(tmp_path / "q.aside.npz")) == 40
    predict(model, images, str(tmp_path / "q.npz"), **{**options, "min_confidence": 0.05})
    assert len(read_predictions(tmp_path / "q.npz")) == 40 and not (tmp_path / "q.aside.npz").exists()
    predict(model, images, str(tmp_path / "q.npz"), **{**options, "min_confidence": least})
    with pytest.raises(ValueError, match="out is not written .*q.npz is of an earlier job"):
        predict(model, images, str(tmp_path / "q.npz"), **{**options, "min_confidence": 0.95})
    # What was set aside is among the others again.
    predict(model, images, str(tmp_path / "q.npz"), **{**options, "min_confidence": None})
    assert len(read_predictions(tmp_path / "q.npz")) == 40 and not (tmp_path / "q.aside.npz").exists()
    with pytest.raises(ValueError, match="a submission needs every image"):
        predict(model, images, str(tmp_path / "s.csv"), **options)
    with pytest.raises(ValueError, match="nothing says how sure"):
        predict(model, images, str(out), **{**options, "confidence": None})


def test_what_is_as_sure_as_was_asked_for_stays():
    value = float(np.float32(0.7))
    part = Prediction(["a", "b"], np.eye(2, dtype=np.float32), {"confidence": [value, 0.6999]})
    assert [one.ids for one in Chosen([part], 0.7, True)] == [["a"]]
    assert [one.ids for one in Chosen([part], 0.7, False)] == [["b"]]


def test_numbers_that_are_none_are_told(tmp_path):
    prediction, targets, groups, _ = known(200)
    found = calibrated(prediction, targets, groups)
    prediction.columns["norm"][7] = None
    with pytest.raises(ValueError, match="the norm of i7 is no number"):
        found(prediction)
    with pytest.raises(ValueError, match="the norm of i7 is no number"):
        calibrated(prediction, targets, groups)


def test_the_confidence_of_another_checkpoint_is_refused(sure_run, finished_run, pairs_folder, tmp_path):
    with pytest.raises(ValueError, match="learnt from another checkpoint"):
        predict(
            str(finished_run / "checkpoints" / "finetune.safetensors"),
            str(pairs_folder / "images"),
            str(tmp_path / "p.npz"),
            **USED,
            confidence=str(sure_run / "confidence.json"),
        )


def test_a_run_of_few_images_says_that_it_learnt_no_confidence(finished_run, train_here, tmp_path, capsys):
    assert not (finished_run / "confidence.json").exists()
    train_here(tmp_path / "run", "trainer.max_epochs=0")
    assert "too few to learn confidence from" in capsys.readouterr().err


CALIBRATE = {
    "refiner": {"name": "confidence"},
    "apply_to": None,
    "out": None,
    "truth": None,
    "text_model": None,
    "device": "cpu",
    "cache_dir": None,
}


def test_fit_learns_it_from_saved_predictions_and_evaluate_judges_it(sure_run, pairs_folder, tmp_path, capsys):
    images, prompts = str(pairs_folder / "images"), str(pairs_folder / "prompts.csv")
    saved = tmp_path / "saved.parquet"
    predict(str(sure_run), images, str(saved), **{**USED, "views": ["flip"]})
    learnt = str(tmp_path / "c.json")
    out = tmp_path / "out.jsonl"
    given = {"source": saved, "prompts": prompts, "weights": learnt, "apply_to": saved, "out": out, "truth": prompts}
    arguments = ["refiner=confidence", "device=cpu", *(f"{key}={value}" for key, value in given.items())]
    calibrate(**compose(chosen_config("fit", arguments), arguments))
    printed = capsys.readouterr()
    found = read_confidence(tmp_path / "c.json")
    assert found.features == ["nearest", "margin", "agreement", "norm", "typical"]
    assert "rank correlation" in printed.out and "40 ids are in source and in apply_to" in printed.err
    refined = read_predictions(out)
    assert refined.columns["confidence"] == pytest.approx(found(read_predictions(saved)), abs=1e-6)
    # … of views, it is for views.
    predict(str(sure_run), images, str(tmp_path / "p.npz"), **{**USED, "views": ["flip"], "confidence": learnt})
    assert read_predictions(tmp_path / "p.npz").columns["confidence"] == pytest.approx(
        refined.columns["confidence"], abs=1e-5
    )
    with pytest.raises(ValueError, match="an agreement of views"):
        predict(str(sure_run), images, str(tmp_path / "q.npz"), **{**USED, "confidence": learnt})

    listed = [
        str(out),
        f"{{predictor: {saved}, confidence: {learnt}, as: again}}",
        f"{{predictor: {sure_run}, as: run}}",
        f"{{predictor: {out}, confidence: null, as: none}}",
    ]
    judged = f"predictors=[{','.join(listed)}]"
    settings = compose("evaluate", [judged, "data=kaggle", "device=cpu", f"out={tmp_path / 'e'}"])
    settings["data"]["root"] = settings["data"]["source"]["root"] = str(pairs_folder)
    evaluate(**settings)
    rows = json.loads((tmp_path / "e" / "evaluation.json").read_text())["predictors"]
    truth = {row["id"]: row for row in read_csv(tmp_path / "e" / "evaluation.csv")}
    said = dict(zip(refined.ids, refined.columns["confidence"], strict=True))
    told = reliability(
        np.array([said[one] for one in truth]), np.array([float(row[f"cosine {out}"]) for row in truth.values()])
    )
    assert rows[0]["confidence"]["calibration_error"] == pytest.approx(told.calibration_error, abs=1e-5)
    assert rows[0]["confidence"]["spearman"] == pytest.approx(told.spearman, abs=0.05)
    assert rows[1]["confidence"]["calibration_error"] == pytest.approx(told.calibration_error, abs=1e-5)
    assert rows[2]["predictor"] == "run" and len(rows[2]["confidence"]["bins"]) == 4
    assert rows[3]["predictor"] == "none" and "confidence" not in rows[3]
    assert "| confidence | Spearman |" in capsys.readouterr().out
    assert all(f"confidence {name}" in next(iter(truth.values())) for name in (str(out), "again", "run"))


def test_the_command_needs_no_more_than_predictions_and_prompts(sure_run, pairs_folder, tmp_path, monkeypatch, capsys):
    saved = tmp_path / "saved.parquet"
    predict(str(sure_run), str(pairs_folder / "images"), str(saved), **USED)
    given = (f"source={saved}", f"prompts={pairs_folder / 'prompts.csv'}")
    monkeypatch.chdir(tmp_path)
    fit.main(quoted_paths(["refiner=confidence", "device=cpu", *given]))
    assert "rank correlation" in capsys.readouterr().out
    assert read_confidence(tmp_path / "confidence.json").images == 40


def test_bad_input_is_told_in_a_sentence(pairs_folder, tmp_path):
    prediction, _, _, _ = known(30, width=384)
    WRITERS[".npz"](tmp_path / "p.npz", [prediction])
    good = {"source": str(tmp_path / "p.npz"), "prompts": str(pairs_folder / "prompts.csv"), "weights": "c.json"}
    for change, sentence in (
        ({"weights": "c.npz"}, "must be .json"),
        ({"weights": str(tmp_path)}, "must be .json"),
        ({"apply_to": "x.npz"}, "given together"),
        ({"truth": "x.csv"}, "given together"),
        ({"apply_to": "x.npz", "out": "y.csv"}, "must be one of"),
        ({"apply_to": str(tmp_path / "p.npz"), "out": str(tmp_path / "p.npz")}, "would replace"),
        ({"source": [good["source"]] * 2}, "of one file"),
        ({}, "none of its 40 imgIds"),
        ({"source": [good["source"]]}, "none of its 40 imgIds"),
    ):
        with pytest.raises(ValueError, match=sentence):
            calibrate(**{**CALIBRATE, **good, **change})
