"""Words for an embedding: a prompt that is composed of the phrases of a bank until its embedding is near.

A prompt is read as phrases between commas: the first is its subject, the later ones are modifiers. A beam search begins
with the bank prompts nearest to a prediction, whole and their subjects alone. A move adds a modifier, takes one out, or
puts another in its place; or another subject. What a move would do is guessed from the embeddings of the phrases, and
only the likeliest moves are embedded as whole prompts. The text encoder is handed in as a function.

# B = predictions, D = width of an embedding, M = modifiers, K = phrases of a beam, P = phrases that it may get
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from img2prompt.bank import Bank
from img2prompt.data.prompts import prompt_key

# Texts to their unit embeddings, float32 [N, D].
Encode = Callable[[list[str]], np.ndarray]
Phrases = tuple[str, ...]

MOST_MODIFIERS = 4000
# Bank prompts that a search begins with, and those whose subjects it may take.
_STARTS, _SUBJECTS = 3, 32
# Moves of a beam that are embedded in a round: the time is in proportion.
_TRIED = 6
# What a round must add to the best cosine: with less, prompts grow by words that say nothing.
_LEAST_GAIN = 2e-3
# Cosines that differ by less are equal, and the text decides: an encoder rounds otherwise in other company.
_DECIMALS = 6


@dataclass(frozen=True)
class Modifiers:
    """Phrases that may be added to any prompt, and their unit embeddings."""

    texts: list[str]
    embeddings: Float[Tensor, "M D"]

    @cached_property
    def places(self) -> dict[str, int]:
        return {prompt_key(text): place for place, text in enumerate(self.texts)}


@dataclass(frozen=True)
class Composed:
    """A composed prompt, and the cosine of its embedding with the prediction."""

    prompt: str
    cosine: float


def phrases_of(prompt: str) -> Phrases:
    """What stands between the commas."""
    return tuple(phrase for part in prompt.split(",") if (phrase := " ".join(part.split())))


def modifiers_of(prompts: Sequence[str], most: int = MOST_MODIFIERS) -> list[str]:
    """The `most` frequent phrases that are not the first of their prompt, each in its most frequent spelling."""
    counts = Counter(phrase for prompt in prompts for phrase in phrases_of(prompt)[1:])
    spellings: dict[str, Counter[str]] = {}
    for phrase, count in counts.items():
        spellings.setdefault(prompt_key(phrase), Counter())[phrase] = count
    frequent = sorted(spellings, key=lambda key: (-spellings[key].total(), key))[:most]
    return [min(spellings[key], key=lambda text: (-spellings[key][text], text)) for key in frequent]


def compose(
    predictions: Float[Tensor, "B D"],
    bank: Bank,
    modifiers: Modifiers,
    encode: Encode,
    beams: int = 3,
    longest: int = 12,
) -> list[Composed]:
    """The best prompt that was found for each prediction; by `encode` never worse than the nearest bank prompt.

    Phrases are added up to `longest`; only what began as a longer bank prompt has more. The bank is not empty.
    """
    goals = functional.normalize(predictions.float(), dim=1).to(bank.embeddings.device)
    if not len(goals):
        return []

    def embedded(texts: Iterator[str]) -> dict[str, Tensor]:
        # All that the searches ask for at once, and what several ask for once.
        distinct = list(dict.fromkeys(texts))
        return dict(zip(distinct, torch.from_numpy(encode(distinct)).to(goals), strict=True)) if distinct else {}

    near, _ = bank.nearest(goals, _SUBJECTS)
    starts = [[start for prompt in prompts[:_STARTS] for start in _starts(prompt)] for prompts in near]
    subjects = [_subjects(prompts) for prompts in near]
    phrases = [
        list(dict.fromkeys([*own, *(phrase for one in begun for phrase in one)]))
        for own, begun in zip(subjects, starts, strict=True)
    ]
    known = embedded(text for own, begun in zip(phrases, starts, strict=True) for text in (*own, *map(_text, begun)))
    searches = []
    for goal, own, words, begun in zip(goals, subjects, phrases, starts, strict=True):
        search = _Search(goal, own, modifiers, {one: known[one] for one in words}, beams, longest)
        search.takes(begun, known)
        searches.append(search)
    active = list(searches)
    while active:
        wanted = [search.moves() for search in active]
        known = embedded(_text(one) for moves in wanted for one in moves)
        active = [search for search, moves in zip(active, wanted, strict=True) if search.takes(moves, known)]
    return [Composed(_text(search.beams[0].phrases), search.beams[0].cosine) for search in searches]


@dataclass(frozen=True)
class _Beam:
    phrases: Phrases
    embedding: Float[Tensor, " D"]
    cosine: float


class _Search:
    """The beams of one prediction, best first. It knows nothing of the others that are searched beside it."""

    def __init__(
        self,
        goal: Float[Tensor, " D"],
        subjects: list[str],
        modifiers: Modifiers,
        phrases: Mapping[str, Tensor],
        most: int,
        longest: int,
    ) -> None:
        self.beams: list[_Beam] = []
        self._goal, self._most, self._longest = goal, most, longest
        self._subjects = {prompt_key(subject): place for place, subject in enumerate(subjects)}
        self._modifiers, self._phrases = modifiers, phrases
        self._pool = subjects + modifiers.texts
        self._seen: set[str] = set()

    def takes(self, candidates: list[Phrases], known: Mapping[str, Tensor]) -> bool:
        """Keeps the best of its beams and of the candidates; whether the best is better than it was."""
        before = self.beams[0].cosine if self.beams else -1.0
        for phrases in candidates:
            embedding = known[_text(phrases)]
            self.beams.append(_Beam(phrases, embedding, float(embedding @ self._goal)))
            self._seen.add(prompt_key(_text(phrases)))
        self.beams = sorted(self.beams, key=lambda one: (-round(one.cosine, _DECIMALS), one.phrases))[: self._most]
        return self.beams[0].cosine >= before + _LEAST_GAIN

    def moves(self) -> list[Phrases]:
        """The likeliest prompts one move away from a beam, that were not embedded before."""
        found: dict[str, Phrases] = {}
        for beam in self.beams:
            fresh = 0
            for phrases in self._likeliest(beam):
                key = prompt_key(_text(phrases))
                if key not in self._seen and fresh < _TRIED:
                    found.setdefault(key, phrases)
                    fresh += 1
        return list(found.values())

    def _likeliest(self, beam: _Beam) -> Iterator[Phrases]:
        """What one move makes of a beam, in the order of the guess: a prompt is taken to lie where the sum of its
        phrases does, but for what the beam is known to differ from that.
        """
        own = torch.stack([self._embedding(phrase) for phrase in beam.phrases])
        whole = own.sum(0).norm() * beam.embedding
        kept = torch.cat([whole[None], whole - own])  # [K + 1, D]: all phrases, or all but one
        subjects = [self._phrases[one] for one in self._pool[: len(self._subjects)]]
        nothing = torch.zeros_like(self._goal)
        added = torch.cat([torch.stack([nothing, *subjects]), self._modifiers.embeddings])  # [P + 1, D]: none, or one
        squares = kept.square().sum(1)[:, None] + 2 * kept @ added.T + added.square().sum(1)
        guess = ((kept @ self._goal)[:, None] + added @ self._goal) / squares.clamp(min=1e-6).sqrt()
        guess.masked_fill_(~self._allowed(beam.phrases).to(guess.device), -torch.inf)
        best, places = guess.flatten().topk(min(2 * _TRIED, guess.numel()))
        for place in places[best.isfinite()].tolist():
            gone, come = divmod(place, len(added))
            new = self._pool[come - 1 : come] if come else []
            before, after = (beam.phrases[: gone - 1], beam.phrases[gone:]) if gone else (beam.phrases, ())
            yield (*before, *new, *after)

    def _allowed(self, phrases: Phrases) -> Tensor:
        """[K + 1, P + 1]: a subject takes the place of the subject, and modifiers come and go behind it."""
        allowed = torch.zeros(len(phrases) + 1, len(self._pool) + 1, dtype=torch.bool)
        first_modifier = len(self._subjects) + 1
        allowed[0, first_modifier:] = len(phrases) < self._longest
        allowed[1, 1:first_modifier] = True
        allowed[2:, 0] = True
        allowed[2:, first_modifier:] = True
        for key in map(prompt_key, phrases):
            # What is there already.
            if key in self._subjects:
                allowed[:, self._subjects[key] + 1] = False
            if key in self._modifiers.places:
                allowed[:, self._modifiers.places[key] + first_modifier] = False
        return allowed

    def _embedding(self, phrase: str) -> Float[Tensor, " D"]:
        known = self._phrases.get(phrase)
        # What is of no bank prompt that is near is a modifier.
        return self._modifiers.embeddings[self._modifiers.places[prompt_key(phrase)]] if known is None else known


def _subjects(prompts: Sequence[str]) -> list[str]:
    """The first phrases, each in its first spelling."""
    found: dict[str, str] = {}
    for prompt in prompts:
        for phrase in phrases_of(prompt)[:1]:
            found.setdefault(prompt_key(phrase), phrase)
    return list(found.values())


def _starts(prompt: str) -> list[Phrases]:
    """The prompt and its subject alone; also as one phrase, where it is not just phrases between commas."""
    phrases = phrases_of(prompt)
    is_just = phrases and prompt_key(_text(phrases)) == prompt_key(prompt)
    return [one for one in dict.fromkeys([phrases if is_just else (prompt,), phrases, phrases[:1]]) if one]


def _text(phrases: Phrases) -> str:
    return ", ".join(phrases)
