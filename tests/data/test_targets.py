"""Targets: the host's own numbers, and where the text encoder comes from."""

import os
from dataclasses import replace

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from img2prompt.data import targets
from img2prompt.data.targets import DEFAULT_MODEL, TextEncoder, embeddings_of, locate

# The competition host's seven prompts, with values 0, 1, 191 and 383 of their targets.
HOST = {
    "hyper realistic photo of very friendly and dystopian crater": (
        0.018848453,
        0.030189732,
        -0.004015928,
        -0.007934112,
    ),
    "ramen carved out of fractal rose ebony, in the style of hudson river school": (
        0.017384542,
        0.066554956,
        0.02839456,
        0.044727568,
    ),
    "ultrasaurus holding a black bean taco in the woods, near an identical cheneosaurus": (
        0.015788445,
        -0.0021564967,
        -0.04651371,
        0.019659394,
    ),
    "a thundering retro robot crane inks on parchment with a droopy french bulldog": (
        -0.06900077,
        -0.020637989,
        0.010717459,
        -0.01603453,
    ),
    "portrait painting of a shimmering greek hero, next to a loud frill-necked lizard": (
        -0.05908369,
        0.038226124,
        -0.052713197,
        -0.031364206,
    ),
    "an astronaut standing on a engaging white rose, in the midst of by ivory cherry blossoms": (
        0.025009584,
        0.092583984,
        0.045283183,
        0.06208586,
    ),
    "Kaggle employee Phil at a donut shop ordering all the best donuts, with a speech bubble that proclaims "
    "\"Donuts. It's what's for dinner!\"": (-0.057937235, 0.085995644, -0.059408605, 0.023763636),
}


@pytest.fixture(scope="module")
def minilm():
    return TextEncoder(locate())


def test_the_targets_are_the_hosts(minilm):
    embeddings = minilm.embed(list(HOST))
    assert minilm.dimension == 384
    assert np.abs(embeddings[:, [0, 1, 191, 383]] - np.array(list(HOST.values()))).max() < 1e-6
    assert np.allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-6)


def test_equal_prompts_are_embedded_once_and_in_their_place(minilm, monkeypatch):
    asked = []
    encode = minilm._encode
    monkeypatch.setattr(minilm, "_encode", lambda prompts: asked.extend(prompts) or encode(prompts))
    embeddings = minilm.embed(["cat", "dog", "cat"])
    assert sorted(asked) == ["cat", "dog"]
    assert np.array_equal(embeddings[0], embeddings[2]) and not np.array_equal(embeddings[0], embeddings[1])


PROMPTS = [
    f"{'very ' * (i % 23)}small picture of {thing}, number {i}" for i in range(60) for thing in ("a cat", "rain")
]


def test_batches_by_length_give_what_one_at_a_time_gives(minilm):
    one_at_a_time = np.concatenate([minilm.embed([prompt]) for prompt in PROMPTS[:40]])
    assert np.abs(minilm.embed(PROMPTS)[:40] - one_at_a_time).max() < 1e-6


def test_bf16_is_close_and_another_store(minilm, tmp_path):
    precise = embeddings_of(PROMPTS, locate(), "fp32", "cpu", tmp_path)
    rough = embeddings_of(PROMPTS, locate(), "bf16", "cpu", tmp_path)
    assert np.abs(precise - minilm.embed(PROMPTS)).max() < 1e-6
    assert 0.9999 <= (precise * rough).sum(1).min() and np.abs(precise - rough).max() > 1e-5
    assert np.allclose(np.linalg.norm(rough, axis=1), 1, atol=1e-6)
    assert len(list((tmp_path / "targets").iterdir())) == 2
    with pytest.raises(ValueError, match=r"target\.precision=fp16: must be fp32 or bf16"):
        TextEncoder(locate(), precision="fp16")


def test_a_stored_embedding_is_the_computed_one_and_needs_no_encoder(tmp_path, monkeypatch):
    done = []
    first = embeddings_of(PROMPTS[:50], locate(), "fp32", "cpu", tmp_path, done.append)
    assert sum(done) == 50
    more = embeddings_of(PROMPTS, locate(), "fp32", "cpu", tmp_path)

    def refuse(*arguments):
        raise AssertionError("the encoder is loaded though everything is stored")

    monkeypatch.setattr(targets, "TextEncoder", refuse)
    again = embeddings_of(PROMPTS[::-1], locate(), "fp32", "cpu", tmp_path)
    assert np.array_equal(again[::-1], more) and np.array_equal(more[:50], first)


