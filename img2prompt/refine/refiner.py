"""Refiners turn saved predictions into better ones, and never see an image.

A member is a model whose predictions were saved (`predictions.py`), each at its own input size. A refiner is fitted on
predictions of images whose prompts are known, the source, and then refines those of others, the target.

# M = members, N = images, D = width of an embedding
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from img2prompt.metrics import cosines

FOLDS = 5


class Refiner(ABC):
    """What is fitted once and then refines. `weights` [M] are those of the members in the blend that it works on: not
    negative, of sum 1, and known after `fit`. `name` is for people.
    """

    name: str
    weights: Float[Tensor, " M"]

    @abstractmethod
    def fit(
        self,
        members: Float[Tensor, "M N D"],
        targets: Float[Tensor, "N D"],
        groups: Int[np.ndarray, " N"],
        weights: Sequence[float] | None = None,
    ) -> None:
        """Fits to the source. Images of one of the `groups` (numbers from 0) have one prompt: no score sees it on
        both sides. `weights` are for the members, None where they are alike or are to be fitted.
        """

    @abstractmethod
    def refine(self, members: Float[Tensor, "M N D"]) -> Float[Tensor, "N D"]:
        """Unit embeddings of the target. Nothing else is known of its images."""

    @abstractmethod
    def lines(self) -> list[str]:
        """What a person should know of the fit, and of the latest target."""


def blend(members: Float[Tensor, "M N D"], weights: Float[Tensor, " M"]) -> Float[Tensor, "N D"]:
    """The weighted mean of the members' directions, at unit length: no member counts more for being longer.

    ValueError where the members of an image cancel each other out.
    """
    mean = torch.zeros_like(members[0])
    for member, weight in zip(members, weights.tolist(), strict=True):
        mean += weight * functional.normalize(member, dim=-1)
    lengths = mean.norm(dim=-1, keepdim=True)
    if (lengths < 1e-6).any():
        raise ValueError(f"the members' predictions of {int((lengths < 1e-6).sum())} images cancel each other out")
    return mean / lengths


def equal(count: int) -> Float[Tensor, " M"]:
    return torch.full((count,), 1 / count)


def fold_numbers(groups: Int[np.ndarray, " N"]) -> Int[np.ndarray, " N"]:
    """In which of up to five folds an image is: no group is in two. One group alone is all in fold 0."""
    distinct, numbered = np.unique(groups, return_inverse=True)
    return numbered % min(FOLDS, len(distinct))


def mean_cosine(predictions: Float[Tensor, "N D"], targets: Float[Tensor, "N D"]) -> float:
    return float(cosines(predictions, targets).mean())
