"""The report of a sweep, from its two files alone."""

import csv
import json

import pytest
from markup import read

from img2prompt.report.sweep import write_sweep_report

ABOUT = {
    "name": "<lr>",
    "space": {"optim.lr": {"kind": "float", "low": 1e-6, "high": 1e-2, "log": True}},
    "overrides": ["data=folder", "data.root=my <pictures>"],
    "n_trials": 6,
    "sampler": "tpe",
    "pruner": "median",
    "best_trial": 2,
    "best_value": 0.75,
    "best_overrides": ["optim.lr=0.001"],
    "best_folder": "/there/trials/0002",
    "importance": {"optim.lr": 0.8, "head<b>": 0.2},
    "no_importance": None,
}
ROWS = [
    {"trial": 0, "state": "finished", "val_cosine": 0.5, "optim.lr": 0.1},
    {"trial": 1, "state": "failed", "optim.lr": 1.0, "kind": "not finite", "reason": "'=<script>x</script>"},
    {"trial": 2, "state": "finished", "val_cosine": 0.75, "optim.lr": 0.001},
    {"trial": 3, "state": "pruned", "val_cosine": 0.25, "optim.lr": 0.5, "validations": 2},
    {"trial": 4, "state": "queued"},
]


@pytest.fixture
def sweep(tmp_path):
    def write(about=ABOUT, rows=ROWS):
        (tmp_path / "sweep.json").write_text(json.dumps(about))
        columns = ["trial", "state", "val_cosine", "optim.lr", "validations", "seconds", "kind", "reason"]
        with (tmp_path / "trials.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
        return tmp_path

    return write


def test_the_page_has_everything_and_is_closed_to_what_it_is_given(sweep):
    folder = sweep()
    page = read(write_sweep_report(folder))
    for words in (
        "Sweep <lr>",
        "python -m img2prompt train data=folder 'data.root=my <pictures>' optim.lr=0.001",
        "3 trials, 1 of them pruned (grey); best 0.7500, the line",
        "=<script>x</script>",
        "head<b>",
        "5 of 6",
        "2 (best)",
    ):
        assert words in page.text, words
    first = (folder / "report.html").read_bytes()
    assert write_sweep_report(folder).read_bytes() == first


def test_a_sweep_without_a_finished_trial_says_so(sweep):
    nothing = dict.fromkeys(("best_trial", "best_value", "best_overrides", "best_folder"))
    folder = sweep({**ABOUT, **nothing, "importance": {}, "no_importance": "4 trials are needed"}, ROWS[1:2])
    page = read(write_sweep_report(folder))
    assert "No trial has finished" in page.text and "4 trials are needed" in page.text
    assert read(write_sweep_report(sweep({**ABOUT, **nothing, "importance": {}}, []))).text


@pytest.mark.parametrize("text", ["", "[]", '{"name": 3}', "{"])
def test_a_damaged_file_is_one_sentence(sweep, text):
    folder = sweep()
    (folder / "sweep.json").write_text(text)
    with pytest.raises(ValueError, match="damaged"):
        write_sweep_report(folder)
