"""The report of a run: written by training, made again from the folder alone, and never a reason to fail."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml
from conftest import ALIKE, QUICK, ROOT, TINY, read_csv, settings_of
from report.markup import read
from torch import tensor

from img2prompt.commands import train as command
from img2prompt.commands.arguments import PATH_KEYS, quoted_paths, typed
from img2prompt.commands.report import report
from img2prompt.commands.settings import compose
from img2prompt.data.kaggle import Kaggle
from img2prompt.data.sample import Sample
from img2prompt.files import as_cell, from_cell, read_table, write_table
from img2prompt.regressor import read_header
from img2prompt.report.reproduction import command_of
from img2prompt.report.run import run_report
from img2prompt.training.summary import Judged, write_scores


@pytest.fixture
def run(finished_run, tmp_path):
    shutil.copytree(finished_run, tmp_path / "run")
    return tmp_path / "run"


def asked(*overrides):
    return report(**compose("report", quoted_paths(list(overrides))))


def test_training_leaves_a_report_with_all_that_it_found(finished_run):
    page = read(finished_run / "report.html")
    summary = json.loads((finished_run / "summary.json").read_text())
    assert f"{summary['val_cosine']:.4f}" in page.texts and "finetune" in page.texts
    for title in ("Ladder", "Curves", "Validation cosines", "Predictions", "Prompts", "Training pairs", "Data"):
        assert page.texts.count(title) == 2, title
    assert {"Best", "Worst", "At random", "Validation cosine", "Versions"} <= set(page.texts)
    scores = read_csv(finished_run / "scores.csv")
    assert len(scores) == summary["val_pairs"]
    assert sum(float(one["cosine"]) for one in scores) / len(scores) == pytest.approx(summary["val_cosine"], abs=1e-5)
    best = max(scores, key=lambda one: float(one["cosine"]))
    assert best["prompt"] in page.text and best["nearest_prompt"] in page.text
    ids = {image["alt"].removeprefix("Image ") for image in page.images}
    assert best["id"] in ids and ids - {one["id"] for one in scores}
    assert (finished_run / "report.html").stat().st_size < 2**20


def test_scores_name_the_nearest_training_prompt(finished_run, pairs_folder):
    prompts = {one["imgId"]: one["prompt"] for one in read_csv(pairs_folder / "prompts.csv")}
    held = {prompts[one["id"]] for one in read_csv(finished_run / "scores.csv")}
    for one in read_csv(finished_run / "scores.csv"):
        assert one["prompt"] == prompts[one["id"]] and one["path"].endswith(f"{one['id']}.png")
        assert one["nearest_prompt"] in prompts.values() and one["nearest_prompt"] not in held
        assert -1 <= float(one["nearest_cosine"]) <= 1 and one["source"] == "kaggle"


def test_the_same_folder_gives_the_same_bytes_wherever_it_lies(run, finished_run, tmp_path, capsys):
    first = (run / "report.html").read_bytes()
    (run / "report.html").unlink()
    asked(f"run={run}")
    assert capsys.readouterr().out == f"report: {run / 'report.html'}\n"
    again = (run / "report.html").read_bytes()
    assert again == first.replace(b">finished, finished<", b">run, finished<")
    asked(f"run={run}", f"out={tmp_path / 'sub' / 'page.html'}")
    assert (tmp_path / "sub" / "page.html").read_bytes() == again


HOSTILE = "</script><img src=x onerror=alert(1)>"


def test_hostile_texts_in_a_folder_stay_texts(run):
    for name in ("scores.csv", "ladder.csv", "lineage.csv"):
        rows = read_csv(run / name)
        texts = ("id", "source", "prompt", "nearest_prompt", "rung", "note", "step", "reasons")
        write_table(
            run / name, [{key: HOSTILE if key in texts else value for key, value in row.items()} for row in rows]
        )
    write_table(run / "bad_images.csv", [{"id": HOSTILE, "path": HOSTILE, "reason": HOSTILE}])
    config = yaml.safe_load((run / "config.yaml").read_text())
    config |= {"name": HOSTILE, "overrides": [HOSTILE], HOSTILE: HOSTILE}
    config["versions"][HOSTILE] = HOSTILE
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    for name in ("summary.json", "split.json"):
        found = json.loads((run / name).read_text())
        (run / name).write_text(json.dumps({k: HOSTILE if isinstance(v, str) else v for k, v in found.items()}))
    other = run.with_name(HOSTILE.replace("/", "\u2215"))
    run.rename(other)
    asked(f"run={other}")
    assert read(other / "report.html").text.count(HOSTILE) > 20


@pytest.mark.parametrize(
    "prompt", ["", "星空の下の猫 🐈‍⬛", "قطة تحت النجوم", "x" * 100_000, "a\r\nb\x00", "=1+1", "'quoted'"]
)
def test_prompts_of_any_kind_are_shown(run, prompt):
    samples = [Sample(name, prompt, Kaggle("x"), "x.png") for name in ("=id", "t")]
    write_scores(run, samples, Judged([0], tensor([0.5]), [samples[1].prompt], [0.25]))
    asked(f"run={run}")
    text = read(run / "report.html").text
    shown = re.sub("[\x00\r]", "\N{REPLACEMENT CHARACTER}", prompt)[:400] or "(empty)"
    assert text.count(shown) >= 2 and "nearest training prompt (0.250)" in text and "=id" in text


def test_what_is_not_there_is_left_out_and_odd_numbers_break_nothing(run):
    (run / "thumbnails.parquet").unlink()
    rows = read_csv(run / "scores.csv")
    write_table(run / "scores.csv", [row | {"cosine": "nan"} for row in rows[:2]] + [rows[2] | {"cosine": "0.5"}])
    write_table(run / "metrics.csv", [{"step": "1", "val/cosine": "nan", "lr": ""}, {"step": "x", "lr": "1"}])
    page = read_again(run)
    assert "no picture of it was kept" in page.text and "2 are no numbers" in page.text and not page.images
    for name in (
        "scores.csv",
        "metrics.csv",
        "summary.json",
        "split.json",
        "lineage.csv",
        "bank.parquet",
        "ladder.csv",
    ):
        (run / name).unlink()
    page = read_again(run)
    assert "not finished" in page.text and "it is not finished" in page.text and "All settings" in page.text


def read_again(run):
    asked(f"run={run}")
    return read(run / "report.html")


def test_what_is_no_run_is_told_in_a_sentence(run, tmp_path):
    with pytest.raises(ValueError, match="nowhere: not a run folder, it has no config.yaml"):
        asked("run=nowhere")
    for name, sentence in (
        ("summary.json", "summary.json: damaged"),
        ("thumbnails.parquet", "thumbnails.parquet: not thumbnails of a report"),
        ("bank.parquet", "bank.parquet: not a bank of prompts"),
        ("scores.csv", "scores.csv: damaged, no table"),
        ("config.yaml", "config.yaml: damaged, it holds no settings"),
    ):
        (run / name).write_bytes(b"\xff" if name == "scores.csv" else b"[")
        with pytest.raises(ValueError, match=sentence):
            asked(f"run={run}")
        (run / name).unlink()


def test_what_goes_wrong_with_the_report_costs_no_run(tmp_path, train_here, monkeypatch, capsys):
    def broken(*given):
        raise ValueError("report.html: the disk is full")

    for number, name in enumerate(("write_pictures", "write_run_report", "write_scores")):
        with monkeypatch.context() as patch:
            patch.setattr(command, name, broken)
            assert train_here(tmp_path / str(number), "trainer.max_epochs=0") > 0
        told = [line for line in capsys.readouterr().err.splitlines() if "report is" in line]
        assert told == [
            "the report is not complete: report.html: the disk is full; img2prompt report run=DIR writes it again"
        ]
        assert (tmp_path / str(number) / "summary.json").is_file()
        read_again(tmp_path / str(number))


def test_a_run_that_its_time_has_stopped_has_a_report_that_says_so(tmp_path, train_here):
    train_here(tmp_path / "run", "trainer.max_time=00:00:00:00")
    page = read(tmp_path / "run" / "report.html")
    assert "run, not finished" in page.texts and "resume= goes on with it" in page.text and page.images
    train_here(tmp_path / "run")
    page = read(tmp_path / "run" / "report.html")
    assert "run, finished" in page.texts and "resume= goes on with it" not in page.text


def test_a_cell_comes_back_as_it_was_unless_it_is_huge(tmp_path):
    texts = ["", "a", "=1", "'=1", "''", "-", "@x", "a\r\nb", '"q",', "\x00"]
    write_table(tmp_path / "t.csv", [{"a": as_cell(text)} for text in [*texts, "=" * 200_000]])
    found = [row["a"] for row in read_table(tmp_path / "t.csv")]
    assert [from_cell(cell) for cell in found[:-1]] == texts and from_cell(found[-1]) == "=" * 20_000
    assert not [cell for cell in found if cell.startswith(("=", "+", "-", "@"))]


def test_an_image_that_is_gone_at_the_end_has_its_reason_in_the_report(tmp_path, pairs_folder, train_here, monkeypatch):
    root = tmp_path / "pairs"
    shutil.copytree(pairs_folder, root)
    before = command.write_scores

    def gone(*given):
        shutil.rmtree(root / "images")
        return before(*given)

    monkeypatch.setattr(command, "write_scores", gone)
    train_here(tmp_path / "run", f"data.root={root}", "trainer.max_epochs=0")
    page = read(tmp_path / "run" / "report.html")
    assert page.text.count("No such file or directory") > 5 and not page.images


def printed(run):
    """The arguments of the command that a report shows."""
    parts = shlex.split(next(text for text in read(run / "report.html").texts if text.startswith("python -m")))
    assert parts[:4] == ["python", "-m", "img2prompt", "train"]
    return parts[4:]


def check_reproduces(run, cwd, monkeypatch):
    """The shown command composes to the settings of the run, but for its folder."""
    monkeypatch.chdir(cwd)
    then = yaml.safe_load((run / "config.yaml").read_text())
    now = compose("train", quoted_paths(printed(run)))
    own = ("run_dir", "resume", "versions", "overrides")
    assert {key: value for key, value in now.items() if key not in own} == {
        key: value for key, value in then.items() if key not in own
    }


def test_the_shown_command_makes_the_same_configuration(tmp_path, pairs_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pairs_folder, tmp_path / "it's, (mine) =1")
    short = [*QUICK, *TINY, "trainer.max_epochs=0", "loss=huber", "optim.betas=[0.8,0.9]"]
    command.main(quoted_paths([*short, "data.root=it's, (mine) =1", "name=a b", "resume=auto", "run_dir=run"]))
    check_reproduces(tmp_path / "run", tmp_path, monkeypatch)
    assert (
        "data.root=it's, (mine) =1" in printed(tmp_path / "run")
        and "'data.root=it'\"'\"'s, (mine) =1'" in read(tmp_path / "run" / "report.html").text
    )
    assert not [one for one in printed(tmp_path / "run") if one.startswith(("resume", "run_dir"))]


@pytest.mark.slow
def test_the_command_of_a_job_of_a_sweep_is_its_own(tmp_path, pairs_folder, monkeypatch):
    given = [*QUICK, *TINY, f"data.root={pairs_folder}", "trainer.max_epochs=0", "seed=0,1", "run_dir=s"]
    environment = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "img2prompt", "train", "-m", *given],
        cwd=tmp_path,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for seed in (0, 1):
        assert f"seed={seed}" in printed(tmp_path / "s" / str(seed))
        check_reproduces(tmp_path / "s" / str(seed), tmp_path, monkeypatch)


def test_paths_are_shown_as_they_are_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    strange = ["a b", "it's", 'q"q', "${x}", "\\${x}", "a\\", "\\'", "été,=(1)", "日本語"]
    for path in strange:
        (quoted,) = quoted_paths([f"data.root={path}"])
        assert typed(quoted) == f"data.root={path}" and "data.root" in PATH_KEYS
        assert compose("train", ["data=kaggle", quoted])["data"]["root"] == path
    for given in ("data.synthesis.prompts=['a b.txt','c,d.txt']", "data.synthesis.prompts=[\"it's.txt\",'b']"):
        (quoted,) = quoted_paths([given])
        assert quoted_paths([typed(quoted)]) == [quoted] and "\\" not in typed(quoted)
    for plain in ("seed=1", "optim.betas=[0.8,0.9]", "resume=null", "+experiment=vit_b", "name='x"):
        assert typed(plain) == plain
    assert command_of("train", ["data.root=a b"]) == "python -m img2prompt train 'data.root=a b'"


def test_a_run_without_recorded_arguments_shows_none(finished_run):
    # It was trained from Python.
    assert "overrides" not in yaml.safe_load((finished_run / "config.yaml").read_text())
    assert "The command to reproduce it" not in run_report(finished_run)


def test_a_run_goes_on_with_its_recorded_arguments(tmp_path, train_here, pairs_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = [*QUICK, *TINY, f"data.root={pairs_folder}", "trainer.max_epochs=0"]
    command.main(quoted_paths([*given, "run_dir=run"]))
    before = printed(tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    (tmp_path / "run" / "data.json").unlink()
    command.main(quoted_paths(["resume=run"]))
    assert printed(tmp_path / "run") == before and settings_of(*ALIKE)


@pytest.mark.parametrize("out", ["config.yaml", "checkpoints/best.safetensors", "page.txt"])
def test_a_report_replaces_nothing_but_pages(run, out):
    goal = run / out
    before = goal.read_bytes() if goal.exists() else None
    with pytest.raises(ValueError, match="must be .html"):
        asked(f"run={run}", f"out={goal}")
    assert (goal.read_bytes() if goal.exists() else None) == before


def test_confidence_is_shown_of_the_best_checkpoint_alone(run):
    bins = [{"confidence": 0.4, "cosine": 0.5, "images": 10}, {"confidence": 0.6, "cosine": 0.6, "images": 10}]
    of = read_header(run / "checkpoints" / "best.safetensors").scores
    learnt = {"checked": {"spearman": 0.25, "calibration_error": 0.05, "bins": bins}, "of": of}
    (run / "confidence.json").write_text(json.dumps(learnt))
    asked(f"run={run}")
    assert "spearman 0.250" in read(run / "report.html").text
    (run / "confidence.json").write_text(json.dumps(learnt | {"of": {"rung": "another"}}))
    asked(f"run={run}")
    page = read(run / "report.html").text
    assert "spearman 0.250" not in page and "confidence.json is of another checkpoint" in page


@pytest.mark.parametrize(
    "name, text",
    [
        ("confidence.json", '{"checked": {"bins": [{}]}}'),
        ("summary.json", "[" * 200_000),
        ("lineage.csv", "step,pairs\nonly one\n"),
        ("ladder.csv", "rung,val_cosine,low,high\nmean,x\n"),
    ],
)
def test_damaged_folders_are_told_in_a_sentence(run, name, text):
    if name == "confidence.json":
        of = read_header(run / "checkpoints" / "best.safetensors").scores
        text = json.dumps(json.loads(text) | {"of": of})
    (run / name).write_text(text)
    with pytest.raises(ValueError, match="damaged"):
        asked(f"run={run}")


def test_numbers_without_an_end_are_drawn(run):
    (run / "ladder.csv").write_text("rung,val_cosine,low,high,seconds,memory_gib,note\nmean,1e17,1e17,1e17,1,1,\n")
    (run / "metrics.csv").write_text("step,val/cosine\n100000000000000000,0.5\n")
    # Nine times nine names of each other are more than a page can hold.
    config = run / "config.yaml"
    aliases = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n"
        for before, name in zip("abcdefgh", "bcdefghi", strict=True)
    )
    config.write_text(f"{aliases}name: *i\n{config.read_text().replace('name:', 'was:', 1)}")
    asked(f"run={run}")
    assert "Run run" in read(run / "report.html").text


def test_a_table_gives_back_every_text(tmp_path):
    rows = [{"id": "a\rb", "x": "c"}, {"id": 'q"\n', "x": ","}]
    write_table(tmp_path / "t.csv", rows)
    assert read_table(tmp_path / "t.csv") == rows
