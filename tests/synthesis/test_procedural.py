from itertools import combinations

import numpy as np
import pytest

from img2prompt.synthesis import words
from img2prompt.synthesis.generator import Generator
from img2prompt.synthesis.procedural import Procedural, draw
from img2prompt.synthesis.scenes import Scene, Thing, compose_prompts

SIZE = 64


def assert_all_differ(told: list[Scene], least: float) -> None:
    """Any two scenes, drawn three times with the same dice, differ by more than `least` of 255 a channel."""
    drawn = [np.array([draw(scene, f"dice {throw}", SIZE) for throw in range(3)], float) for scene in told]
    for one, other in combinations(range(len(told)), 2):
        assert np.abs(drawn[one] - drawn[other]).mean() > least, (told[one], told[other])


def test_procedural_is_a_generator():
    assert isinstance(Procedural(), Generator)


def test_same_prompt_and_seed_give_the_same_pixels_in_any_batch():
    prompts = compose_prompts(12, 0) + ["", "zebra quilt"]
    seeds = list(range(len(prompts)))
    together = Procedural(SIZE).generate(prompts, seeds)
    backwards = Procedural(SIZE).generate(prompts[::-1], seeds[::-1])[::-1]
    alone = [Procedural(SIZE).generate([prompt], [seed])[0] for prompt, seed in zip(prompts, seeds, strict=True)]
    assert np.array_equal(together, backwards)
    assert np.array_equal(together, np.array(alone))


def test_another_seed_gives_another_picture_of_the_same_prompt():
    for prompt in compose_prompts(20, 1):
        one, other = Procedural(SIZE).generate([prompt] * 2, [0, 1]).astype(float)
        assert np.abs(one - other).mean() > 0.5, prompt


@pytest.mark.parametrize("size_px", [8, 48, 64, 97, 128])
def test_pictures_are_uint8_of_the_size_asked_for(size_px):
    pictures = Procedural(size_px).generate(compose_prompts(8, 0), range(8))
    assert pictures.shape == (8, size_px, size_px, 3)
    assert pictures.dtype == np.uint8


def test_no_prompts_give_no_pictures():
    assert Procedural(SIZE).generate([], []).shape == (0, SIZE, SIZE, 3)


def test_a_seed_missing_is_an_error():
    with pytest.raises(ValueError):
        Procedural(SIZE).generate(["a cat", "a star"], [0])


def test_every_kind_changes_the_picture():
    assert_all_differ([Scene((Thing(kind, "red"),)) for kind in words.KINDS], 1.0)


@pytest.mark.parametrize("style", words.STYLES)
def test_every_colour_changes_the_picture_in_every_style(style):
    assert_all_differ([Scene((Thing("star", colour),), style=style) for colour in ("", *words.COLOURS)], 0.5)


@pytest.mark.parametrize("style", words.STYLES)
def test_every_size_and_position_changes_the_picture_in_every_style(style):
    assert_all_differ([Scene((Thing("star", "red", size),), style=style) for size in words.SIZES], 2.0)
    assert_all_differ([Scene((Thing("star", "red"),), where, style=style) for where in words.POSITIONS], 2.0)


def test_every_relation_changes_the_picture():
    things = (Thing("star", "red"), Thing("cat", "blue"))
    assert_all_differ([Scene(things, where) for where in words.RELATIONS], 2.0)


@pytest.mark.parametrize("style", words.STYLES)
def test_every_background_changes_the_picture_in_every_style(style):
    assert_all_differ([Scene(background=background, style=style) for background in words.BACKGROUNDS], 1.0)


def test_every_style_changes_the_picture():
    things = (Thing("house", "purple"),)
    assert_all_differ([Scene(things, "", "meadow", style) for style in words.STYLES], 5.0)


def test_a_colour_is_drawn_as_its_name_says():
    channels = {"red": 0, "green": 1, "blue": 2}
    for colour, channel in channels.items():
        for seed in range(5):
            picture = draw(Scene((Thing("circle", colour, "huge"),)), f"dice {seed}", SIZE)
            assert picture[SIZE // 2, SIZE // 2].argmax() == channel, colour


@pytest.mark.parametrize("text", ["", "🙂", "zebra quilt", "\0", "\ud800", "x" * 10_000, "cat " * 2500])
def test_any_text_is_drawn(text):
    pictures = Procedural(SIZE).generate([text, text], [0, 1])
    assert pictures.std() > 0


def test_unknown_words_become_a_texture_of_their_own():
    one, other, empty = Procedural(SIZE).generate(["zebra", "quilt", ""], [0, 0, 0]).astype(float)
    assert np.abs(one - other).mean() > 10
    assert np.abs(one - empty).mean() > 10


def test_a_picture_too_small_to_draw_is_refused():
    with pytest.raises(ValueError, match="image_size_px"):
        Procedural(4)
