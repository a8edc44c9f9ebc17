"""Scores of predictions. The one that counts is the mean cosine between prediction and target."""

import numpy as np
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional


def cosines(predictions: Float[Tensor, "N D"], targets: Float[Tensor, "N D"]) -> Float[Tensor, " N"]:
    """Cosine of each prediction with its target, in [-1, 1]; neither needs unit length."""
    return functional.cosine_similarity(predictions.float(), targets.float(), dim=-1)


def bootstrap_interval(
    values: Float[Tensor, " N"], confidence: float = 0.95, resamples: int = 1000
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean (Efron 1979); the same values give the same interval."""
    scores = values.detach().cpu().double().numpy()
    generator = np.random.default_rng(0)
    # One resample at a time: all at once would need N x resamples numbers.
    means = [scores[generator.integers(0, len(scores), len(scores))].mean() for _ in range(resamples)]
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)
