"""DAKL, domain-adaptive kernel learning (Reverse Stable Diffusion, arXiv 2308.01472, first version).

Kernel ridge regression whose features are the kernel's values at all images, those of the target among them: labels of
the target are never read, but where its images lie is. So what it says of an image depends on which others come with
it. The kernel is almost constant (gamma = 0.01 leaves it between 0.99 and 1), so all that is told lies in its last
digits: everything here is computed on differences from the kernel's mean.

# N = source images, C = centroids, T = target images, Z = C + T, D = width of an embedding
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from img2prompt.refine.refiner import Refiner, blend, equal, fold_numbers
from img2prompt.search import nearest

# In units of the mean squared distance of a centroid's features from their mean: free of gamma and of all counts.
PENALTIES = tuple(10.0**exponent for exponent in (-5, -4.5, -4, -3.5, -3, -2.5, -2, -1.5, -1, -0.5, 0, 1))
# So many centroids predict so many source images to choose one. It serves all, because the features are the same.
_TRIED = 2000
# What is added to C x C float32 numbers at once; the rows of a prediction.
_BLOCK = 2048
_ITERATIONS = 50


class Dakl(Refiner):
    """DAKL on the blend of the members: `centroids` of k-means stand for the source.

    `alpha` is the penalty as the paper writes it (its own is 10, which is far too much for this kernel); None chooses
    the one with the best mean cosine over folds of the source's prompts.
    """

    name = "DAKL"

    def __init__(
        self,
        centroids: int = 10_000,
        gamma: float = 0.01,
        alpha: float | None = None,
        seed: int = 0,
        block: int = _BLOCK,
    ) -> None:
        for name, value, least in (("centroids", centroids, 1), ("block", block, 1)):
            if value < least:
                raise ValueError(f"refiner.{name} must be at least {least}, got {value}")
        for name, number in (("gamma", gamma), ("alpha", alpha)):
            if number is not None and not number > 0:
                raise ValueError(f"refiner.{name} must be above 0, got {number}")
        self.count, self.gamma, self.alpha, self.seed, self.block = centroids, gamma, alpha, seed, block

    def fit(
        self,
        members: Float[Tensor, "M N D"],
        targets: Float[Tensor, "N D"],
        groups: Int[np.ndarray, " N"],
        weights: Sequence[float] | None = None,
    ) -> None:
        self.weights = equal(len(members)) if weights is None else torch.tensor(weights, dtype=torch.float32)
        blended = blend(members, self.weights)
        self.centroids, rows = reduced(blended, self.count, self.seed)
        self.targets = targets[rows]
        drawn = np.random.default_rng(self.seed)
        folds = fold_numbers(groups)
        some, tried = (np.sort(drawn.permutation(count)[:_TRIED]) for count in (len(self.centroids), len(blended)))
        own = rows.cpu().numpy()[some]
        self.trial = Trial(some, folds[own], blended[tried], targets[tried], folds[tried])
        self.told = [f"{len(blended)} source images are reduced to {self.count} centroids"]
        if len(self.centroids) == len(blended):
            self.told = [
                f"{len(blended)} source images stand for themselves: no more than refiner.centroids={self.count}"
            ]

    def refine(self, members: Float[Tensor, "M N D"]) -> Float[Tensor, "N D"]:
        targets = blend(members, self.weights)
        features = KernelFeatures(self.centroids, targets, self.gamma, self.block)
        gram = features.products(self.centroids)
        alpha = self.alpha
        if alpha is None:
            alpha, cosine = choose_alpha(features, gram, self.targets, self.trial)
            tried = f"{len(self.trial.centroids)} of {len(self.centroids)}"
            told = f"DAKL {cosine:.4f} cross-validated by prompt, with {tried} centroids; alpha {alpha:.3g}"
            self.told = [self.told[0], told]
        return functional.normalize(features.predict(gram, self.targets, alpha), dim=-1)

    def lines(self) -> list[str]:
        return self.told


@dataclass
class Trial:
    """What chooses the penalty: some centroids, their folds, and source images [S, D] with their targets and folds."""

    centroids: Int[np.ndarray, " K"]
    centroid_folds: Int[np.ndarray, " K"]
    samples: Float[Tensor, "S D"]
    targets: Float[Tensor, "S D"]
    folds: Int[np.ndarray, " S"]


def reduced(samples: Float[Tensor, "N D"], count: int, seed: int) -> tuple[Float[Tensor, "C D"], Int[Tensor, " C"]]:
    """Centroids of k-means at unit length, and the row of the sample that is nearest to each; the samples themselves
    where they are not more than `count`.
    """
    if len(samples) <= count:
        return samples, torch.arange(len(samples), device=samples.device)
    # scikit-learn takes a second to import.
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        # Fewer distinct samples than centroids: some centroids are equal then, and harmless.
        warnings.simplefilter("ignore", ConvergenceWarning)
        means = KMeans(count, init="random", n_init=1, max_iter=_ITERATIONS, random_state=seed).fit(
            samples.cpu().numpy()
        )
    centroids = functional.normalize(torch.from_numpy(means.cluster_centers_).to(samples), dim=-1)
    cosines, rows = nearest(centroids, samples, 2)
    # The mean of two samples is equally near to both: the earlier one, and not what rounding says.
    is_tied = cosines[:, 0] - cosines[:, 1] < 1e-6
    return centroids, torch.where(is_tied, rows.amin(1), rows[:, 0])


class KernelFeatures:
    """phi(z), the values of the kernel exp(-gamma (1 - cosine) / 2) between z and all of Z = [centroids; targets].

    Never all at once: Z x Z numbers would be 6 GB at 10,000 centroids and 30,000 targets. A feature is `mean` plus a
    deviation that is some thousand times smaller; only deviations are multiplied in float32. Rows are of unit length.
    """

    def __init__(
        self, centroids: Float[Tensor, "C D"], targets: Float[Tensor, "T D"], gamma: float, block: int = _BLOCK
    ) -> None:
        self.centroids, self.targets, self.gamma, self.block = centroids, targets, gamma, block
        self.all = torch.cat([centroids, targets])
        # The mean cosine of all pairs is the square of the mean row.
        self.middle = float(centroids.double().mean(0) @ self.all.double().mean(0))
        self.mean = float(np.exp(-gamma * (1 - self.middle) / 2))

    def deviations(self, rows: Float[Tensor, "B D"], columns: Float[Tensor, "A D"]) -> Float[Tensor, "B A"]:
        """The kernel minus `mean`, to the last digit of the cosines."""
        return torch.expm1((rows @ columns.T - self.middle) * (self.gamma / 2)) * self.mean

    def products(self, rows: Float[Tensor, "A D"], others: Float[Tensor, "B D"] | None = None) -> Float[Tensor, "A B"]:
        """Phi_rows Phi_othersᵀ in float64, on the CPU; of rows with themselves without `others`.

        That of the centroids is the dual problem, the smaller one whatever the counts: C samples have C + T features.
        """
        others = rows if others is None else others
        found = torch.zeros(len(rows), len(others), device=rows.device)
        row_sums, other_sums = (torch.zeros(len(one), dtype=torch.float64) for one in (rows, others))
        for columns in self.all.split(self.block):
            part = self.deviations(rows, columns)
            other = part if others is rows else self.deviations(others, columns)
            found.addmm_(part, other.T)
            row_sums += _sums(part)
            other_sums += _sums(other)
        # (mean 1 + d_i) · (mean 1 + d_j)
        products = found.cpu().double()
        products += self.mean * row_sums[:, None]
        products += self.mean * other_sums
        products += self.mean**2 * len(self.all)
        return products

    def predict(self, gram: Float[Tensor, "C C"], goals: Float[Tensor, "C D"], alpha: float) -> Float[Tensor, "T D"]:
        """Phi_T Phi_Cᵀ (Phi_C Phi_Cᵀ + alpha I)^-1 Y_C, not normalised. `gram` is used up."""
        gram.diagonal().add_(alpha)
        dual = _solved(gram, goals.cpu().double(), alpha)
        # Phi_Cᵀ dual: a weight for each feature, and their sum for what all features have in common.
        weights = torch.cat([self._transposed(columns, dual) for columns in self.all.split(self.block)])
        common = (self.mean * weights.sum(0)).to(torch.float32).to(goals.device)
        weights = weights.float().to(goals.device)
        found = []
        for rows in self.targets.split(self.block):
            total = common.expand(len(rows), -1).clone()
            for columns, part in zip(self.all.split(self.block), weights.split(self.block), strict=True):
                total += self.deviations(rows, columns) @ part
            found.append(total)
        return torch.cat(found)

    def _transposed(self, columns: Tensor, dual: Tensor) -> Tensor:
        return self.deviations(columns, self.centroids).cpu().double() @ dual + self.mean * dual.sum(0)


def choose_alpha(
    features: KernelFeatures, gram: Float[Tensor, "C C"], goals: Float[Tensor, "C D"], trial: Trial
) -> tuple[float, float]:
    """The alpha with the best mean cosine of the trial's images, each predicted by centroids of the other folds, and
    that cosine; the largest alpha and NaN where there is one prompt alone.
    """
    rows = torch.from_numpy(trial.centroids)
    small, y = gram[rows][:, rows], goals.cpu()[rows].double()
    spread = float(small.diagonal().mean() - small.mean())
    alphas = [penalty * max(spread, 1e-12) for penalty in PENALTIES]
    if not trial.folds.any():
        return alphas[-1], float("nan")
    across = features.products(trial.samples, features.centroids[rows.to(goals.device)])
    truth = trial.targets.cpu().double()
    scores = np.zeros(len(alphas))
    for fold in np.unique(trial.folds):
        held, kept = torch.from_numpy(trial.folds == fold), torch.from_numpy(trial.centroid_folds != fold)
        values, vectors = torch.linalg.eigh(small[kept][:, kept])
        rotated, shown = vectors.T @ y[kept], across[held][:, kept] @ vectors
        for number, alpha in enumerate(alphas):
            predicted = shown @ (rotated / (values.clamp(min=0) + alpha)[:, None])
            scores[number] += float(torch.cosine_similarity(predicted, truth[held], dim=-1).sum())
    best = int(scores.argmax())
    return alphas[best], float(scores[best]) / len(trial.folds)


def _sums(rows: Float[Tensor, "B A"]) -> Float[Tensor, " B"]:
    # In float64, because they stand for the larger part of a product; Apple's MPS has none.
    return (rows.cpu() if rows.device.type == "mps" else rows).sum(1, dtype=torch.float64).cpu()


def _solved(matrix: Tensor, right: Tensor, alpha: float) -> Tensor:
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info):
        raise ValueError(f"refiner.alpha={alpha:g}: so small that the kernel cannot be inverted; leave it out")
    return torch.cholesky_solve(right, factor)
