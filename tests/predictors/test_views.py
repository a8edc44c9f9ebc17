"""Test-time views: which they are, and that their mean is the prediction."""

import numpy as np
import pytest
import torch
from conftest import PREDICT

import img2prompt
from img2prompt.commands.predict import predict
from img2prompt.data.images import decode
from img2prompt.predictions import read_predictions
from img2prompt.predictors.views import Views, views_of


def test_views_are_the_whole_its_parts_and_their_mirror_images():
    image = torch.arange(3 * 16 * 24, dtype=torch.int64).reshape(3, 16, 24).to(torch.uint8)
    assert [torch.equal(one, image) for one in views_of(image, [])] == [True]
    whole, mirrored = views_of(image, ["flip"])
    assert torch.equal(whole, image) and torch.equal(mirrored, image.flip(-1))
    crops = views_of(image, ["crops"])[1:]
    assert [tuple(one.shape) for one in crops] == [(3, 14, 21)] * 5
    corners = ([0, 0], [0, 3], [2, 0], [2, 3], [1, 2])
    for crop, (top, left) in zip(crops, corners, strict=True):
        assert torch.equal(crop, image[:, top : top + 14, left : left + 21])
    (larger,) = views_of(image, ["sizes"])[1:]
    assert torch.equal(larger, image[:, 2:14, 3:21])
    assert len(views_of(image, ["sizes", "flip", "crops"])) == 14
    assert all(min(one.shape) >= 1 for one in views_of(image[:, :1, :1], ["crops", "sizes", "flip"]))


def test_the_prediction_is_the_mean_of_what_the_views_say(finished_run, pairs_folder):
    plain = img2prompt.load(finished_run / "checkpoints" / "finetune.safetensors", "cpu")
    files = sorted((pairs_folder / "images").iterdir())[:3]
    found = Views(plain, ["flip", "sizes"], 5).predict(files)
    for row, path in enumerate(files):
        said = [
            plain.predict_batch(["x"], [plain.prepare(view)]).embeddings[0]
            for view in views_of(decode(path.read_bytes()), ["flip", "sizes"])
        ]
        assert len(said) == 4
        mean = np.mean(said, axis=0)
        mean /= np.linalg.norm(mean)
        assert np.allclose(found.embeddings[row], mean, atol=1e-5)
        assert found.columns["agreement"][row] == pytest.approx(np.mean(np.stack(said) @ mean), abs=1e-5)
        prompts, cosines = plain.bank.nearest(torch.from_numpy(mean[None]), 5)
        assert found.columns["nearest_prompts"][row] == prompts[0]
        assert np.allclose(found.columns["nearest_cosines"][row], cosines[0], atol=1e-4)


def test_the_command_writes_views_and_scores_the_whole_beside_them(finished_run, pairs_folder, tmp_path, capsys):
    images = str(pairs_folder / "images")
    options = PREDICT | {"prompts": str(pairs_folder / "prompts.csv")}
    tuned = str(finished_run / "checkpoints" / "finetune.safetensors")
    predict(tuned, images, str(tmp_path / "p.parquet"), **options, views=["crops"])
    told = capsys.readouterr().out
    assert "beside it, the whole image alone: " in told
    with_views = read_predictions(tmp_path / "p.parquet")
    predict(tuned, images, str(tmp_path / "q.jsonl"), **PREDICT)
    alone = read_predictions(tmp_path / "q.jsonl")
    assert not np.allclose(with_views.embeddings, alone.embeddings, atol=1e-3) and "agreement" not in alone.columns
    assert all(0 < one <= 1.001 for one in with_views.columns["agreement"])


def test_the_mean_rung_which_sees_a_single_pixel_takes_views_too(finished_run, pairs_folder, tmp_path):
    mean = str(finished_run / "checkpoints" / "mean.safetensors")
    predict(mean, str(pairs_folder / "images"), str(tmp_path / "m.npz"), **PREDICT, views=["flip", "crops", "sizes"])
    assert np.allclose(read_predictions(tmp_path / "m.npz").columns["agreement"], 1, atol=1e-5)
