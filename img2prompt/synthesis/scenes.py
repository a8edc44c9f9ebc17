"""The demo's little language: a scene, the sentence that tells it, and the scene found in any sentence.

Prompts start here: `compose_prompts` makes the sentences of a data set, and the procedural drawer asks
`parse` what to draw. Held-out evaluation asks `combinations` which colour and kind a prompt brings together.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from img2prompt.synthesis.words import (
    BACKGROUNDS,
    COLOURS,
    FILLERS,
    GRADIENT,
    KINDS,
    KNOWN,
    POSITIONS,
    RELATION_WORDS,
    RELATIONS,
    SIZES,
    STYLES,
)

_TOKEN = re.compile(r"\w+|[^\w\s.,;:!?'\"()\[\]-]")


@dataclass(frozen=True)
class Thing:
    """One object: a kind, and a colour and a size where they are spoken of."""

    kind: str
    colour: str = ""
    size: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS or self.colour not in ("", *COLOURS) or self.size not in SIZES:
            raise ValueError(f"not a thing of the language: {self}")


@dataclass(frozen=True)
class Scene:
    """Up to two things, where they stand, what is behind them, how it is drawn, and the unknown words.

    `where` is a position for one thing, a relation of the first to the second for two, empty for none.
    """

    things: tuple[Thing, ...] = ()
    where: str = ""
    background: str = ""
    style: str = ""
    leftover: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        allowed: Sequence[str] = ([""], list(POSITIONS), list(RELATIONS))[min(len(self.things), 2)]
        if len(self.things) > 2 or self.where not in allowed:
            raise ValueError(f"{len(self.things)} things cannot stand {self.where!r}")
        if self.background not in BACKGROUNDS or self.style not in STYLES:
            raise ValueError(f"unknown background {self.background!r} or style {self.style!r}")
        if _unknown(_tokens(" ".join(self.leftover))) != self.leftover:
            raise ValueError("leftover words must be single lower-case words that the language does not know")


def _tokens(text: str) -> list[str]:
    return _TOKEN.findall(text.lower())


def _unknown(tokens: Sequence[str]) -> tuple[str, ...]:
    return tuple(token for token in tokens if token not in KNOWN and token not in FILLERS)


def _article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def _tell(thing: Thing) -> str:
    return _article(" ".join(word for word in (thing.size, thing.colour, thing.kind) if word))


def describe(scene: Scene) -> str:
    """The sentence for a scene; `parse` reads the same scene back out of it."""
    told = [_tell(thing) for thing in scene.things]
    if len(told) == 2:
        told.insert(1, RELATIONS[scene.where])
    elif told:
        told.append(POSITIONS[scene.where])
    told.append(BACKGROUNDS[scene.background])
    sentence = STYLES[scene.style].format(scene=" ".join(part for part in told if part))
    return ", ".join(part for part in (sentence, " ".join(scene.leftover)) if part)


def parse(text: str) -> Scene:
    """The scene that any text tells: known words count, others are kept as leftovers, nothing raises."""
    tokens = _tokens(text)
    things: list[Thing] = []
    between: list[str] = []
    spoken: dict[str, str] = {}
    found: dict[str, str] = {}
    for token in tokens:
        aspect, meant = KNOWN.get(token, ("", ""))
        if aspect == "kind":
            if len(things) < 2:
                things.append(Thing(meant, spoken.get("colour", ""), spoken.get("size", "")))
            spoken = {}
        elif aspect == "gradient":
            if "colour" in spoken:
                found.setdefault("place", f"{spoken.pop('colour')} {GRADIENT}")
        elif aspect in ("colour", "size"):
            spoken[aspect] = meant
        elif aspect == "where":
            found.setdefault("position", token if token in POSITIONS else "")
            if len(things) == 1 and token in RELATION_WORDS:
                between.append(token)
        elif aspect:
            found.setdefault(aspect, meant)
    if "colour" in spoken:
        found.setdefault("place", f"{spoken['colour']} {GRADIENT}")
    where = ""
    if len(things) == 1:
        where = found.get("position", "")
    elif len(things) == 2 and between:
        where, swapped = RELATION_WORDS[between[0]]
        things = things[::-1] if swapped else things
    return Scene(tuple(things), where, found.get("place", ""), found.get("style", ""), _unknown(tokens))


def combinations(prompt: str) -> frozenset[tuple[str, str]]:
    """The (colour, kind) pairs that a prompt names; things without a colour are in none."""
    return frozenset((thing.colour, thing.kind) for thing in parse(prompt).things if thing.colour)


# What is composed always names colours and a background, so that every aspect is asked of the reader.
_ONE = (COLOURS, KINDS, SIZES, tuple(POSITIONS), tuple(BACKGROUNDS)[1:], tuple(STYLES))
_TWO = (COLOURS, KINDS, SIZES, COLOURS, KINDS[1:], SIZES, tuple(RELATIONS)[1:], tuple(BACKGROUNDS)[1:],
        tuple(STYLES))  # fmt: skip
_ONE_COUNT = prod(map(len, _ONE))
_TWO_COUNT = prod(map(len, _TWO))


def _pick(tables: Sequence[Sequence[str]], index: int) -> list[str]:
    picked = []
    for table in tables:
        index, place = divmod(index, len(table))
        picked.append(table[place])
    return picked


def _one(index: int) -> Scene:
    colour, kind, size, where, background, style = _pick(_ONE, index)
    return Scene((Thing(kind, colour, size),), where, background, style)


def _two(index: int) -> Scene:
    colour, kind, size, colour2, kind2, size2, where, background, style = _pick(_TWO, index)
    if kind2 == kind:
        # The second table leaves the first kind out, so this slot is free for it: never the same kind twice.
        kind2 = KINDS[0]
    return Scene((Thing(kind, colour, size), Thing(kind2, colour2, size2)), where, background, style)


def compose_prompts(count: int, seed: int) -> list[str]:
    """`count` distinct prompts, half of them with one thing and half with two while both last.

    Raises ValueError where fewer than `count` prompts exist.
    """
    if not 0 <= count <= _ONE_COUNT + _TWO_COUNT:
        raise ValueError(f"cannot compose {count} distinct prompts: {_ONE_COUNT + _TWO_COUNT} exist")
    dice = random.Random(seed)
    ones = max(min(count // 2, _ONE_COUNT), count - _TWO_COUNT)
    scenes = [_one(index) for index in dice.sample(range(_ONE_COUNT), ones)]
    scenes += [_two(index) for index in dice.sample(range(_TWO_COUNT), count - ones)]
    dice.shuffle(scenes)
    return [describe(scene) for scene in scenes]
