"""What every picture maker offers: prompts and seeds in, pixels out.

First step of an item's way: a prompt becomes a picture here, before the picture is stored, encoded and
compared with the embedding of its prompt. The procedural drawer satisfies this protocol, and so does a
diffusion model.
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from img2prompt.hub import HubFile


@runtime_checkable
class Generator(Protocol):
    """Turns prompts into pictures, repeatably."""

    @property
    def settings(self) -> dict[str, Any]:
        """All that the pictures depend on besides prompt and seed, as plain data."""
        ...

    @property
    def size_px(self) -> tuple[int, int]:
        """Height and width of the pictures."""
        ...

    @property
    def saved_px(self) -> int | None:
        """The shorter side that they are made smaller to before they are kept; None: as they are."""
        ...

    @property
    def download(self) -> HubFile | None:
        """What the first picture would fetch from the Hub."""
        ...

    def check(self) -> None:
        """Looks for device and files, which takes no time; ValueError when something is not there."""
        ...

    def load(self) -> None:
        """Gets ready for the first picture; ValueError when something for it is not there."""
        ...

    def details(self, seed: int) -> dict[str, Any]:
        """What is drawn for each picture by its seed, such as its guidance; empty where nothing is."""
        ...

    def generate(self, prompts: Sequence[str], seeds: Sequence[int], precise: bool = False) -> np.ndarray:
        """Pictures uint8 [B, H, W, 3], RGB in 0..255, one for each of the B (prompt, seed) couples.

        The same (prompt, seed) gives the same pixels, whatever else is in the batch; in a batch of another size a model
        rounds otherwise, by one of 255 in float32 and by a few in bf16. A picture that went wrong (values that are not
        finite) is black; `precise` asks for float32, where that may help.
        """
        ...
