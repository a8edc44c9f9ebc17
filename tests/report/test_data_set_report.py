"""The report of a data set: what is there, what is left out, and why; and the command of all three kinds."""

import csv
import io
import os
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, read_csv
from PIL import Image
from report.markup import read

from img2prompt.commands.arguments import quoted_paths
from img2prompt.commands.report import report
from img2prompt.commands.settings import compose
from img2prompt.data.images import decode, small_jpeg
from img2prompt.report.thumbnails import SIDE_PX

HOSTILE = "</script><img src=x onerror=alert(1)>"


def asked(tmp_path, *overrides):
    out = tmp_path / "page.html"
    report(**compose("report", quoted_paths([*overrides, f"out={out}"])))
    return read(out)


def picture(path, size=(20, 20)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)


def pairs(root, prompts, named=str):
    """A data set in the layout of data=kaggle."""
    root.mkdir()
    with (root / "prompts.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(("imgId", "prompt"))
        rows.writerows((named(number), prompt) for number, prompt in enumerate(prompts))
    for number in range(len(prompts)):
        picture(root / "images" / f"{named(number)}.png")
    return root


def fact(page, name):
    return page.texts[page.texts.index(name) + 1]


def test_a_data_set_is_counted_and_shown(pairs_folder, tmp_path):
    page = asked(tmp_path, "data=kaggle", f"data.root={pairs_folder}")
    assert fact(page, "pairs") == "40" and fact(page, "distinct prompts") == "20"
    assert fact(page, "images of a prompt at most") == "2" and "Nothing." in page.texts and len(page.images) == 20
    some = read_csv(pairs_folder / "prompts.csv")
    assert sum(one["prompt"] in page.texts for one in some) >= 20 and "found" in page.texts
    assert fact(asked(tmp_path, "data=kaggle", f"data.root={pairs_folder}", "data.count=7"), "pairs") == "7"


def test_what_is_left_out_has_its_reason(tmp_path):
    prompts = ["a red star", "a blue star on the wide sea", "<lora:x:1>", "x " * 200, "", "(moon:1.2)"]
    root = pairs(tmp_path / "pairs", prompts)
    (root / "images" / "0.png").write_bytes(b"no image")
    page = asked(tmp_path, "data=kaggle", f"data.root={root}", "data.clean=true")
    assert fact(page, "pairs") == "3" and fact(page, "left out") == "3"
    reasons = {"empty prompt", "no words after cleaning", "more than 77 CLIP tokens"}
    assert reasons <= set(page.texts) and "moon" in page.texts
    assert any("not an image of a known format" in text for text in page.texts)
    for override, left in (
        ("data.clean=false", "4"),
        ("data.max_clip_tokens=null", "4"),
        ("data.min_words=2", "2"),
        ("data.max_words=3", "2"),
    ):
        assert fact(asked(tmp_path, "data=kaggle", f"data.root={root}", "data.clean=true", override), "pairs") == left


@pytest.mark.parametrize(
    "prompt", [HOSTILE, "星空の下の猫 🐈‍⬛", "قطة تحت النجوم", "x" * 50_000, "\u202eabc", "a\u0000b\u2028c"]
)
def test_any_prompt_and_one_image_alone_are_shown(tmp_path, prompt):
    root = pairs(tmp_path / f"pairs {HOSTILE[:1]}", [prompt], named=lambda number: "<b onclick=x>&amp;")
    page = asked(tmp_path, "data=kaggle", f"data.root={root}", "data.max_clip_tokens=null")
    assert prompt[:400].replace("\x00", "\N{REPLACEMENT CHARACTER}") in page.text and fact(page, "pairs") == "1"
    assert page.images[0]["alt"] == "Image <b onclick=x>&amp;"


def test_a_thumbnail_is_small_and_keeps_its_shape(tmp_path):
    for size, expected in (((1000, 400), (64, SIDE_PX)), ((40, 50), (50, 40)), ((1, 3000), (SIDE_PX, 1))):
        picture(tmp_path / "x.png", size)
        data = small_jpeg(decode((tmp_path / "x.png").read_bytes()), SIDE_PX)
        with Image.open(io.BytesIO(data)) as image:
            assert image.size == expected and image.format == "JPEG" and len(data) < 30_000


def test_exactly_one_thing_is_reported(finished_run, pairs_folder, tmp_path):
    root = f"data.root={pairs_folder}"
    for given in ([], [f"run={finished_run}", "evaluation=x"], [f"run={finished_run}", "data=kaggle", root]):
        with pytest.raises(ValueError, match="give exactly one of run=DIR, evaluation=DIR, sweep_dir=DIR, or a"):
            report(**compose("report", quoted_paths(given)))
    with pytest.raises(ValueError, match="out=.*: a folder; give a file"):
        report(**compose("report", quoted_paths([f"run={finished_run}", f"out={tmp_path}"])))


def test_the_door_writes_a_report_where_no_connection_can_be_had(finished_run, pairs_folder, tmp_path):
    run = tmp_path / "run=1, (best)"
    shutil.copytree(finished_run, run)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'offline'}"}

    def asked(*arguments):
        command = [sys.executable, "-m", "img2prompt", "report", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)

    done = asked("run=run=1, (best)", "out=a=1.html")
    assert done.returncode == 0 and done.stdout == "report: a=1.html\n", done.stderr
    assert read(tmp_path / "a=1.html").images
    shutil.copytree(pairs_folder, tmp_path / "it's (mine)")
    done = asked("data=kaggle", "data.root=it's (mine)", "data.count=5")
    assert done.returncode == 0, done.stderr
    shown = next(text for text in read(tmp_path / "report.html").texts if text.startswith("python -m"))
    assert shlex.split(shown)[4:] == ["data=kaggle", "data.root=it's (mine)", "data.count=5"]
    done = asked("data.rot=x")
    assert done.returncode == 1 and "data.rot: no such key; did you mean data.root?" in done.stderr
