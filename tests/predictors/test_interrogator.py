"""CLIP Interrogator: its chain against an exhaustive search, its modes, and its lists."""

import itertools
import json

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from tiny_captioners import blip
from torch.nn.functional import normalize

from img2prompt.commands.predict import predict
from img2prompt.commands.settings import compose
from img2prompt.encoders.openclip import OpenCLIP
from img2prompt.encoders.text_tower import text_features
from img2prompt.predictions import read_predictions
from img2prompt.predictors.interrogator import Interrogator, Phrases, chain, phrases_of

NAME = "clip-tiny"
CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {"layers": 2, "width": 64, "head_width": 32, "image_size": 32, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


def scores_of(seed):
    """A score for every text, without a model: by chance, and always the same."""
    known = {}

    def similar(texts):
        for text in texts:
            if text not in known:
                drawn = torch.Generator().manual_seed(seed + sum(map(ord, text)) * 7919 % 100_003)
                known[text] = float(torch.rand(1, generator=drawn))
        return torch.tensor([known[text] for text in texts])

    return similar


@pytest.mark.parametrize("seed", range(8))
def test_each_link_of_the_chain_is_the_best_of_all_that_are_left(seed):
    similar, phrases = scores_of(seed), ["red", "oil", "sky", "4k", "dark"]
    found = chain(similar, phrases, "a cat", 0, 32, lambda text: True)
    # Exhaustive: of every order of the phrases, that in which each is better than all others could be in its place.
    reached = []
    for order in itertools.permutations(phrases):
        text = "a cat"
        for place, phrase in enumerate(order):
            longer = {one: float(similar([f"{text}, {one}"])[0]) for one in order[place:]}
            if max(longer.values()) != longer[phrase] or longer[phrase] <= float(similar([text])[0]):
                break
            text = f"{text}, {phrase}"
        reached.append(text)
    assert found == max(reached, key=len)


def test_the_first_phrases_are_taken_anyway_and_the_best_on_the_way_is_kept():
    scores = {"a": 0.5, "a, x": 0.3, "a, y": 0.2, "a, x, y": 0.9, "b": 0.1}

    def similar(texts):
        return torch.tensor([scores.get(text, 0.0) for text in texts])

    assert chain(similar, ["x", "y"], "a", 0, 9, lambda text: True) == "a"
    assert chain(similar, ["x", "y"], "a", 1, 9, lambda text: True) == "a, x, y"
    assert chain(similar, ["x", "y"], "a", 1, 1, lambda text: True) == "a"
    assert chain(similar, ["x", "y"], "a", 1, 9, lambda text: False) == "a"
    assert chain(similar, ["a", "b"], "", 0, 9, lambda text: True) == "a"
    assert chain(similar, [], "", 0, 9, lambda text: True) == ""


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A tiny CLIP, and the file of its weights."""
    folder = tmp_path_factory.mktemp("clip")
    (folder / f"{NAME}.json").write_text(json.dumps(CONFIG))
    # From now on open_clip knows it by its name.
    open_clip.add_model_config(folder / f"{NAME}.json")
    torch.manual_seed(0)
    model = open_clip.create_model(NAME)
    path = folder / "clip.safetensors"
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
    encoder = OpenCLIP(NAME)
    encoder.load_pretrained(str(path))
    return encoder, encoder.text_tower(str(path)), path


WORDS = {
    "artists": ["by Ann", "by Bob"],
    "mediums": ["oil", "a photo"],
    "movements": ["pop", "dada"],
    "flavors": ["4k", "dark", "red", "soft", "wide"],
    "sites": ["flickr"],
}


def asking(clip, mode, words=WORDS, negative=()):
    encoder, tower, _ = clip

    def phrases(texts):
        if not texts:
            return Phrases([], torch.zeros(0, encoder.width))
        rows = text_features(tower, NAME, list(texts), "cpu", lambda count: None)
        return Phrases(list(texts), normalize(rows, dim=-1))

    lists = {name: phrases(texts) for name, texts in words.items()}
    return Interrogator(encoder, tower, NAME, lists, phrases(negative), mode, 3, "cpu")


def similarity(clip, image, texts):
    return normalize(text_features(clip[1], NAME, list(texts), "cpu", lambda count: None), dim=-1) @ image


@pytest.fixture
def image(clip):
    pixels = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8, generator=torch.manual_seed(3))
    return asking(clip, "fast").features(pixels)[0]


def test_each_mode_says_what_its_lists_say_of_the_image(clip, image):
    every = [phrase for words in WORDS.values() for phrase in words]
    order = similarity(clip, image, every).argsort(descending=True).tolist()
    assert asking(clip, "fast").said("a cat", image) == ", ".join(["a cat", *(every[row] for row in order[:3])])

    def best(name, count=1):
        order = similarity(clip, image, WORDS[name]).argsort(descending=True).tolist()
        return [WORDS[name][row] for row in order[:count]]

    classic = asking(clip, "classic").said("a cat", image)
    by = f"{best('mediums')[0]} {best('artists')[0]}"
    assert classic == ", ".join(["a cat", by, *best("sites"), *best("movements"), *best("flavors", 3)])
    # What is said already is not said again, and what is left out is not said.
    medium = best("mediums")[0]
    said = asking(clip, "classic").said(f"{medium} of a cat", image)
    assert said.startswith(f"{medium} of a cat {best('artists')[0]}, ") and said.count(medium) == 1
    few = {name: words for name, words in WORDS.items() if name not in ("artists", "sites")}
    assert not set(asking(clip, "classic", few).said("a cat", image).split(", ")) & {"flickr", *WORDS["artists"]}
    whole = asking(clip, "best").said("a cat", image)
    others = [classic, asking(clip, "fast").said("a cat", image), "a cat"]
    assert similarity(clip, image, [whole])[0] >= similarity(clip, image, others).max() - 1e-6
    unlike = asking(clip, "negative", negative=["blurry", "ugly"]).said("", image)
    pool = [*WORDS["flavors"], "blurry", "ugly"]
    assert set(unlike.split(", ")) <= set(pool)
    assert similarity(clip, image, [unlike])[0] <= similarity(clip, image, pool).min() + 1e-6


def test_what_is_said_is_no_longer_than_clip_reads(clip, image):
    words = {"flavors": [f"word{number} " * 12 for number in range(9)]}
    interrogator = asking(clip, "fast", words)
    interrogator.most = 9
    said = interrogator.said("a cat", image)
    assert interrogator._fits(said) and 1 < len(said.split(", ")) < 10


def test_lists_are_the_packages_or_ones_own_and_artists_and_sites_are_said_in_several_ways(tmp_path):
    assert len(phrases_of("flavors", True)) > 50_000
    assert phrases_of("sites", True)[-1] == "zbrush central contest winner"
    (tmp_path / "mine.txt").write_text("Ann\n\n Bob \n")
    artists = phrases_of("artists", str(tmp_path / "mine.txt"))
    assert artists == ["by Ann", "by Bob", "inspired by Ann", "inspired by Bob"]
    assert phrases_of("mediums", str(tmp_path / "mine.txt")) == ["Ann", "Bob"]
    (tmp_path / "empty.txt").write_text("\n")
    for name, sentence in (("empty.txt", "no phrase in it"), ("none.txt", "no such file; give one with a phrase")):
        with pytest.raises(ValueError, match=f"predictor.mediums=.*{name}: {sentence}"):
            phrases_of("mediums", str(tmp_path / name))


def test_without_the_package_its_lists_are_asked_for(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="predictor.artists=true: its words are in clip-interrogator"):
        phrases_of("artists", True)
    from img2prompt.commands.sentences import sentence_of

    said = sentence_of("predict", ImportError("its words are in clip-interrogator, which is not there"))
    assert said == "clip-interrogator is not installed; pip install 'img2prompt[interrogator]'"


@pytest.mark.parametrize("mode", ["fast", "classic", "best", "negative"])
def test_the_command_interrogates_in_every_mode(mode, clip, pictures, tmp_path):
    (tmp_path / "flavors.txt").write_text("4k\ndark\nred\n")
    lists = [f"predictor.{name}=false" for name in ("artists", "mediums", "movements", "sites")]
    own = [f"predictor.model={NAME}", f"predictor.pretrained={clip[2]}"]
    own.append(f"predictor.captioner={blip(tmp_path / 'blip')}")
    lists.append(f"predictor.flavors={tmp_path / 'flavors.txt'}")
    out = tmp_path / "p.jsonl"
    arguments = ["predictor=clip_interrogator", f"predictor.mode={mode}", *own, *lists]
    arguments += [f"images={pictures}", f"out={out}"]
    if mode in ("best", "negative"):
        arguments.append("predictor.most_phrases=2")
    # The tiny captioner has few places.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("img2prompt.predictors.interrogator._CAPTION_TOKENS", 8)
        predict(**compose("predict", [*arguments, "device=cpu"]))
    captions = read_predictions(out).columns["caption"]
    assert len(captions) == 3 and all(captions)
    if mode == "fast":
        assert all({"4k", "dark", "red"} <= set(caption.split(", ")) for caption in captions)


def test_what_cannot_be_asked_is_told_in_a_sentence(tmp_path, pictures):
    for overrides, sentence in (
        (["predictor.mode=slow"], "predictor.mode=slow: must be one of fast, classic, best, negative"),
        (["predictor.most_phrases=0"], "predictor.most_phrases must be at least 1, got 0"),
        (["predictor.pretrained=false"], "predictor.pretrained must be true or a file"),
        ([f"predictor.{name}=false" for name in WORDS], "all of artists, .* are left out"),
    ):
        settings = compose("predict", ["predictor=clip_interrogator", f"images={pictures}", "out=x.npz", *overrides])
        with pytest.raises(ValueError, match=sentence):
            predict(**settings)