def test_another_text_or_encoder_never_hits_a_stored_row(tmp_path, minilm):
    embeddings_of(["a cat"], locate(), "fp32", "cpu", tmp_path)
    texts = ["a cat ", "A cat", "a  cat", "a cat\n"]
    fresh = minilm.embed(texts)
    assert np.abs(embeddings_of(texts, locate(), "fp32", "cpu", tmp_path) - fresh).max() < 1e-6
    # A folder whose weights change in place, under the same name, of the same size and age.
    folder = tmp_path / "model"
    minilm._encoder.save(str(folder))
    weights = folder / "model.safetensors"
    first = embeddings_of(["a cat"], locate(str(folder)), "fp32", "cpu", tmp_path)
    status, data = weights.stat(), bytearray(weights.read_bytes())
    middle = len(data) // 8 * 4
    for place in range(middle, middle + 4_000_000, 4):
        data[place + 2] ^= 0x1F
    weights.write_bytes(data)
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    changed = embeddings_of(["a cat"], locate(str(folder)), "fp32", "cpu", tmp_path)
    assert np.abs(first - changed).max() > 1e-4


def test_a_row_that_the_disk_has_damaged_is_computed_again(tmp_path):
    first = embeddings_of(PROMPTS[:5], locate(), "fp32", "cpu", tmp_path)
    segment = next(tmp_path.rglob("*.rows"))
    data = bytearray(segment.read_bytes())
    data[5 * 16 : 5 * 16 + 384 * 4] = bytes(384 * 4)
    segment.write_bytes(data)
    assert np.abs(embeddings_of(PROMPTS[:5], locate(), "fp32", "cpu", tmp_path) - first).max() < 1e-6


def test_a_folder_is_taken_as_it_is_and_its_dimension_found(tmp_path, minilm):
    minilm._encoder.save(str(tmp_path / "copy"))
    found = locate(str(tmp_path / "copy"))
    assert found.download is None and TextEncoder(found).dimension == 384


def test_the_default_needs_no_network_and_other_names_say_what_they_would_fetch():
    assert locate(DEFAULT_MODEL).download is None and locate("all-MiniLM-L6-v2").name == DEFAULT_MODEL
    other = locate("somebody/other-model")
    assert other.download is not None and other.download.repository == "somebody/other-model"


def test_weights_that_are_not_the_genuine_ones_are_not_used(monkeypatch):
    monkeypatch.setattr(targets, "_PACKAGE_SHA256", "0" * 64)
    found = locate(DEFAULT_MODEL)
    assert found.download is not None
    with pytest.raises(ValueError, match="not found as a folder .*the Hub's cache, the package .*not the genuine"):
        TextEncoder(found)


def test_a_folder_that_is_no_model_and_a_path_that_is_not_there_are_named(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        locate(str(tmp_path / "none"))
    with pytest.raises(ValueError, match="is no sentence-transformers model"):
        TextEncoder(locate(str(tmp_path)))


def test_an_interrupted_download_is_not_taken_for_the_model(tmp_path, monkeypatch):
    (tmp_path / "modules.json").write_text("[]")
    monkeypatch.setattr(targets, "snapshot_download", lambda *args, **options: str(tmp_path))
    assert locate(DEFAULT_MODEL).location != str(tmp_path) and locate("somebody/model").download is not None
    (tmp_path / "model.safetensors").write_bytes(b"x")
    assert locate("somebody/model").location == str(tmp_path)


def test_a_plain_transformer_is_found_in_the_hubs_cache_and_models_share_no_store(tmp_path, monkeypatch, minilm):
    for name, change in (("a", 0), ("b", 1)):
        minilm._encoder[0].model.save_pretrained(tmp_path / name)
        minilm._encoder.tokenizer.save_pretrained(tmp_path / name)
        weights = load_file(tmp_path / name / "model.safetensors")
        first = next(iter(weights))
        weights[first] = weights[first] + change
        save_file(weights, tmp_path / name / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr(targets, "snapshot_download", lambda name, **options: str(tmp_path / name[-1]))
    found = [locate(f"somebody/{name}") for name in ("a", "b")]
    assert all(one.download is None for one in found)
    one, other = (embeddings_of(["a cat"], model, "fp32", "cpu", tmp_path / "cache") for model in found)
    assert np.abs(one - other).max() > 1e-4
    # Where a model's files are not known, nothing is stored.
    assert targets._store(tmp_path / "cache", replace(found[0], location="somebody/gone"), "fp32", 384) is None


def test_the_size_of_a_download_is_that_of_all_its_shards():
    from img2prompt.hub import _size_of_download

    sizes = {"model-00001-of-00002.safetensors": 5, "model-00002-of-00002.safetensors": 7, "pytorch_model.bin": 12}
    assert _size_of_download(sizes, "model.safetensors") == 12
    assert _size_of_download({"a.safetensors": 3, "b.bin": 9}, None) == 3
    assert _size_of_download({"w.bin": 9, "w.safetensors": 8}, "w.bin") == 9
