"""SD-IPC as a predictor of embeddings: known worlds, the command, and its control."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import read_csv
from hydra.errors import InstantiationException
from PIL import Image
from torch.nn import functional
from transformers import CLIPTokenizer

from img2prompt.commands import fit
from img2prompt.commands.predict import predict
from img2prompt.commands.settings import compose
from img2prompt.predictions import read_predictions
from img2prompt.sdipc.bridge import Bridge, images_in, text_states, texts_in
from img2prompt.sdipc.converter import load_clip, normalised, square_for
from img2prompt.sdipc.projector import projector_of_clip


def world(count=200, seed=0):
    """Texts, their embeddings, and images of the same things, which lie elsewhere."""
    drawn = torch.Generator().manual_seed(seed)
    texts = functional.normalize(torch.randn(count, 12, generator=drawn), dim=1)
    targets = functional.normalize(texts @ torch.randn(12, 8, generator=drawn), dim=1)
    gap = functional.normalize(torch.randn(12, generator=drawn), dim=0)
    return texts, targets, 27.5 * functional.normalize(texts + gap, dim=1)


@pytest.mark.parametrize("way", ["ridge", "nearest"])
def test_images_are_told_from_texts_alone_across_the_gap(way):
    texts, targets, images = world()
    found = Bridge(way, 1, texts, targets, images)(images)
    cosine = functional.cosine_similarity(found, targets).mean()
    constant = functional.cosine_similarity(targets.mean(0, keepdim=True), targets).mean()
    assert cosine > 0.9 > constant + 0.5
    # Without the mean of some images, a single one is not nothing.
    alone = Bridge(way, 1, texts, targets, None)(images[:1])
    assert alone.isfinite().all() and torch.allclose(alone.norm(dim=1), torch.ones(1))


def test_an_image_is_told_alike_whichever_others_are_with_it():
    texts, targets, images = world()
    for way in ("ridge", "nearest"):
        bridge = Bridge(way, 3, texts, targets, images[:50])
        assert torch.allclose(bridge(images)[60:61], bridge(images[60:61]), atol=1e-6)


def test_several_neighbours_are_averaged():
    texts, targets, images = world(30)
    one, three = (Bridge("nearest", n, texts, targets, images)(images) for n in (1, 3))
    assert not torch.allclose(one, three)
    every = Bridge("nearest", 99, texts, targets, images)(images)
    assert torch.allclose(every, functional.normalize(targets.mean(0, keepdim=True)).expand(30, -1), atol=1e-5)


def test_states_are_those_of_both_spaces(folders):
    clip = load_clip(str(folders[1]))
    tokenizer = CLIPTokenizer.from_pretrained(folders[1])
    prompts = ["a red cat", "sky", "word " * 99]
    states = text_states(clip, tokenizer, prompts)
    told = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    images = [torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8)]
    pixels, projector = normalised(torch.stack([square_for(clip, one) for one in images])), projector_of_clip(clip)
    with torch.no_grad():
        pooled, seen = clip.text_model(told).pooler_output, clip.vision_model(pixels).pooler_output
        assert torch.allclose(texts_in("T", clip, states), pooled)
        assert torch.allclose(texts_in("C", clip, states), clip.text_projection(pooled))
        assert torch.allclose(images_in("C", clip, projector, pixels), clip.visual_projection(seen))
        assert torch.allclose(images_in("T", clip, projector, pixels), projector(seen))


@pytest.fixture
def bank(tmp_path):
    path = tmp_path / "bank.txt"
    path.write_text(
        "".join(f"a {colour} {thing}\n" for colour in ("red", "blue", "green") for thing in ("cat", "dog", "car"))
    )
    return path


def predicted(folders, out, *overrides, **paths):
    settings = compose("predict", ["predictor=sdipc", "device=cpu", "images=x", f"out={out}", *overrides])
    settings["predictor"] |= {"clip": str(folders[1]), "bank": paths.pop("bank")}
    predict(**settings | {key: value and str(value) for key, value in paths.items()})


def test_the_command_writes_predictions_and_scores_every_way(folders, pictures, bank, tmp_path, capsys):
    (pictures / "broken.png").write_bytes(b"no")
    (tmp_path / "truth.csv").write_text("imgId,prompt\na,a red cat\nb,a yellow car\n")
    given = {"bank": str(bank), "images": pictures, "prompts": tmp_path / "truth.csv"}
    found = {}
    for name, own in (("ridge", ()), ("near", ("predictor.way=nearest",)), ("c", ("predictor.space=C",))):
        out = tmp_path / f"{name}.parquet"
        predicted(folders, out, *own, **given)
        table = pq.read_table(out).to_pydict()
        assert table["id"] == ["a", "b", "c"] and len(table["nearest_prompts"][0]) == 5
        found[name] = np.array(table["embedding"])
        assert np.allclose(np.linalg.norm(found[name], axis=1), 1, atol=1e-3)
        said = capsys.readouterr()
        assert "mean cosine" in said.out and "constant mean of the bank" in said.out
        others = {"T-space, ridge", "T-space, nearest", "C-space, ridge", "C-space, nearest"}
        assert sum(f"beside it, {one}: " in said.out for one in others) == 3
        assert "1 of these images have a prompt of the bank: their scores are too good" in said.err
        assert "broken.png" in said.err and "4 images are not centred: 20 are the least" in said.err
    assert not np.allclose(found["ridge"], found["near"]) and not np.allclose(found["ridge"], found["c"])
    predicted(folders, tmp_path / "s.csv", **given)
    assert len(read_csv(tmp_path / "s.csv")) == 4 * 384


def test_the_mean_of_many_images_is_taken_away_and_blank_prompts_are_none(folders, pictures, bank, tmp_path, capsys):
    drawn = np.random.default_rng(0)
    for number in range(19):
        Image.fromarray(drawn.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(pictures / f"n{number}.png")
    both = []
    for images in (sorted(pictures.glob("[abc].png")), pictures):
        given = [str(one) for one in images] if isinstance(images, list) else str(images)
        settings = compose("predict", ["predictor=sdipc", "device=cpu", "images=x", f"out={tmp_path}/o.npz"])
        settings["predictor"] |= {"clip": str(folders[1]), "bank": str(bank)}
        predict(**settings | {"images": given})
        both.append(read_predictions(tmp_path / "o.npz").embeddings[:3])
    assert not np.allclose(*both, atol=1e-3)
    bank.write_text(bank.read_text() + "\n  \n a red cat \n")
    predicted(folders, tmp_path / "again.npz", bank=str(bank), images=pictures)
    assert np.allclose(read_predictions(tmp_path / "again.npz").embeddings[:3], both[1], atol=1e-5)


def test_what_cannot_be_bridged_is_told_in_a_sentence(folders, pictures, bank, tmp_path):
    given = {"bank": str(bank), "images": pictures}
    (tmp_path / "one.txt").write_text("a cat\na cat\n")
    (tmp_path / "other.csv").write_text("imgId,prompt\nz,a cat\n")
    for overrides, change, sentence in (
        ((), {"bank": None}, "predictor.bank must be given"),
        ((), {"bank": str(tmp_path / "one.txt")}, "predictor.bank=.*one.txt: 1 distinct prompts"),
        ((), {"bank": str(tmp_path / "none.txt")}, "predictor.bank=.*none.txt: no such file"),
        ((), {"prompts": tmp_path / "other.csv"}, "none of its 1 imgIds with a prompt"),
        ((), {"ckpt": "runs/x"}, "ckpt=runs/x is of predictor=trained; predictor=sdipc has none"),
        (("predictor.way=far",), {}, "predictor.way=far: must be one of ridge, nearest"),
        (("predictor.space=Q",), {}, "predictor.space=Q: must be one of T, C"),
        (("predictor.neighbours=0",), {}, "predictor.neighbours must be at least 1, got 0"),
    ):
        with pytest.raises((ValueError, InstantiationException), match=sentence):
            predicted(folders, tmp_path / "x.parquet", *overrides, **{**given, **change})
    assert not (tmp_path / "x.parquet").exists()


def test_fit_and_predict_know_each_others_predictors(tmp_path):
    with pytest.raises(ValueError, match="predictor=sdipc: there is nothing to fit; python predict.py predictor=sdipc"):
        fit.main(["predictor=sdipc", "images=y"])
    with pytest.raises(ValueError, match="predictor=sdipc_ft: img2prompt fit tunes it, and img2prompt vary uses it"):
        predict(**compose("predict", ["predictor=sdipc_ft", "images=y"]))
