"""Scores of predictions. The one that counts is the mean cosine between prediction and target."""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional
from torchmetrics.functional.classification import binary_average_precision, binary_f1_score


def cosines(predictions: Float[Tensor, "N D"], targets: Float[Tensor, "N D"]) -> Float[Tensor, " N"]:
    """Cosine of each prediction with its target, in [-1, 1]; neither needs unit length."""
    return functional.cosine_similarity(predictions.float(), targets.float(), dim=-1)


def word_scores(logits: Float[Tensor, "N V"], labels: Float[Tensor, "N V"]) -> dict[str, float]:
    """How well the V words of N prompts are told, from 0 to 1: `word_map`, the average precision of a word's ranking of
    the images, its mean over the words that some prompt has; and `word_f1`, of all words together, where more than even
    chances are a yes; nothing where no prompt has a word of them.
    """
    # What lies between 0 and 1 is taken for a probability, and is to be one.
    chances, labels = logits.double().sigmoid(), labels.int()
    ranked = [binary_average_precision(chances[:, word], labels[:, word]) for word in labels.any(dim=0).nonzero()[:, 0]]
    if not ranked:
        return {}
    return {
        "word_map": float(torch.stack(ranked).mean()),
        "word_f1": float(binary_f1_score(chances.flatten(), labels.flatten())),
    }


def bootstrap_interval(
    values: Float[Tensor, " N"],
    groups: Int[np.ndarray, " N"] | None = None,
    confidence: float = 0.95,
    resamples: int = 1000,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean (Efron 1979); the same values give the same interval.

    Whole `groups` are drawn (numbers from 0): images of one prompt are not independent of each other.
    """
    scores = values.detach().cpu().double().numpy()
    groups = np.arange(len(scores)) if groups is None else groups
    sums, counts = np.bincount(groups, scores), np.bincount(groups)
    generator = np.random.default_rng(0)
    means = []
    # One resample at a time: all at once would need N x resamples numbers.
    for _ in range(resamples):
        drawn = generator.integers(0, len(counts), len(counts))
        means.append(sums[drawn].sum() / counts[drawn].sum())
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)
