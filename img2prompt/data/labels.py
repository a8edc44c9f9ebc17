"""What a prompt is labelled with: which words of a vocabulary it has.

# N = prompts, B = rows of a batch, V = words of the vocabulary
"""

import re
import unicodedata
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from scipy.sparse import csr_matrix
from torch import Tensor


def words_of(prompt: str) -> list[str]:
    """Its words of two letters and more, in lower case and in their order: "A fox's 3 RED_CUBS" has fox, red, cubs."""
    # What is not seen, such as soft hyphens, divides no word; the dot of a lower-case İ is on its i already.
    seen = "".join(letter for letter in prompt if unicodedata.category(letter) != "Cf").lower().replace("i\u0307", "i")
    text = unicodedata.normalize("NFKC", seen).replace("’", "'")
    found = (word.removesuffix("'s") for word in re.findall(r"[^\W_]+(?:'[^\W_]+)*", text))
    return [word for word in found if len(word) > 1 and word.isalpha()]


class Labels:
    """Which words of a vocabulary each of N prompts has."""

    def __init__(self, prompts: Sequence[str], vocabulary: Sequence[str]) -> None:
        self.vocabulary = list(vocabulary)
        numbers = {word: number for number, word in enumerate(vocabulary)}
        known = [sorted({numbers[word] for word in words_of(prompt) if word in numbers}) for prompt in prompts]
        words = np.array([number for row in known for number in row], dtype=np.int32)
        ends = np.cumsum([0, *map(len, known)])
        self._matrix = csr_matrix((np.ones(len(words), dtype=np.float32), words, ends), (len(known), len(vocabulary)))

    def of(self, rows: Sequence[int]) -> Float[Tensor, "B V"]:
        """1 where the prompt of a row has a word, else 0."""
        return torch.from_numpy(self._matrix[rows].toarray())
