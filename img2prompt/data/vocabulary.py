"""The words that prompts are labelled with: the most frequent of the training prompts that say what an image shows."""

from collections import Counter
from collections.abc import Iterable
from functools import cache
from itertools import islice

from HanTa.HanoverTagger import HanoverTagger

from img2prompt.data.labels import words_of

# In the tag set C5 of the British National Corpus: nouns, names, adjectives and full verbs, and what is in no
# dictionary of English.
_CONTENT = ("NN", "NP", "AJ", "VV", "UNC")
_LONGEST = 40  # letters: the tagger takes ever longer, and what is longer is no word
# Of those, the ones that say nothing.
_STOP_WORDS = frozenset("own let get got lot bit kind thing things way various".split())


def vocabulary_of(prompts: Iterable[str], size: int) -> list[str]:
    """The `size` nouns, adjectives and verbs that most of the different prompts have, the alphabet deciding between
    equals (Croitoru et al., Reverse Stable Diffusion, 2023). ValueError when there are not as many.

    Prompts are lists of phrases more than sentences, so each word is tagged by itself.
    """
    counts = Counter(word for prompt in dict.fromkeys(prompts) for word in dict.fromkeys(words_of(prompt)))
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    found = list(islice(filter(_says_something, ranked), size))
    if len(found) < size:
        raise ValueError(
            f"head.vocabulary_size={size}: the training prompts have {len(found)} nouns, adjectives and verbs; "
            "set so many or fewer"
        )
    return found


@cache
def _says_something(word: str) -> bool:
    return len(word) <= _LONGEST and word not in _STOP_WORDS and _tagger().analyze(word)[1].startswith(_CONTENT)


@cache
def _tagger() -> HanoverTagger:
    return HanoverTagger("morphmodel_en.pgz")
