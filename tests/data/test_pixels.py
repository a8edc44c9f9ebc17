"""Pixels: the same wherever they are kept, and never those of a file that has changed."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from img2prompt.data import decoding, images, pixels
from img2prompt.data.fitting import fit
from img2prompt.data.images import decode
from img2prompt.data.kaggle import Kaggle
from img2prompt.data.pixels import Pixels


@pytest.fixture
def folder(tmp_path):
    """Twelve pictures; number 5 is none."""
    (tmp_path / "images").mkdir()
    chance = np.random.default_rng(0)
    for i in range(12):
        noise = chance.integers(0, 256, (40, 30 + i, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "images" / f"{i:02d}.png")
    (tmp_path / "images" / "05.png").write_bytes(b"<html>")
    (tmp_path / "prompts.csv").write_text("imgId,prompt\n" + "".join(f"{i:02d},p{i}\n" for i in range(12)))
    return tmp_path


def filled(root, **options):
    found = Pixels(Kaggle(root).find().samples, 16, "bicubic", "shortest", **options)
    done = []
    found.fill(done.append)
    assert sum(done) == 12
    return found


def test_memory_disk_and_neither_give_the_same_pixels(folder, tmp_path):
    rows = list(range(12))
    results = [
        filled(folder, **options).of(rows)
        for options in ({"keep_gib": 1.0}, {"keep_gib": -1.0}, {"folder": tmp_path / "c"}, {"folder": tmp_path / "c"})
    ]
    for good, found in results:
        assert good == [row for row in rows if row != 5]
        assert torch.equal(found, results[0][1]) and found.shape == (11, 3, 16, 16) and found.dtype == torch.uint8
    expected = fit(decode((folder / "images" / "07.png").read_bytes()), 16, "bicubic", "shortest")
    assert torch.equal(results[2][1][6], expected)


def test_the_second_time_nothing_is_decoded(folder, tmp_path, monkeypatch):
    filled(folder, folder=tmp_path / "c")
    asked = []
    monkeypatch.setattr(pixels, "decode", lambda data: asked.append(1) or decode(data))
    filled(folder, folder=tmp_path / "c")
    assert len(asked) == 1  # the one that is no image


def test_a_changed_file_and_another_size_are_decoded_anew(folder, tmp_path):
    first = filled(folder, folder=tmp_path / "c").of([3])[1]
    Image.new("RGB", (40, 40), "red").save(folder / "images" / "03.png")
    changed = filled(folder, folder=tmp_path / "c").of([3])[1]
    assert not torch.equal(first, changed) and changed[0, :, 0, 0].tolist() == [255, 0, 0]
    other = Pixels(Kaggle(folder).find().samples, 8, "bicubic", "shortest", folder=tmp_path / "c")
    other.fill(lambda count: None)
    squashed = Pixels(Kaggle(folder).find().samples, 16, "bicubic", "squash", folder=tmp_path / "c")
    squashed.fill(lambda count: None)
    assert other.of([0])[1].shape == (1, 3, 8, 8)
    assert not torch.equal(squashed.of([0])[1], filled(folder, folder=tmp_path / "c").of([0])[1])


def test_a_mended_file_is_no_longer_bad(folder, tmp_path):
    assert 5 in filled(folder, folder=tmp_path / "c").bad
    Image.new("RGB", (4, 4)).save(folder / "images" / "05.png")
    assert not filled(folder, folder=tmp_path / "c").bad


def test_a_kill_while_it_is_filled_loses_little_and_spoils_nothing(folder, tmp_path):
    for i in range(12, 600):
        shutil.copy(folder / "images" / "07.png", folder / "images" / f"{i:03d}x.png")
    rows = "".join(f"{i:03d}x,q{i}\n" for i in range(12, 600))
    (folder / "prompts.csv").write_text((folder / "prompts.csv").read_text() + rows)
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom img2prompt.data import pixels\n"
        "from img2prompt.data.kaggle import Kaggle\n"
        "pixels._STORED_AT_ONCE_BYTES = 16 * 16 * 3 * 20\n"
        "samples = Kaggle(sys.argv[1]).find().samples\n"
        "found = pixels.Pixels(samples, 16, 'bicubic', 'shortest', folder=Path(sys.argv[2]))\n"
        "print('ready', flush=True)\nfound.fill(lambda count: time.sleep(0.002))\n"
    )
    arguments = [sys.executable, "-c", program, str(folder), str(tmp_path / "c")]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE) as filling:
        assert filling.stdout is not None and filling.stdout.readline()
        time.sleep(0.4)
        filling.send_signal(signal.SIGKILL)
    kept = len(list((tmp_path / "c").rglob("*.rows")))
    assert 0 < kept < 30
    found = Pixels(Kaggle(folder).find().samples, 16, "bicubic", "shortest", folder=tmp_path / "c")
    found.fill(lambda count: None)
    plain = Pixels(Kaggle(folder).find().samples, 16, "bicubic", "shortest", keep_gib=1.0)
    plain.fill(lambda count: None)
    everything = list(range(len(found.samples)))
    assert torch.equal(found.of(everything)[1], plain.of(everything)[1])


def test_a_disk_that_is_too_small_is_named_before_anything_is_decoded(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 100})())
    with pytest.raises(ValueError, match="MiB are free; choose another cache_dir, or data.cache=none"):
        filled(folder, folder=tmp_path / "c")


def test_large_images_are_decoded_one_after_the_other(monkeypatch, tmp_path):
    for module in (images, decoding):
        monkeypatch.setattr(module, "LARGE_PIXELS", 100)
    at_once, most = 0, 0
    convert = decoding._to_rgb

    def slow(image):
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        time.sleep(0.01)
        at_once -= 1
        return convert(image)

    monkeypatch.setattr(decoding, "_to_rgb", slow)
    (tmp_path / "images").mkdir()
    for i in range(8):
        Image.new("RGB", (20, 20)).save(tmp_path / "images" / f"{i}.{'jpg' if i % 2 else 'png'}")
    (tmp_path / "prompts.csv").write_text("imgId,prompt\n" + "".join(f"{i},p{i}\n" for i in range(8)))
    found = Pixels(Kaggle(tmp_path).find().samples, 8, "bicubic", "squash", keep_gib=1.0, threads=4)
    found.fill(lambda count: None)
    assert most == 1 and not found.bad


def test_two_processes_may_fill_one_store(folder, tmp_path):
    one = Pixels(Kaggle(folder).find().samples, 16, "bicubic", "shortest", folder=tmp_path / "c")
    other = Pixels(Kaggle(folder).find().samples, 16, "bicubic", "shortest", folder=tmp_path / "c")
    one.fill(lambda count: None)
    other.fill(lambda count: None)
    assert torch.equal(one.of([0, 11])[1], other.of([0, 11])[1])
    assert os.listdir(tmp_path / "c" / "pixels") == ["16px-bicubic-shortest-v2"]


@pytest.mark.parametrize("kept", [{"keep_gib": 1.0}, {"keep_gib": -1.0}, {"folder": "c"}])
def test_an_image_with_several_captions_is_decoded_once(kept, folder, tmp_path, monkeypatch):
    samples = Kaggle(folder).find().samples
    rows = [replace(sample, id=f"{sample.id}#{i}", prompt=f"{i}") for sample in samples[4:8] for i in range(3)]
    asked = []
    monkeypatch.setattr(pixels, "decode", lambda data: asked.append(1) or decode(data))
    options = {"folder": tmp_path / "c"} if "folder" in kept else kept
    found = Pixels(rows, 16, "bicubic", "shortest", **options)
    done = []
    found.fill(done.append)
    assert len(asked) == 4 and sum(done) == 12 and sorted(found.bad) == [3, 4, 5]
    good, images = found.of([0, 2, 3, 7, 11])
    assert good == [0, 2, 7, 11] and torch.equal(images[0], images[1]) and not torch.equal(images[0], images[2])
