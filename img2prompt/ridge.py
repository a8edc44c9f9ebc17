"""Ridge regression in closed form: the probe on frozen features, and every other linear map we fit.

# N = samples, E = width of the features, D = width of the targets
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Penalties per sample on standardised features, so that they mean the same for any encoder, whatever the scale of its
# features and the number of samples.
PENALTIES = tuple(10.0**exponent for exponent in (-5, -4, -3, -2.5, -2, -1.5, -1, -0.5, 0, 0.25, 0.5, 0.75, 1, 2))


@dataclass
class Ridge:
    """y = weight x + bias, with the penalty that was chosen and its cross-validated mean cosine."""

    weight: Float[Tensor, "D E"]
    bias: Float[Tensor, " D"]
    penalty: float
    cosine: float


def fit_ridge(
    features: Float[Tensor, "N E"],
    targets: Float[Tensor, "N D"],
    groups: Int[Tensor, " N"],
    offset: Float[Tensor, "N D"] | None = None,
    penalties: Sequence[float] = PENALTIES,
    folds: int = 5,
) -> Ridge:
    """Minimises the mean squared error plus `penalty` times the squared weights of standardised features.

    The intercept is free of the penalty, which is the one with the best mean cosine over `folds` folds. Where another
    model has its say in `offset`, the map is what is to be added to it.

    Samples of one group are never in two folds: several images of a prompt would otherwise vote for a weak penalty.
    The Gram matrices of the folds add up, so the features are read once and E x E numbers are all that is kept:
    float64, because the smallest eigenvalues decide what a weak penalty does.
    """
    distinct, numbered = torch.unique(groups, return_inverse=True)
    folds = min(folds, len(distinct))
    fold = numbered % max(folds, 1)
    offset = torch.zeros(()).expand(targets.shape) if offset is None else offset
    sums = [_sums(features[fold == k], (targets - offset)[fold == k]) for k in range(folds)]
    total = _added(sums)
    if folds < 2:
        chosen, cosine = max(penalties), float("nan")
    else:
        scores = torch.zeros(len(penalties), dtype=torch.float64)
        for k in range(folds):
            held_x, held_y = features[fold == k].double(), targets[fold == k].double()
            solutions = _solve(_added([one for j, one in enumerate(sums) if j != k]), penalties)
            for i, (weight, bias) in enumerate(solutions):
                predicted = held_x @ weight.T + bias + offset[fold == k]
                scores[i] += torch.cosine_similarity(predicted, held_y, dim=-1).sum().cpu()
        best = int(scores.argmax())
        chosen, cosine = penalties[best], float(scores[best]) / len(features)
    ((weight, bias),) = _solve(total, [chosen])
    return Ridge(weight.float(), bias.float(), chosen, cosine)


def fit_from_texts(
    texts: Float[Tensor, "N E"], targets: Float[Tensor, "N D"], images: Float[Tensor, "M E"] | None = None
) -> tuple[Float[Tensor, "D E"], Float[Tensor, " D"]]:
    """Weight and bias of a map from features of images to targets, fitted on features of texts in the same space.

    The two kinds lie apart, and images are of another length. Without `images` the map has no intercept, so that the
    direction of what it says does not depend on lengths; with features of some images each kind is centred on its own
    mean. Texts are brought to unit length.
    """
    texts = torch.nn.functional.normalize(texts, dim=-1)
    groups = torch.arange(len(texts))
    if images is None:
        # With each feature goes its opposite, which leaves nothing for an intercept.
        ridge = fit_ridge(torch.cat([texts, -texts]), torch.cat([targets, -targets]), groups.repeat(2))
        return ridge.weight, torch.zeros(targets.shape[1])
    length = images.norm(dim=-1).mean()
    ridge = fit_ridge(texts - texts.mean(0), targets, groups)
    return ridge.weight / length, ridge.bias - ridge.weight @ (images.mean(0) / length)


def fit_upon(
    weight: Float[Tensor, "D E"],
    bias: Float[Tensor, " D"],
    features: Float[Tensor, "N E"],
    targets: Float[Tensor, "N D"],
    groups: Int[Tensor, " N"],
) -> tuple[Float[Tensor, "D E"], Float[Tensor, " D"]]:
    """Ridge regression that begins at a known map, or anew if the folds say that this is better. They are a little kind
    to a known map that was fitted to the same targets, as the one of texts is.
    """
    anew = fit_ridge(features, targets, groups)
    known = features @ weight.T + bias
    scale = (known * targets).sum() / known.square().sum().clamp(min=1e-12)
    added = fit_ridge(features, targets, groups, offset=scale * known)
    if not added.cosine > anew.cosine:
        return anew.weight, anew.bias
    return added.weight + scale * weight, added.bias + scale * bias


@dataclass
class _Sums:
    count: int
    x: Float[Tensor, " E"]
    y: Float[Tensor, " D"]
    xx: Float[Tensor, "E E"]
    xy: Float[Tensor, "E D"]


def _sums(features: Tensor, targets: Tensor) -> _Sums:
    x, y = features.double(), targets.double()
    return _Sums(len(x), x.sum(0), y.sum(0), x.T @ x, x.T @ y)


def _added(parts: list[_Sums]) -> _Sums:
    return _Sums(
        sum(part.count for part in parts),
        torch.stack([part.x for part in parts]).sum(0),
        torch.stack([part.y for part in parts]).sum(0),
        torch.stack([part.xx for part in parts]).sum(0),
        torch.stack([part.xy for part in parts]).sum(0),
    )


def _solve(sums: _Sums, penalties: Sequence[float]) -> list[tuple[Tensor, Tensor]]:
    mean_x, mean_y = sums.x / sums.count, sums.y / sums.count
    covariance = sums.xx / sums.count - torch.outer(mean_x, mean_x)
    cross = sums.xy / sums.count - torch.outer(mean_x, mean_y)
    # A feature that is constant but for rounding has no scale to divide by.
    deviation = covariance.diagonal().clamp(min=0).sqrt()
    deviation = torch.where(deviation > 1e-7 * (1 + mean_x.abs()), deviation, torch.inf)
    # One eigendecomposition serves every penalty.
    values, vectors = torch.linalg.eigh(covariance / torch.outer(deviation, deviation))
    rotated = vectors.T @ (cross / deviation[:, None])
    solutions = []
    for penalty in penalties:
        weight = ((vectors @ (rotated / (values.clamp(min=0) + penalty)[:, None])) / deviation[:, None]).T
        solutions.append((weight, mean_y - weight @ mean_x))
    return solutions
