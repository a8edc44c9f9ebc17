"""What predictions are worth: scores beside their floors, differences between predictors, and retrieval.

# N = images, D = width of an embedding, P = distinct prompts
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from img2prompt.metrics import bootstrap_interval, cosines

RECALL_AT = (1, 5, 10)
_BLOCK_ROWS = 1024
# A product of matrices rounds otherwise than a sum.
_ROUNDING = 1e-6
# Words of a prompt, up to each of these.
_LENGTHS = (5, 10, 20, 40)


@dataclass(frozen=True)
class Score:
    """A mean over images with its interval; prompts are drawn, and not images, which share them."""

    mean: float
    low: float
    high: float
    images: int


def score(values: Float[Tensor, " N"], groups: Int[np.ndarray, " N"]) -> Score:
    # Groups of a part of the images have gaps in their numbers.
    low, high = bootstrap_interval(values, np.unique(groups, return_inverse=True)[1])
    return Score(float(values.mean()), low, high, len(values))


def floors(targets: Float[Tensor, "N D"], numbers: Int[np.ndarray, " N"]) -> dict[str, Float[Tensor, " N"]]:
    """What no predictor needs an image for, by image: the constant that is best for these very prompts, which nobody
    knows beforehand, and another one of the prompts instead of one's own (NaN where there is no other).
    """
    constant = cosines(targets.mean(0).expand_as(targets), targets)
    first = torch.from_numpy(np.unique(numbers, return_index=True)[1])
    distinct = functional.normalize(targets[first].double(), dim=-1)
    own = functional.normalize(targets.double(), dim=-1)
    others = ((own @ distinct.sum(0)) - 1) / (len(distinct) - 1 or float("nan"))
    return {"best constant": constant, "another prompt": others.float()}


def nearest_other(
    predictions: Float[Tensor, "N D"], targets: Float[Tensor, "N D"], numbers: Int[np.ndarray, " N"]
) -> Float[Tensor, "N D"]:
    """Of each prediction, the nearest of the other images' prompts: what a bank would find in which the own one is not.
    NaN where there is no other.
    """
    first = torch.from_numpy(np.unique(numbers, return_index=True)[1])
    texts = functional.normalize(targets[first].float(), dim=-1)
    own = torch.from_numpy(numbers)
    found = torch.full_like(targets, torch.nan)
    if len(texts) < 2:
        return found
    for start in range(0, len(predictions), _BLOCK_ROWS):
        rows = slice(start, start + _BLOCK_ROWS)
        near = functional.normalize(predictions[rows].float(), dim=-1) @ texts.T
        near.scatter_(1, own[rows, None], -torch.inf)
        found[rows] = targets[first[near.argmax(1)]]
    return found


def recall(
    predictions: Float[Tensor, "N D"], targets: Float[Tensor, "N D"], numbers: Int[np.ndarray, " N"]
) -> dict[str, float]:
    """Of how many images the own prompt is among the k nearest of the distinct prompts, and of how many prompts an own
    image is among the k nearest images. Equal cosines count against it.
    """
    first = torch.from_numpy(np.unique(numbers, return_index=True)[1])
    own = torch.from_numpy(numbers)
    said = functional.normalize(predictions.float(), dim=-1)
    texts = functional.normalize(targets[first].float(), dim=-1)
    mine = (said * texts[own]).sum(1)
    # [P]: the best cosine of a prompt with one of its own images.
    best = torch.full((len(texts),), -torch.inf).scatter_reduce(0, own, mine, "amax")
    of_images, of_prompts = torch.zeros(len(said), dtype=torch.int64), torch.zeros(len(texts), dtype=torch.int64)
    for start in range(0, len(said), _BLOCK_ROWS):
        rows = slice(start, start + _BLOCK_ROWS)
        found = said[rows] @ texts.T
        is_own = own[rows, None] == torch.arange(len(texts))
        of_images[rows] = ((found >= mine[rows, None] - _ROUNDING) & ~is_own).sum(1)
        of_prompts += ((found >= best - _ROUNDING) & ~is_own).sum(0)
    return {
        **{f"image to text R@{k}": float((of_images < k).double().mean()) for k in RECALL_AT},
        **{f"text to image R@{k}": float((of_prompts < k).double().mean()) for k in RECALL_AT},
    }


def by_label(values: Float[Tensor, " N"], labels: Sequence[str], groups: Int[np.ndarray, " N"]) -> dict[str, Score]:
    """The score of the images of each label, in the order of the labels' first appearance."""
    found = {}
    for label in dict.fromkeys(labels):
        rows = [row for row, one in enumerate(labels) if one == label]
        found[label] = score(values[rows], groups[rows])
    return found


def length_of(prompt: str) -> str:
    """In which class of lengths a prompt is."""
    words = len(prompt.split())
    edges = [0, *_LENGTHS]
    for low, high in zip(edges, edges[1:], strict=False):
        if words <= high:
            return f"{low + 1} to {high} words"
    return f"more than {edges[-1]} words"


def in_order_of_length(scores: Mapping[str, Score]) -> dict[str, Score]:
    names = [*(f"{low + 1} to {high} words" for low, high in zip([0, *_LENGTHS], _LENGTHS, strict=False))]
    return {name: scores[name] for name in [*names, f"more than {_LENGTHS[-1]} words"] if name in scores}
