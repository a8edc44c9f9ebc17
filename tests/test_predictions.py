"""Predictions: the same whatever the batch, on disk in four formats, continued where they stopped."""

import json
import os
import weakref
from collections.abc import Sequence

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import PREDICT
from PIL import Image

import img2prompt
from img2prompt.bank import read_bank, write_bank
from img2prompt.commands import predict as command
from img2prompt.predictions import WRITERS, Parts, Prediction, joined
from img2prompt.predictors.predictor import predict_files
from img2prompt.submission import validate_submission, write_submission


def some(count=5, width=384, start=0):
    vectors = torch.nn.functional.normalize(torch.randn(count, width), dim=-1).numpy()
    ids = [f"id {start + i}" for i in range(count)]
    return Prediction(
        ids,
        vectors,
        {
            "path": [f"é/{i}.png" for i in ids],
            "nearest_prompts": [["a", "b, c"]] * count,
            "nearest_cosines": [[0.5, 0.25]] * count,
        },
        [("bad.png", "empty file")],
    )


@pytest.fixture(scope="module")
def predictor(finished_run):
    return img2prompt.load(finished_run, device="cpu")


@pytest.fixture(scope="module")
def images(pairs_folder):
    return sorted((pairs_folder / "images").iterdir())


def test_a_prediction_is_the_same_whatever_batch_size_order_and_company(predictor, images):
    base = predictor.predict(images, batch_size=40)
    for batch_size, threads in ((1, 1), (7, 4), (13, 2)):
        other = predictor.predict(images, batch_size=batch_size, threads=threads)
        assert other.ids == base.ids and np.abs(other.embeddings - base.embeddings).max() < 1e-5
    turned = predictor.predict(images[::-1], batch_size=16)
    assert turned.ids == base.ids[::-1] and np.abs(turned.embeddings[::-1] - base.embeddings).max() < 1e-5
    assert np.allclose(np.linalg.norm(base.embeddings, axis=1), 1, atol=1e-6)


def test_nearest_prompts_are_the_banks_nearest(predictor, images, finished_run):
    bank = read_bank(finished_run / "bank.parquet")
    predicted = predictor.predict(images[:3])
    similarity = torch.from_numpy(predicted.embeddings) @ bank.embeddings.T
    for i in range(3):
        best = similarity[i].argsort(descending=True)[:5].tolist()
        assert predicted.columns["nearest_prompts"][i] == [bank.prompts[row] for row in best]
        assert predicted.columns["nearest_cosines"][i] == pytest.approx(similarity[i][best].tolist(), abs=1e-5)


def test_options_of_load_take_effect(finished_run, images):
    assert "nearest_prompts" not in img2prompt.load(finished_run, "cpu", top_k=0).predict(images[:1]).columns
    assert len(img2prompt.load(finished_run, "cpu", top_k=2).predict(images[0]).columns["nearest_prompts"][0]) == 2
    full = img2prompt.load(finished_run, "cpu").predict(images)
    half = img2prompt.load(finished_run, "cpu", precision="bf16").predict(images)
    cosine = (full.embeddings * half.embeddings).sum(1)
    assert not np.array_equal(full.embeddings, half.embeddings) and cosine.min() > 0.99
    with pytest.raises(ValueError, match="precision must be one of fp32, bf16"):
        img2prompt.load(finished_run, precision="int4")
    with pytest.raises(ValueError, match="device=cuda:99: not available here; use auto, .*cpu"):
        img2prompt.load(finished_run, device="cuda:99")


def test_bad_files_are_left_out_with_their_reason_and_all_bad_is_an_error(predictor, images, tmp_path):
    (tmp_path / "text.png").write_text("hello")
    os.mkfifo(tmp_path / "pipe.png")
    predicted = predictor.predict([*images[:2], tmp_path / "text.png", tmp_path / "pipe.png", tmp_path / "gone.png"])
    assert len(predicted) == 2
    assert {os.path.basename(path): reason for path, reason in predicted.skipped} == {
        "gone.png": "no such file",
        "text.png": "not an image of a known format (PNG, JPEG, WEBP, BMP, GIF, TIFF, AVIF)",
        "pipe.png": "not a regular file",
    }
    with pytest.raises(ValueError, match="no readable image among 2 files .*text.png|pipe.png"):
        predictor.predict(tmp_path)


