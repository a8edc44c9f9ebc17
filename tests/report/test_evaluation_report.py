"""The report of an evaluation: written by the command, made again from its folder alone."""

import csv
import json
import shlex
import shutil

import pytest
import torch
from conftest import read_csv
from report.markup import read

from img2prompt.commands import evaluate as command
from img2prompt.commands.answers import Answer
from img2prompt.commands.arguments import quoted_paths
from img2prompt.commands.evaluate import evaluate
from img2prompt.commands.evaluation_report import write_evaluation
from img2prompt.commands.report import report
from img2prompt.commands.settings import compose
from img2prompt.data.kaggle import Kaggle
from img2prompt.data.sample import Sample
from img2prompt.files import write_table

HOSTILE = '</script><img src=x onerror="alert(1)">'


@pytest.fixture(scope="session")
def evaluated(finished_run, pairs_folder, tmp_path_factory):
    """Two predictors on twelve images, one of them with its robustness card."""
    out = tmp_path_factory.mktemp("evaluated") / "e"
    tuned = finished_run / "checkpoints" / "finetune.safetensors"
    listed = f"predictors=[{{predictor: {tuned}, as: plain}},{{predictor: {tuned}, as: seen, views: [flip]}}]"
    given = [listed, "data=kaggle", "data.count=12", "device=cpu", "batch_size=12", f"out={out}", "robustness=true"]
    settings = compose("evaluate", given)
    settings["data"]["root"] = settings["data"]["source"]["root"] = str(pairs_folder)
    evaluate(**settings)
    return out


@pytest.fixture
def folder(evaluated, tmp_path):
    shutil.copytree(evaluated, tmp_path / "e")
    return tmp_path / "e"


def again(folder):
    report(**compose("report", [f"evaluation='{folder}'"]))
    return read(folder / "report.html")


def test_evaluation_leaves_a_report_with_all_that_it_found(evaluated):
    page, found = read(evaluated / "report.html"), json.loads((evaluated / "evaluation.json").read_text())
    for title in ("Predictors", "Cosines", "By length and source", "Robustness", "Images", "Similarity"):
        assert title in page.texts, title
    for row in found["predictors"]:
        assert f"{row['mean']:.4f}" in page.texts and f"{row['low']:.4f} to {row['high']:.4f}" in page.texts
        assert {f"Best of {row['predictor']}", f"Worst of {row['predictor']}"} <= set(page.texts)
        ids = {image["alt"] for image in page.images}
        assert {f"Image {one['id']}" for one in row["best"] + row["worst"]} <= ids
    change = found["predictors"][0]["robustness"]["grey"]["change"]
    assert any(text.startswith(f"{change['mean']:+.4f} (") for text in page.texts)
    assert {"best constant", "another prompt", "At random"} <= set(page.texts)
    assert sum("stronger is higher" in image["alt"] for image in page.images) == 2
    assert "no picture of it was kept" not in page.text


def test_it_is_made_again_to_the_byte_without_the_images(folder, evaluated):
    (folder / "report.html").unlink()
    again(folder)
    assert (folder / "report.html").read_bytes() == (evaluated / "report.html").read_bytes()


def test_what_a_prediction_is_closest_to_is_told_by_its_prompt(folder):
    rows = read_csv(folder / "evaluation.csv")
    other = next(row for row in rows if row["closest plain"] not in ("", row["id"]))
    prompts = {row["id"]: row["prompt"] for row in rows}
    best = {"id": other["id"], "cosine": 0.5, "prompt": other["prompt"]}
    found = json.loads((folder / "evaluation.json").read_text())
    found["predictors"][0]["best"] = [best]
    (folder / "evaluation.json").write_text(json.dumps(found))
    page = again(folder)
    place = page.texts.index("Best of plain")
    told = page.texts[place : page.texts.index("Worst of plain")]
    same = prompts[other["closest plain"]] == other["prompt"]
    assert told[-2] == ("its own" if same else prompts[other["closest plain"]])


