"""SD-IPC as a predictor of embeddings: known worlds, the command, and its control."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import read_csv
from hydra.errors import InstantiationException
from torch.nn import functional
from transformers import CLIPTokenizer

from img2prompt.commands import fit
from img2prompt.commands.bridge import bridge
from img2prompt.commands.settings import compose
from img2prompt.sdipc.bridge import Bridge, bridged, image_states, text_states
from img2prompt.sdipc.converter import clip_pixels, load_clip
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
    how = Bridge("sdipc", way=way, neighbours=1)
    found = bridged(how, texts, targets, images)
    cosine = functional.cosine_similarity(found, targets).mean()
    constant = functional.cosine_similarity(targets.mean(0, keepdim=True), targets).mean()
    assert cosine > 0.9 > constant + 0.5
    # With few images there is no mean of theirs, and a single one is not nothing.
    alone = bridged(how, texts, targets, images[:1])
    assert alone.isfinite().all() and torch.allclose(alone.norm(dim=1), torch.ones(1))


def test_several_neighbours_are_averaged():
    texts, targets, images = world(30)
    one, three = (bridged(Bridge("sdipc", way="nearest", neighbours=n), texts, targets, images) for n in (1, 3))
    assert not torch.allclose(one, three)
    every = bridged(Bridge("sdipc", way="nearest", neighbours=99), texts, targets, images)
    assert torch.allclose(every, functional.normalize(targets.mean(0, keepdim=True)).expand(30, -1), atol=1e-5)


def test_states_are_those_of_both_spaces(folders):
    clip = load_clip(str(folders[1]), None)
    tokenizer = CLIPTokenizer.from_pretrained(folders[1])
    prompts = ["a red cat", "sky", "word " * 99]
    states = text_states(clip, tokenizer, prompts)
    told = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        pooled = clip.text_model(told).pooler_output
        assert torch.allclose(states["T"], pooled) and torch.allclose(states["C"], clip.text_projection(pooled))
        images = [torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8)]
        pixels, projector = clip_pixels(clip, images), projector_of_clip(clip)
        found = image_states(clip, projector, iter([pixels, pixels]))
        seen = clip.vision_model(pixels).pooler_output
    assert torch.allclose(found["C"], clip.visual_projection(seen).expand(2, -1))
    assert torch.allclose(found["T"], projector(seen).expand(2, -1))


@pytest.fixture
def bank(tmp_path):
    path = tmp_path / "bank.txt"
    path.write_text(
        "".join(f"a {colour} {thing}\n" for colour in ("red", "blue", "green") for thing in ("cat", "dog", "car"))
    )
    return path


def bridge_of(folders, *overrides, **paths):
    settings = compose("fit_predictor", ["predictor=sdipc", "device=cpu", *overrides])
    bridge(**settings | {"clip": str(folders[1])} | {key: value and str(value) for key, value in paths.items()})


def test_the_command_writes_predictions_and_scores_every_way(folders, pictures, bank, tmp_path, capsys):
    (pictures / "broken.png").write_bytes(b"no")
    (tmp_path / "truth.csv").write_text("imgId,prompt\na,a red cat\nb,a blue car\n")
    given = {"prompts": bank, "images": pictures, "truth": tmp_path / "truth.csv"}
    found = {}
    for name, own in (("ridge", ()), ("near", ("predictor.way=nearest",)), ("c", ("predictor.space=C",))):
        out = tmp_path / f"{name}.parquet"
        bridge_of(folders, *own, out=out, **given)
        table = pq.read_table(out).to_pydict()
        assert table["id"] == ["a", "b", "c"]
        found[name] = np.array(table["embedding"])
        assert np.allclose(np.linalg.norm(found[name], axis=1), 1, atol=1e-3)
        said = capsys.readouterr()
        for row in ("T-space, ridge", "T-space, nearest", "C-space, ridge", "C-space, nearest", "constant mean"):
            assert row in said.out
        assert "broken.png is left out" in said.err and "bridge of 9 prompts" in said.out
    assert not np.allclose(found["ridge"], found["near"]) and not np.allclose(found["ridge"], found["c"])
    bridge_of(folders, out=tmp_path / "s.csv", **given)
    assert len(read_csv(tmp_path / "s.csv")) == 3 * 384


def test_what_cannot_be_bridged_is_told_in_a_sentence(folders, pictures, bank, tmp_path):
    given = {"prompts": bank, "images": pictures, "out": tmp_path / "x.parquet"}
    (tmp_path / "one.txt").write_text("a cat\na cat\n")
    (tmp_path / "other.csv").write_text("imgId,prompt\nz,a cat\n")
    for change, sentence in (
        ({"prompts": None}, "predictor=sdipc needs prompts="),
        ({"images": None}, "predictor=sdipc needs images="),
        ({"prompts": tmp_path / "one.txt"}, "1 distinct prompts; a bridge is fitted on many"),
        ({"truth": tmp_path / "other.csv"}, "none of its 1 imgIds with a prompt"),
        ({"out": tmp_path / "x.txt"}, "the ending must be one of"),
    ):
        with pytest.raises(ValueError, match=sentence):
            bridge_of(folders, **{**given, **change})
    with pytest.raises(InstantiationException, match="predictor.way=far: must be one of ridge, nearest"):
        bridge_of(folders, "predictor.way=far", **given)
    assert not (tmp_path / "x.parquet").exists()


def test_fit_finds_the_bridge(monkeypatch):
    asked = []
    monkeypatch.setattr("img2prompt.commands.bridge.bridge", lambda **settings: asked.append(settings["prompts"]))
    fit.main(["predictor=sdipc", "prompts=x.txt", "images=y"])
    assert asked == ["x.txt"]
