"""Prompts as a text encoder should read them: without networks, attention weights and stray white space."""

import re
from collections.abc import Sequence
from dataclasses import replace

from img2prompt.data.sample import Sample

# <lora:name:0.8> and its kin load a network; they are no words.
_NETWORK = re.compile(r"<(?:lora|lyco|locon|loha|hypernet|embedding)\s*:[^<>]*>", re.IGNORECASE)
# Weights are small, and follow a word: (aspect 16:9) and (John 3:16) are none.
_WEIGHT = re.compile(r"\(([^()]*)(?<!\d):\s*[+-]?(?:[0-2](?:\.\d*+)?|\.\d++)\s*\)")
# One pair of parentheses may be the author's; two and more only weigh.
_EMPHASIS = re.compile(r"(?<!\()\({2,}+([^()]*+)\){2,}")
_MOST_CHARACTERS = 20_000
_ESCAPED = (("\\(", "\ue000", "("), ("\\)", "\ue001", ")"))
_DEEPEST = 32


def clean(prompt: str) -> str:
    """The prompt without `<lora:…>`, `(word:1.2)`, `((word))`, escapes, and superfluous commas and white space."""
    if len(prompt) > _MOST_CHARACTERS:
        # No prompt; what is too long to be one is left out elsewhere.
        return " ".join(prompt.split())
    for escaped, mark, _ in _ESCAPED:
        prompt = prompt.replace(escaped, mark)
    prompt = _NETWORK.sub("", prompt)
    for _ in range(_DEEPEST):
        # From the inside out.
        before, prompt = prompt, _EMPHASIS.sub(r"\1", _WEIGHT.sub(r"\1", prompt))
        if prompt == before:
            break
    for _, mark, plain in _ESCAPED:
        prompt = prompt.replace(mark, plain)
    prompt = " ".join(prompt.split())
    return re.sub(r"\s*,(?:\s*,)*", ",", prompt).strip(" ,")


def cleaned(samples: Sequence[Sample]) -> tuple[list[Sample], list[tuple[str, str]]]:
    """The samples with clean prompts, the raw text kept where it differs; and those left without words, skipped."""
    kept: list[Sample] = []
    empty: list[tuple[str, str]] = []
    for sample in samples:
        prompt = clean(sample.prompt)
        if not prompt:
            empty.append((sample.id, "no words after cleaning"))
        else:
            kept.append(sample if prompt == sample.prompt else replace(sample, prompt=prompt, raw_prompt=sample.prompt))
    return kept, empty
