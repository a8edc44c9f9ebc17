"""Rows that are left out for what their prompt is: too long for the text encoder of the generator, too short, in
another language.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from img2prompt.data.sample import Sample

Dropped = list[tuple[str, str]]  # (id, reason)


def well_formed(samples: Sequence[Sample]) -> tuple[list[Sample], Dropped]:
    """Leaves out prompts that no text file and no tokenizer can hold: half of a surrogate pair, from damaged JSON."""
    return _filtered(samples, lambda prompt: prompt.isprintable() or _is_unicode(prompt), "text that is no Unicode")


def too_long_for_clip(samples: Sequence[Sample], most_tokens: int) -> tuple[list[Sample], Dropped]:
    """Leaves out prompts of more CLIP tokens than `most_tokens`, begin and end included: Stable Diffusion has cut them
    off, so the image does not show all of its prompt.
    """
    if most_tokens < 3:
        raise ValueError(f"data.max_clip_tokens must be at least 3 (begin, a word, end), or null; got {most_tokens}")
    return _filtered(
        samples,
        # A token is at least one byte, and its package takes seconds to import.
        lambda prompt: len(prompt.encode("utf-8", "replace")) + 2 <= most_tokens or _clip_tokens(prompt) <= most_tokens,
        f"more than {most_tokens} CLIP tokens",
    )


def of_length(
    samples: Sequence[Sample], least_words: int | None, most_words: int | None
) -> tuple[list[Sample], Dropped]:
    """Leaves out prompts of fewer or more words; None is no limit."""
    least, most = least_words or 0, most_words if most_words is not None else 10**9
    if least > most:
        raise ValueError(f"data.min_words={least_words} is more than data.max_words={most_words}: nothing is left")
    return _filtered(
        samples,
        lambda prompt: least <= len(prompt.split()) <= most,
        f"not of {least} to {most if most_words is not None else 'any number of'} words",
    )


def in_languages(samples: Sequence[Sample], languages: Sequence[str]) -> tuple[list[Sample], Dropped]:
    """Leaves out prompts whose language (ISO 639-1) is not one of `languages`; needs img2prompt[language]."""
    # An extra, and only this option needs it.
    from img2prompt.data.language import LANGUAGES, may_be_in

    if not languages or set(languages) - set(LANGUAGES):
        raise ValueError(f"data.languages={list(languages)}: must be some of {', '.join(LANGUAGES)}, or null")
    return _filtered(samples, lambda prompt: may_be_in(prompt, languages), f"not in {' or '.join(languages)}")


def _filtered(samples: Sequence[Sample], keeps: Callable[[str], bool], reason: str) -> tuple[list[Sample], Dropped]:
    answers = {prompt: keeps(prompt) for prompt in {sample.prompt for sample in samples}}
    kept = [sample for sample in samples if answers[sample.prompt]]
    return kept, [(sample.id, reason) for sample in samples if not answers[sample.prompt]]


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _clip_tokens(prompt: str) -> int:
    return len(_clip_tokenizer().encode(prompt)) + 2


@cache
def _clip_tokenizer() -> Any:
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()
