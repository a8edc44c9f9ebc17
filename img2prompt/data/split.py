"""Which rows validate: decided from what a row says, never from where it stands in the table."""

import hashlib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Hashable, Sequence

import numpy as np

from img2prompt.data.sample import Sample


def split(samples: Sequence[Sample], fraction: float, seed: int) -> np.ndarray:
    """A mask, bool [N], of the rows that validate: about `fraction` of them, the same for the same seed.

    Neither prompts nor images cross: all images of a prompt and all captions of an image are on one side. Where samples
    say what they combine, whole combinations are held out, and every row that names one of them validates. ValueError
    when a side would be empty.
    """
    if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction < 1:
        raise ValueError(f"data.val must be a fraction between 0 and 1, got {fraction}")
    members: dict[Hashable, list[int]] = defaultdict(list)
    groups = _groups(samples)
    for row, sample in enumerate(samples):
        for key in sample.combinations or (groups[row],):
            members[key].append(row)
    wanted = max(1, round(fraction * len(samples)))
    validates = np.zeros(len(samples), dtype=bool)
    count = 0
    for held in sorted(members, key=lambda key: _hash(key, seed)):
        if count >= wanted:
            break
        count += int((~validates[members[held]]).sum())
        validates[members[held]] = True
    if count in (0, len(samples)):
        raise ValueError(
            f"{len(samples)} images of {len(members)} distinct prompts or combinations cannot be split: training and "
            "validation need one each"
        )
    return validates


def _groups(samples: Sequence[Sample]) -> list[str]:
    """For each row the key of its group: rows that share a prompt or an image, directly or through others."""
    parent: dict[Hashable, Hashable] = {}

    def root(key: Hashable) -> Hashable:
        parent.setdefault(key, key)
        while parent[key] != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    keys = [prompt_key(sample.prompt) for sample in samples]
    for key, sample in zip(keys, samples, strict=True):
        parent[root((id(sample.source), sample.location))] = root(key)
    # A group is called after one of its prompts, whatever the order of its rows.
    names: dict[Hashable, str] = {}
    for key in keys:
        names[root(key)] = min(key, names.get(root(key), key))
    return [names[root(key)] for key in keys]


def prompt_key(prompt: str) -> str:
    """Equal for prompts that an uncased text encoder cannot tell apart: by case, accents, invisible characters, and
    white space, also around punctuation.
    """
    plain = (
        character
        for character in unicodedata.normalize("NFKD", prompt.casefold())
        if character.isspace() or unicodedata.category(character) not in ("Mn", "Cc", "Cf")
    )
    return " ".join(re.findall(r"\w+|[^\w\s]", "".join(plain)))


def prompt_numbers(prompts: Sequence[str]) -> np.ndarray:
    """One number per distinct prompt, int64 [N], in the order of their hashes: no row order can change it."""
    keys = [prompt_key(prompt) for prompt in prompts]
    numbers = {key: i for i, key in enumerate(sorted(set(keys), key=lambda key: _hash(key, 0)))}
    return np.array([numbers[key] for key in keys], dtype=np.int64)


def _hash(key: Hashable, seed: int) -> bytes:
    return hashlib.blake2b(f"{seed}\0{key}".encode(), digest_size=16).digest()
