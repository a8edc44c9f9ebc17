"""Which prompts are one prompt: the key that every decision about prompts goes by."""

import hashlib
import re
import unicodedata
from collections.abc import Hashable, Sequence

import numpy as np

# Also leftmost, left-handed, rightwards; not bright or copyright.
_SIDES = re.compile(r"\b(?:left|right)", re.IGNORECASE)


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
    keys = {prompt: prompt_key(prompt) for prompt in set(prompts)}
    numbers = {key: i for i, key in enumerate(sorted(set(keys.values()), key=lambda key: hash_of(key, 0)))}
    return np.array([numbers[keys[prompt]] for prompt in prompts], dtype=np.int64)


def may_be_mirrored(prompt: str) -> bool:
    """Whether a mirrored image still shows what the prompt says: not if it speaks of left or right."""
    return not _SIDES.search(prompt)


def hash_of(key: Hashable, seed: int) -> bytes:
    """A hash that no process, machine or row order changes."""
    return hashlib.blake2b(f"{seed}\0{key}".encode("utf-8", "surrogatepass"), digest_size=16).digest()
