"""Zero-shot classification: an image belongs to the class whose name is nearest to its prediction (Radford et al.,
CLIP, 2021).

# N = images, C = classes, T = templates, D = width of an embedding
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

_ROUNDING = 1e-6


def texts_of(names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """The classes' names in each template, class by class; ValueError for a template without a place for the name."""
    bad = next((one for one in templates if not isinstance(one, str) or "{}" not in one), None)
    if bad is not None or not templates:
        raise ValueError(f"templates={list(templates)}: each must be a text with {{}} for the name of a class")
    return [template.replace("{}", name) for name in names for template in templates]


def class_embeddings(embeddings: Float[Tensor, "C_times_T D"], count: int) -> Float[Tensor, "C D"]:
    """One of each class, of unit length: the mean of those of its texts."""
    each = functional.normalize(embeddings, dim=-1).view(-1, count, embeddings.shape[1])
    return functional.normalize(each.mean(1), dim=-1)


def ranked(
    predictions: Float[Tensor, "N D"], classes: Float[Tensor, "C D"], own: Int[Tensor, " N"]
) -> tuple[Int[Tensor, " N"], Int[Tensor, " N"]]:
    """The nearest class of each image, and how many others are at least as near as its own."""
    cosines = functional.normalize(predictions.float(), dim=-1) @ classes.float().T
    mine = cosines.gather(1, own[:, None])
    others = (cosines >= mine - _ROUNDING).sum(1) - 1
    # Equal ones count against it: who says the same of all has not told any apart.
    guess = cosines.scatter(1, own[:, None], mine - 2 * _ROUNDING).argmax(1)
    return guess, others


def mean_per_class(correct: Float[Tensor, " N"], own: Int[Tensor, " N"], count: int) -> Float[Tensor, " C"]:
    """The share that is correct of each class; NaN of one without images."""
    hits = torch.zeros(count, dtype=torch.float64).index_add_(0, own, correct.double())
    return (hits / torch.bincount(own, minlength=count)).float()
