"""A weighted mean of members, its weights fitted on predictions whose prompts are known.

Reverse Stable Diffusion (Croitoru et al., arXiv 2308.01472) blends seven models with weights set by hand. Here they
maximise the mean cosine, are never negative, and stand beside the scores that say whether fitting them was worth it.

# M = members, N = images, D = width of an embedding
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import minimize, nnls
from torch import Tensor
from torch.nn import functional

from img2prompt.refine.refiner import Refiner, blend, equal, fold_numbers


class Ensemble(Refiner):
    """The blend of the members with fitted weights, or with equal ones (`fitted` false)."""

    name = "ensemble"

    def __init__(self, fitted: bool = True) -> None:
        self.fitted = fitted

    def fit(
        self,
        members: Float[Tensor, "M N D"],
        targets: Float[Tensor, "N D"],
        groups: Int[np.ndarray, " N"],
        weights: Sequence[float] | None = None,
    ) -> None:
        assert weights is None, "an ensemble finds its weights"
        products = inner_products(members, targets)
        self.report = assess(products, groups)
        self.weights = torch.from_numpy(self.report.weights).float() if self.fitted else equal(len(members))

    def refine(self, members: Float[Tensor, "M N D"]) -> Float[Tensor, "N D"]:
        return blend(members, self.weights)

    def lines(self) -> list[str]:
        return self.report.lines(self.fitted)


@dataclass(frozen=True)
class Products:
    """All that the cosine of a blend depends on: between members and targets, and between members.

    The blend of weights w has the cosine (w · with_target) / sqrt(w · among · w), so fits need no embedding.
    """

    with_target: Float[np.ndarray, "N M"]
    among: Float[np.ndarray, "N M M"]

    def of(self, images: np.ndarray | slice, members: Sequence[int] | None = None) -> "Products":
        chosen = np.arange(self.with_target.shape[1]) if members is None else np.array(members)
        return Products(self.with_target[images][:, chosen], self.among[images][:, chosen][:, :, chosen])

    def cosines(self, weights: np.ndarray) -> np.ndarray:
        squares = np.einsum("nij,i,j->n", self.among, weights, weights)
        return self.with_target @ weights / np.sqrt(squares.clip(min=1e-12))

    def score(self, weights: np.ndarray) -> float:
        return float(self.cosines(weights).mean())


def inner_products(members: Float[Tensor, "M N D"], targets: Float[Tensor, "N D"]) -> Products:
    units = [functional.normalize(member, dim=-1) for member in members]
    goals = functional.normalize(targets, dim=-1)
    with_target = torch.stack([(unit * goals).sum(-1) for unit in units], dim=-1)
    among = torch.stack([torch.stack([(one * two).sum(-1) for two in units], dim=-1) for one in units], dim=-1)
    return Products(with_target.cpu().double().numpy(), among.cpu().double().numpy())


def fit_weights(products: Products) -> np.ndarray:
    """The weights, not negative and of sum 1, with the largest mean cosine that a deterministic ascent finds.

    It begins at equal weights and at those of the smallest squared error, and never scores less than either.
    """
    count = products.with_target.shape[1]
    if count == 1:
        return np.ones(1)
    # The squared error may be least where nothing is said at all.
    starts = [start for start in (np.full(count, 1 / count), _least_squares(products)) if start.any()]
    best = max([*starts, *(_ascend(products, start) for start in starts)], key=products.score)
    return best / best.sum()


def _least_squares(products: Products) -> np.ndarray:
    values, vectors = np.linalg.eigh(products.among.mean(axis=0))
    # Members that are alike have no inverse.
    kept = values > 1e-10 * values[-1]
    roots = np.sqrt(values[kept])
    rotated = vectors[:, kept]
    weights, _ = nnls(roots[:, None] * rotated.T, (rotated.T @ products.with_target.mean(axis=0)) / roots)
    return weights / weights.sum() if weights.any() else weights


def _ascend(products: Products, start: np.ndarray) -> np.ndarray:
    def loss_and_gradient(weights: np.ndarray) -> tuple[float, np.ndarray]:
        turned = products.among @ weights
        lengths = np.sqrt((turned @ weights).clip(min=1e-12))
        cosines = products.with_target @ weights / lengths
        slopes = products.with_target / lengths[:, None] - turned * (cosines / lengths**2)[:, None]
        return -float(cosines.mean()), -slopes.mean(axis=0)

    bounds = [(0.0, None)] * len(start)
    options = {"ftol": 1e-14, "gtol": 1e-9, "maxiter": 500}
    result = minimize(loss_and_gradient, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    weights = np.clip(result.x, 0.0, None)
    return weights / weights.sum() if weights.any() else start


@dataclass(frozen=True)
class Report:
    """Scores of the source. `held_out` scores are cross-validated: no image is scored by weights that saw its prompt.

    They are NaN where there are not two prompts. `without` are held-out scores of the others, fitted anew.
    """

    weights: np.ndarray
    in_sample: float
    held_out: float
    equal: float
    alone: list[float]
    without: list[float]

    def lines(self, fitted: bool) -> list[str]:
        lines = ["member  weight   alone  without it"]
        for number, weight in enumerate(self.weights, start=1):
            rest = f"{self.without[number - 1]:10.4f}" if self.without else f"{'-':>10}"
            lines.append(f"{number:>6}  {weight:6.3f}  {self.alone[number - 1]:6.4f}  {rest}")
        lines.append(
            f"fitted weights {self.held_out:.4f} cross-validated by prompt ({self.in_sample:.4f} on what they were "
            f"fitted to), equal weights {self.equal:.4f}"
        )
        if len(self.weights) > 1 and not self.held_out > self.equal:
            lines.append(
                "fitted weights do not beat equal weights when they are cross-validated"
                + ("; refiner.fitted=false takes equal ones" if fitted else "")
            )
        return lines


def assess(products: Products, groups: Int[np.ndarray, " N"]) -> Report:
    """Fits to all of the source, and cross-validates the fit with every member and without each."""
    weights = fit_weights(products)
    count = len(weights)
    everyone = list(range(count))
    leaving = [[one for one in everyone if one != left] for left in everyone] if count > 1 else []
    return Report(
        weights,
        products.score(weights),
        cross_validated(products, groups),
        products.score(np.full(count, 1 / count)),
        [float(products.with_target[:, one].mean()) for one in everyone],
        [cross_validated(products.of(slice(None), rest), groups) for rest in leaving],
    )


def cross_validated(products: Products, groups: Int[np.ndarray, " N"]) -> float:
    """The mean cosine over all images, each by weights that were fitted to the other folds of prompts."""
    folds = fold_numbers(groups)
    if not folds.any():
        return float("nan")
    total = 0.0
    for fold in range(folds.max() + 1):
        weights = fit_weights(products.of(folds != fold))
        total += float(products.of(folds == fold).cosines(weights).sum())
    return total / len(groups)
