"""What is said of images: all that a file, a report, a refiner or a submission sees of a model."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float


@dataclass
class Prediction:
    """N predicted images: ids, unit embeddings, and named columns of N values each (path, nearest_prompts, …).

    `skipped` lists what could not be predicted, as (path, reason).
    """

    ids: list[str]
    embeddings: Float[np.ndarray, "N D"]
    columns: dict[str, list[Any]] = field(default_factory=dict)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)
