"""What every picture maker offers: prompts and seeds in, pixels out.

First step of an item's way: a prompt becomes a picture here, before the picture is stored, encoded and
compared with the embedding of its prompt. The procedural drawer satisfies this protocol, and so can a
diffusion model.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np


@runtime_checkable
class Generator(Protocol):
    """Turns prompts into pictures, repeatably."""

    def generate(self, prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        """Pictures uint8 [B, H, W, 3], RGB in 0..255, one for each of the B (prompt, seed) couples.

        The same (prompt, seed) always gives the same pixels, whatever else is in the batch.
        """
        ...
