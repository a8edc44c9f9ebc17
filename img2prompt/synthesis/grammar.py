"""Prompts out of word lists: a combinatorial grammar, and captions with style modifiers.

Lists are text files with a phrase a line: subjects, media, adjectives, verbs (what the subject does, or where) and
modifiers, those of `phrases/` or a folder of the user's own.
"""

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

SLOTS = ("media", "adjectives", "subjects", "verbs", "modifiers")
PHRASES = Path(__file__).parent / "phrases"
_MOST_MODIFIERS = 2


def phrases(slot: str, folder: Path | None = None) -> list[str]:
    """The distinct phrases of a list; ValueError when there is no such file, or nothing in it."""
    path = (folder or PHRASES) / f"{slot}.txt"
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        needed = ", ".join(f"{one}.txt" for one in SLOTS)
        raise ValueError(
            f"{path}: cannot be read ({type(error).__name__}); the lists are {needed}, with a phrase a line"
        ) from None
    found = list(dict.fromkeys(" ".join(line.split()) for line in lines if line.strip()))
    if not found:
        raise ValueError(f"{path}: no phrase in it")
    return found


def grammar(count: int, seed: int, folder: Path | None = None, needed: int | None = None) -> Iterator[str]:
    """`count` prompts, none twice, or at least as many as are `needed` where the lists make no more; of more prompts
    with the same seed these are the first.

    A prompt is a medium, a subject with or without an adjective, with or without a verb, and up to two modifiers.
    ValueError when the lists do not make as many.
    """
    lists = {slot: phrases(slot, folder) for slot in SLOTS}
    most = most_of(lists)
    choices = [
        lists["media"],
        ["", *lists["adjectives"]],
        lists["subjects"],
        ["", *lists["verbs"]],
        *[["", *lists["modifiers"]]] * _MOST_MODIFIERS,
    ]
    if count > most:
        raise ValueError(f"count={count}: the word lists make {most} different prompts; give longer ones")
    needed = count if needed is None else needed
    dice, seen, misses = random.Random(f"grammar {seed}"), set[str](), 0
    while len(seen) < count:
        medium, adjective, subject, verb, *styles = (one[dice.randrange(len(one))] for one in choices)
        distinct = [style for style in dict.fromkeys(styles) if style]
        sentence = _sentence(medium, adjective, subject, verb, distinct)
        if sentence not in seen:
            seen.add(sentence)
            yield sentence
        elif (misses := misses + 1) > 4 * most + 1000 and len(seen) >= needed:
            return
        elif misses > 100 * most:
            # "red" with "fox", and "red fox": phrases of several lists may say the same.
            raise ValueError(f"count={count}: the word lists make {len(seen)} different prompts; give longer ones")


def most_of(lists: Mapping[str, Sequence[str]]) -> int:
    """How many prompts the grammar makes of these phrases by slot, where no two of them say the same."""
    sizes = {slot: len(lists[slot]) for slot in SLOTS}
    # What two modifiers can say: nothing, one, or two that differ in any order.
    modifiers = 1 + sizes["modifiers"] + sizes["modifiers"] * (sizes["modifiers"] - 1)
    return sizes["media"] * (1 + sizes["adjectives"]) * sizes["subjects"] * (1 + sizes["verbs"]) * modifiers


def mixed(captions: Sequence[str], modifiers: Sequence[str], least: int, most: int, seed: int) -> Iterator[str]:
    """Each caption with `least` to `most` modifiers behind it, drawn by the hash of caption and seed; an empty one
    stays empty.
    """
    if not 0 <= least <= most <= len(modifiers):
        raise ValueError(
            f"modifiers_per_prompt=[{least}, {most}]: must be two numbers from 0 to {len(modifiers)}, the fewer first"
        )
    for caption in captions:
        dice = random.Random(f"modifiers {seed} {caption}".encode("utf-8", "surrogatepass"))
        chosen = dice.sample(modifiers, dice.randint(least, most))
        yield ", ".join([caption.strip().rstrip("."), *chosen]) if caption.strip() else ""


def _sentence(medium: str, adjective: str, subject: str, verb: str, modifiers: Sequence[str]) -> str:
    thing = " ".join(part for part in (adjective, subject) if part)
    article = "an" if re.match(r"[aeiou]", thing, re.IGNORECASE) else "a"
    return ", ".join([" ".join(part for part in (medium, article, thing, verb) if part), *modifiers])
