import itertools
import random

import pytest

from img2prompt.synthesis import scenes, words
from img2prompt.synthesis.scenes import Scene, Thing, combinations, compose_prompts, describe, parse

ODD_TEXTS = [
    "",
    " \n\t ",
    "🙂🙃",
    "İSTANBUL ΑΣ ß",
    "a, the; of",
    "cat " * 3000,
    "x" * 10_000,
    "zebra\0quilt",
    "\ud800",
    "red blue green",
    "left above front huge gradient",
    "star-shaped boat (red)",
]


def any_scene(dice: random.Random) -> Scene:
    number = dice.randrange(3)
    things = tuple(
        Thing(dice.choice(words.KINDS), dice.choice(["", *words.COLOURS]), dice.choice(words.SIZES))
        for _ in range(number)
    )
    where = dice.choice([[""], list(words.POSITIONS), list(words.RELATIONS)][number])
    leftover = tuple(dice.choice(["zebra", "🙂", "quilt", "42"]) for _ in range(dice.randrange(3)))
    return Scene(things, where, dice.choice(list(words.BACKGROUNDS)), dice.choice(list(words.STYLES)), leftover)


def test_every_scene_is_read_back_from_its_description():
    dice = random.Random(0)
    for _ in range(5000):
        scene = any_scene(dice)
        assert parse(describe(scene)) == scene, describe(scene)


def test_every_value_of_every_aspect_is_read_back():
    thing = Thing("star", "red")
    pairs = itertools.product(words.BACKGROUNDS, words.STYLES)
    told = [Scene((thing,), "", background, style) for background, style in pairs]
    told += [Scene((thing,), where) for where in words.POSITIONS]
    told += [Scene((thing, Thing("cat", "blue", "huge")), where) for where in words.RELATIONS]
    told += [Scene((Thing(*parts),)) for parts in itertools.product(words.KINDS, ["", *words.COLOURS], words.SIZES)]
    assert [parse(describe(scene)) for scene in told] == told
    assert len({describe(scene) for scene in told}) == len(set(told))


@pytest.mark.parametrize("text", ODD_TEXTS, ids=lambda text: repr(text[:12]))
def test_any_text_is_parsed_and_its_scene_survives_being_told(text):
    scene = parse(text)
    assert parse(describe(scene)) == scene


def test_text_without_a_known_word_is_an_empty_scene_that_keeps_the_words():
    assert parse("Zebra quilt 🙂!") == Scene(leftover=("zebra", "quilt", "🙂"))


def test_case_synonyms_and_plurals_do_not_matter():
    assert parse("TINY Red CIRCLES, watercolor") == parse("a small red ball, Watercolour")


def test_below_is_above_told_the_other_way_round():
    assert parse("a red star below a blue cat") == parse("a blue cat above a red star")


def test_a_scene_that_cannot_be_told_is_refused():
    for wrong in (
        lambda: Thing("zebra"),
        lambda: Thing("cat", "beige"),
        lambda: Scene(where="left"),
        lambda: Scene((Thing("cat"),) * 3),
        lambda: Scene((Thing("cat"),), "above"),
        lambda: Scene(style="fresco"),
        lambda: Scene(leftover=("red",)),
        lambda: Scene(leftover=("two words",)),
    ):
        with pytest.raises(ValueError):
            wrong()


def test_composed_prompts_are_distinct_and_depend_on_the_seed_alone():
    prompts = compose_prompts(20_000, 1)
    assert len(set(prompts)) == 20_000
    assert prompts == compose_prompts(20_000, 1)
    assert set(prompts[:500]) != set(compose_prompts(500, 2))


def test_composed_prompts_use_every_word_and_leave_none_over():
    told = [parse(prompt) for prompt in compose_prompts(3000, 0)]
    things = [thing for scene in told for thing in scene.things]
    assert {thing.kind for thing in things} == set(words.KINDS)
    assert {thing.colour for thing in things} == set(words.COLOURS)
    assert {thing.size for thing in things} == set(words.SIZES)
    assert {scene.style for scene in told} == set(words.STYLES)
    assert {scene.background for scene in told} == set(words.BACKGROUNDS) - {""}
    assert {scene.where for scene in told} == {*words.POSITIONS, *words.RELATIONS}
    assert not any(scene.leftover for scene in told)


def test_asking_for_more_prompts_than_exist_is_a_clear_error():
    with pytest.raises(ValueError, match="distinct prompts"):
        compose_prompts(10**12, 0)
    with pytest.raises(ValueError):
        compose_prompts(-1, 0)
    assert compose_prompts(0, 0) == []


def test_every_prompt_can_be_asked_for(monkeypatch):
    monkeypatch.setattr(scenes, "_ONE", (("red", "blue"), ("cat", "star"), ("",), ("",), ("sea",), ("",)))
    two = (
        ("red",),
        ("circle", "cat"),
        ("",),
        ("blue",),
        ("square", "cat"),
        ("",),
        ("left",),
        ("sea",),
        ("",),
    )
    monkeypatch.setattr(scenes, "_TWO", two)
    monkeypatch.setattr(scenes, "_ONE_COUNT", 4)
    monkeypatch.setattr(scenes, "_TWO_COUNT", 4)
    for count in range(9):
        assert len(set(compose_prompts(count, 0))) == count
    with pytest.raises(ValueError):
        compose_prompts(9, 0)


def test_combinations_are_the_coloured_things_named():
    prompt = "a red star above a huge blue cat on a green gradient background"
    assert combinations(prompt) == {("red", "star"), ("blue", "cat")}
    assert combinations("a cat in a meadow") == frozenset()