def test_memory_is_bounded_by_the_batch(predictor, tmp_path, monkeypatch):
    waiting, most = 0, 0
    prepare, predict_batch = predictor.prepare, predictor.predict_batch

    def counted(image):
        nonlocal waiting, most
        waiting += 1
        most = max(most, waiting)
        return prepare(image)

    def taken(ids, prepared):
        nonlocal waiting
        waiting -= len(prepared)
        return predict_batch(ids, prepared)

    monkeypatch.setattr(predictor, "prepare", counted)
    monkeypatch.setattr(predictor, "predict_batch", taken)
    for number in range(100):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
    from img2prompt.data.listing import list_images

    for _ in predict_files(predictor, list_images(tmp_path).files, batch_size=5, threads=4):
        pass
    assert 5 <= most <= 10


@pytest.mark.parametrize("ending", WRITERS)
def test_every_format_gives_back_what_went_in(ending, tmp_path):
    parts = [some(5), some(0), some(3, start=5)]
    whole = joined(parts)
    path = tmp_path / f"out{ending}"
    WRITERS[ending](path, parts)
    if ending == ".parquet":
        table = pq.read_table(path)
        assert table.schema.field("embedding").type.list_size == 384
        ids, vectors = table.column("id").to_pylist(), np.array(table.column("embedding").to_pylist(), np.float32)
        words = table.column("nearest_prompts").to_pylist()
    elif ending == ".npz":
        with np.load(path, allow_pickle=False) as file:
            ids, vectors, words = file["ids"].tolist(), file["embeddings"], file["nearest_prompts"].tolist()
    else:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        ids, words = [row["id"] for row in rows], [row["nearest_prompts"] for row in rows]
        vectors = np.array([row["embedding"] for row in rows], np.float32)
    assert ids == whole.ids and np.array_equal(vectors, whole.embeddings)
    assert words == whole.columns["nearest_prompts"]
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("ending", WRITERS)
def test_a_writer_holds_one_part_at_a_time(ending, tmp_path):
    class Counted(Sequence):
        held = most = 0

        def __len__(self):
            return 12

        def __getitem__(self, number):
            if number >= 12:
                raise IndexError
            part = some(4, start=4 * number)
            Counted.held += 1
            Counted.most = max(Counted.most, Counted.held)
            weakref.finalize(part, self.release)
            return part

        def release(self):
            Counted.held -= 1

    WRITERS[ending](tmp_path / f"out{ending}", Counted())
    assert 1 <= Counted.most <= 2


def test_a_submission_is_valid_and_exact(tmp_path):
    parts = [some(4), some(3, start=4)]
    whole = joined(parts)
    write_submission(tmp_path / "s.csv", iter(parts), whole.ids)
    validate_submission(tmp_path / "s.csv", whole.ids)
    lines = (tmp_path / "s.csv").read_text().splitlines()
    assert lines[0] == "imgId_eId,val" and len(lines) == 1 + 7 * 384
    assert np.array_equal(
        np.array([line.rpartition(",")[2] for line in lines[1:]], np.float32), whole.embeddings.ravel()
    )
    assert lines[1].startswith("id 0_0,") and lines[384].startswith("id 0_383,")


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda lines: lines[:-1], "the last with 383 values"),
        (lambda lines: lines[:385], "1 of 2 images"),
        (lambda lines: lines[:1] + lines[385:] + lines[1:385] + lines[1:2], "unexpected row|expected"),
        (lambda lines: lines[:5] + [lines[6], lines[5]] + lines[7:], "expected id 0_4"),
        (lambda lines: ["id,val", *lines[1:]], "the first line must be"),
        (lambda lines: [*lines[:3], "id 0_2,nan", *lines[4:]], "nan is not a finite number"),
    ],
)
def test_a_damaged_submission_is_refused(damage, sentence, tmp_path):
    write_submission(tmp_path / "s.csv", [some(2)], ["id 0", "id 1"])
    (tmp_path / "s.csv").write_text("\n".join(damage((tmp_path / "s.csv").read_text().splitlines())) + "\n")
    with pytest.raises(ValueError, match=sentence):
        validate_submission(tmp_path / "s.csv", ["id 0", "id 1"])