def test_the_shown_command_gives_the_same_settings(evaluated, finished_run, pairs_folder, tmp_path):
    assert "Command" not in read(evaluated / "report.html").texts
    given = [f"predictors=[{finished_run}]", "data=kaggle", f"data.root={pairs_folder}", "data.count=4", "device=cpu"]
    quoted = quoted_paths([*given, f"out={tmp_path / 'it is = (4)'}"])
    command.main(quoted)
    page = read(tmp_path / "it is = (4)" / "report.html")
    shown = shlex.split(next(text for text in page.texts if text.startswith("python -m img2prompt evaluate")))
    assert compose("evaluate", quoted_paths(shown[4:])) == compose("evaluate", quoted)
    assert shown[-1] == f"out={tmp_path / 'it is = (4)'}"


def test_hostile_names_and_prompts_stay_texts(folder):
    found = json.loads((folder / "evaluation.json").read_text())
    text = json.dumps(found).replace('"plain"', json.dumps(HOSTILE)).replace('"best constant"', json.dumps(HOSTILE))
    (folder / "evaluation.json").write_text(text.replace('"sentence-transformers', f"{json.dumps(HOSTILE)[:-1]}"))
    rows = [
        {key.replace("plain", HOSTILE): HOSTILE if key in ("prompt", "source") else value for key, value in row.items()}
        for row in read_csv(folder / "evaluation.csv")
    ]
    write_table(folder / "evaluation.csv", rows)
    rows = [row | {"predictor": HOSTILE, "prediction": HOSTILE} for row in read_csv(folder / "similarity.csv")]
    write_table(folder / "similarity.csv", rows)
    assert again(folder).text.count(HOSTILE) > 10


def test_the_confidence_of_a_predictor_is_drawn_where_it_is_there(folder):
    assert "Confidence" not in again(folder).texts
    found = json.loads((folder / "evaluation.json").read_text())
    points = [{"confidence": 0.2, "cosine": 0.3, "images": 4}, {"confidence": 0.6, "cosine": 0.5, "images": 8}]
    found["predictors"][1]["confidence"] = {"spearman": 0.41, "calibration_error": 0.1, "bins": points}
    (folder / "evaluation.json").write_text(json.dumps(found))
    page = again(folder)
    assert "spearman 0.410, calibration error 0.100" in page.text
    assert {"expected 0.200, found 0.300, 4 images", "expected 0.600, found 0.500, 8 images"} <= set(page.texts)


def test_what_is_no_evaluation_is_told_in_a_sentence(folder, tmp_path):
    with pytest.raises(ValueError, match="not the folder of an evaluation, it has no evaluation.json"):
        again(tmp_path)
    for text, sentence in (
        ("[", "damaged, it has no predictors"),
        ('{"predictors": []}', "damaged, it has no predictors"),
        ('{"predictors": [{}], "images": 3}', "damaged .KeyError"),
    ):
        (folder / "evaluation.json").write_text(text)
        with pytest.raises(ValueError, match=sentence):
            again(folder)


@pytest.mark.parametrize("text", ["", "id,prompt\nx,y\n", None])
def test_the_table_of_another_evaluation_is_refused(folder, text):
    table = folder / "evaluation.csv"
    table.write_text("".join(table.read_text().splitlines(keepends=True)[:5]) if text is None else text)
    with pytest.raises(ValueError, match="evaluation.csv: not the table of these 12 images"):
        again(folder)


def test_images_may_be_called_as_columns_are(tmp_path):
    targets = torch.eye(3, 8)
    samples = [Sample(name, f"a {name}", Kaggle("x"), "x.png") for name in ("prediction", "predictor", "=x")]
    write_evaluation(tmp_path, samples, targets, [Answer("one", targets.roll(1, 0))], [], "model", None)
    with (tmp_path / "similarity.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["predictor", "prediction", "to prediction", "to predictor", "to =x"]
    assert [row[1] for row in rows] == ["prediction", "predictor", "'=x"]
    assert [[float(cell) for cell in row[2:]] for row in rows] == targets.roll(1, 0)[:, :3].tolist()
    assert "Similarity" in (tmp_path / "report.html").read_text()