def test_a_submission_of_another_dimension_or_with_bad_values_replaces_nothing(tmp_path):
    path = tmp_path / "s.csv"
    path.write_text("old")
    bad = some(1)
    bad.embeddings[0, 3] = np.nan
    for part, sentence in ((some(2, width=768), "this checkpoint predicts 768"), (bad, "not a finite number")):
        with pytest.raises(ValueError, match=sentence):
            write_submission(path, [part], part.ids)
    with pytest.raises(ValueError, match="comes twice"):
        write_submission(path, [some(2), some(2)], ["id 0", "id 1"] * 2)
    with pytest.raises(ValueError, match="2 of 3 images"):
        write_submission(path, [some(2)], ["id 0", "id 1", "id 2"])
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["s.csv"]


def test_parts_of_another_job_are_discarded(tmp_path):
    out = tmp_path / "p.parquet"
    first = Parts(out, {"images": [1], "options": "x"}, 1)
    first.write(0, some(2))
    first.close()
    again = Parts(out, {"images": [1], "options": "x"}, 1)
    assert again.continued and again.has(0) and next(iter(again)).skipped == [("bad.png", "empty file")]
    again.close()
    other = Parts(out, {"images": [1, 2], "options": "x"}, 1)
    assert not other.continued and not other.has(0)
    assert other.discarded == 1
    other.close()


def test_an_interrupted_job_continues_and_gives_the_same_file(finished_run, pairs_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "PART_IMAGES", 8)
    images = str(pairs_folder / "images")
    command.predict(ckpt=str(finished_run), images=images, out=str(tmp_path / "whole.npz"), **PREDICT)

    calls = []

    def counted(predictor, files, *rest):
        if len(calls) == 3 and "go on" not in calls:
            raise KeyboardInterrupt
        calls.append(len(files))
        return predict_files(predictor, files, *rest)

    monkeypatch.setattr(command, "predict_files", counted)
    with pytest.raises(KeyboardInterrupt):
        command.predict(ckpt=str(finished_run), images=images, out=str(tmp_path / "halves.npz"), **PREDICT)
    assert not (tmp_path / "halves.npz").exists()
    calls.append("go on")
    command.predict(ckpt=str(finished_run), images=images, out=str(tmp_path / "halves.npz"), **PREDICT)
    assert calls == [8, 8, 8, "go on", 8, 8]
    with np.load(tmp_path / "whole.npz") as whole, np.load(tmp_path / "halves.npz") as halves:
        assert np.array_equal(whole["ids"], halves["ids"])
        assert np.abs(whole["embeddings"] - halves["embeddings"]).max() < 1e-6
    assert sorted(os.listdir(tmp_path)) == ["halves.npz", "whole.npz"]


def test_a_bank_keeps_distinct_prompts_and_is_checked(tmp_path):
    vectors = torch.nn.functional.normalize(torch.randn(3, 8), dim=-1).numpy()
    write_bank(tmp_path / "b.parquet", ["x", "y", "x"], vectors[[0, 1, 0]])
    bank = read_bank(tmp_path / "b.parquet")
    assert bank.prompts == ["x", "y"] and np.abs(bank.embeddings.numpy() - vectors[:2]).max() < 1e-3
    (tmp_path / "b.parquet").write_text("no")
    with pytest.raises(ValueError, match="not a bank of prompts"):
        read_bank(tmp_path / "b.parquet")
