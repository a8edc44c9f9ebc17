"""Confidence: the cosine that a prediction can be expected to have with its prompt, learnt from predictions of images
whose prompts are known.

A linear map of what shows how sure a model is, then a monotone curve: isotonic regression of the cosines on the map's
values (Zadrozny and Elkan, 2002). It is judged by folds of prompts, since on its own images any curve looks calibrated.

# N = images, F = features, D = width of an embedding
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import isotonic_regression
from scipy.stats import spearmanr

from img2prompt.files import write_json
from img2prompt.predictions import Prediction
from img2prompt.refine.refiner import fold_numbers

LEAST_IMAGES = 20
# The nearest prompts that are read, however many a prediction lists.
NEIGHBOURS = 5
# nearest: the cosine with the nearest prompt of the bank; margin: how far it is above the mean of the next four;
# agreement: of the views or the members; norm: the length before it is made 1; typical: the cosine with the mean.
FEATURES = ("nearest", "margin", "agreement", "norm", "typical")
_WHENCE = {
    "nearest": f"{NEIGHBOURS} nearest prompts",
    "margin": f"{NEIGHBOURS} nearest prompts",
    "agreement": "an agreement of views or members",
    "norm": "a norm, as a trained regressor's have",
}
_BINS = 10
# Of the number of images, in units of a feature's variance: what is hardly there is hardly used.
_PENALTY = 1e-3
_KNOTS, _LEAST_OF_A_KNOT = 20, 10


@dataclass(frozen=True)
class Reliability:
    """Whether confidences are what they say: their rank correlation with the true cosines (None where either is
    constant), the mean distance of the two over bins of equally many images (None for fewer than 20 images), and the
    bins: mean confidence, mean cosine and number of images. Of a perfect confidence the distance is noise alone, which
    for 100 images is 0.03 where cosines spread by 0.12.
    """

    spearman: float | None
    calibration_error: float | None
    bins: list[dict[str, float]]

    def told(self) -> str:
        """For people."""
        numbers = {"rank correlation": self.spearman, "calibration error": self.calibration_error}
        return ", ".join(f"{name} {'not known' if one is None else f'{one:.4f}'}" for name, one in numbers.items())


@dataclass(frozen=True)
class Confidence:
    """What was learnt: `weights` of the features, and `knots` (their weighted sum, expected cosine), rising, with lines
    between them. `mean` is that of the targets; `of` says which model it is of, as far as that is known; `checked` how
    reliable it was on prompts that it was not fitted to.
    """

    features: list[str]
    weights: list[float]
    mean: list[float]
    knots: list[list[float]]
    images: int
    checked: Reliability
    of: dict[str, Any] = field(default_factory=dict)

    def __call__(self, prediction: Prediction) -> Float[np.ndarray, " N"]:
        """The expected cosine of each image. ValueError where the predictions are of another width, lack what it was
        fitted to, or are means of views or members where those were not: that is another prediction.
        """
        if prediction.embeddings.shape[1] != len(self.mean):
            raise ValueError(
                f"confidence was learnt from embeddings of {len(self.mean)} numbers, these have "
                f"{prediction.embeddings.shape[1]}"
            )
        found = features_of(prediction, np.array(self.mean))
        self.check(found)
        values = np.stack([found[name] for name in self.features], axis=1)
        return _evaluated(values, np.array(self.weights), np.array(self.knots))

    def check(self, features: Collection[str]) -> None:
        """ValueError where predictions have these features, and it was learnt from others."""
        if "agreement" in features and "agreement" not in self.features:
            raise ValueError("confidence was learnt from predictions without views or members, these are means of some")
        lacking = next((name for name in self.features if name not in features), None)
        if lacking is not None:
            raise ValueError(f"confidence was learnt from predictions that had {_WHENCE[lacking]}, these have not")

    def lines(self) -> list[str]:
        """How reliable it is, for people."""
        lowest, highest = self.knots[0][1], self.knots[-1][1]
        return [
            f"confidence, learnt from {self.images} images: cosines of {lowest:.3f} to {highest:.3f}; on prompts that "
            f"it was not fitted to, {self.checked.told()}"
        ]

    def save(self, path: Path) -> None:
        write_json(path, asdict(self))


def features_of(prediction: Prediction, mean: Float[np.ndarray, " D"]) -> dict[str, Float[np.ndarray, " N"]]:
    """Those of `FEATURES` that the columns of the predictions allow; nearest prompts count when there are enough."""
    columns = prediction.columns
    found = {}
    near = columns.get("nearest_cosines")
    if near is not None and all(len(one) >= NEIGHBOURS for one in near):
        best = np.array([one[:NEIGHBOURS] for one in near], dtype=np.float64)
        found = {"nearest": best[:, 0], "margin": best[:, 0] - best[:, 1:].mean(1)}
    for name in ("agreement", "norm"):
        if name in columns:
            found[name] = np.array(columns[name], dtype=np.float64)
            if not np.isfinite(found[name]).all():
                first = prediction.ids[int((~np.isfinite(found[name])).argmax())]
                raise ValueError(f"the {name} of {first} is no number, and confidence is learnt from it")
    length = float(np.linalg.norm(mean))
    return found | {"typical": prediction.embeddings.astype(np.float64) @ mean / (length or 1.0)}


def calibrated(
    prediction: Prediction,
    targets: Float[np.ndarray, "N D"],
    groups: Int[np.ndarray, " N"],
    of: Mapping[str, Any] | None = None,
) -> Confidence:
    """Learns from predictions whose targets are known; images of one of the `groups` have one prompt, and no part of
    the check sees it on both sides. ValueError for fewer than 20 images, or for one prompt alone.
    """
    if len(prediction) < LEAST_IMAGES or len(np.unique(groups)) < 2:
        raise ValueError(
            f"{len(prediction)} images of {len(np.unique(groups))} prompts are too few to learn confidence from; it "
            f"takes {LEAST_IMAGES} images, and two prompts"
        )
    said = prediction.embeddings.astype(np.float64)
    truth = (said * targets).sum(1) / np.linalg.norm(said, axis=1) / np.linalg.norm(targets, axis=1)
    mean = targets.astype(np.float64).mean(0)
    found = features_of(prediction, mean)
    names = [name for name in FEATURES if name in found]
    values = np.stack([found[name] for name in names], axis=1)
    folds = fold_numbers(groups)
    expected = np.empty(len(truth))
    is_constant = False
    for fold in np.unique(folds):
        inside = folds == fold
        line = _fitted(values[~inside], truth[~inside])
        expected[inside] = _evaluated(values[inside], *line)
        is_constant = is_constant or len(line[1]) == 1
    if is_constant:
        # The mean of the other folds, where it is all that is said of one, would be ranked against it.
        expected = np.full(len(truth), truth.mean())
    weights, knots = _fitted(values, truth)
    return Confidence(
        features=names,
        weights=weights.tolist(),
        mean=mean.tolist(),
        knots=knots.tolist(),
        images=len(truth),
        checked=reliability(expected, truth),
        of=dict(of or {}),
    )


def reliability(expected: Float[np.ndarray, " N"], truth: Float[np.ndarray, " N"]) -> Reliability:
    """How far expected and true cosines go together; in bins of fewer than ten images noise would pass for error."""
    varies = np.ptp(expected) > 0 and np.ptp(truth) > 0
    order = np.argsort(expected, kind="stable")
    bins = [
        {"confidence": float(expected[rows].mean()), "cosine": float(truth[rows].mean()), "images": len(rows)}
        for rows in np.array_split(order, max(1, min(_BINS, len(order) // _LEAST_OF_A_KNOT)))
    ]
    distance = sum(abs(one["confidence"] - one["cosine"]) * one["images"] for one in bins) / len(truth)
    rank = float(spearmanr(expected, truth).statistic) if varies else None
    return Reliability(rank, distance if len(bins) > 1 else None, bins)


def read_confidence(path: Path) -> Confidence:
    """ValueError for a file that is none of ours."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        checked = Reliability(**found.pop("checked"))
        read = Confidence(**found, checked=checked)
        weights, mean, knots = (np.array(one, dtype=np.float64) for one in (read.weights, read.mean, read.knots))
        finite = all(bool(np.isfinite(one).all()) for one in (weights, mean, knots))
        rises = knots.shape == (len(knots), 2) and bool((np.diff(knots, axis=0) >= 0).all())
        known = weights.shape == (len(read.features),) and set(read.features) <= set(FEATURES)
        if not (finite and rises and known and mean.ndim == 1 and len(mean) and isinstance(read.of, dict)):
            raise ValueError("its numbers do not fit together")
    except OSError as error:
        raise ValueError(
            f"{path}: no such file ({error.strerror}); img2prompt fit refiner=confidence writes it"
        ) from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: no confidence that img2prompt fit wrote ({str(error)[:120]})") from None
    return read


def _fitted(values: Float[np.ndarray, "N F"], truth: Float[np.ndarray, " N"]) -> tuple[np.ndarray, np.ndarray]:
    """Weights [F], and knots [K, 2] of the curve upon them."""
    scale = values.std(0)
    # What does not vary says nothing.
    scale[scale < 1e-9] = np.inf
    rows = (values - values.mean(0)) / scale
    penalty = _PENALTY * len(rows) * np.eye(rows.shape[1])
    weights = np.linalg.solve(rows.T @ rows + penalty, rows.T @ (truth - truth.mean())) / scale
    return weights, _curve(values @ weights, truth)


def _curve(line: Float[np.ndarray, " N"], truth: Float[np.ndarray, " N"]) -> Float[np.ndarray, "K 2"]:
    """Through means of equally many images, so that a single one bends nothing; equal heights are one knot."""
    parts = np.array_split(np.argsort(line, kind="stable"), max(1, min(_KNOTS, len(line) // _LEAST_OF_A_KNOT)))
    sizes = np.array([len(rows) for rows in parts], dtype=np.float64)
    # Where many images have one value, more than one part lies there.
    places, part = np.unique([line[rows].mean() for rows in parts], return_inverse=True)
    counts = np.bincount(part, sizes)
    heights = np.bincount(part, sizes * [truth[rows].mean() for rows in parts]) / counts
    found = isotonic_regression(heights, weights=counts)
    pooled = zip(found.blocks, found.blocks[1:], strict=False)
    return np.array([[np.average(places[a:b], weights=counts[a:b]), found.x[a]] for a, b in pooled])


def _evaluated(
    values: Float[np.ndarray, "N F"], weights: Float[np.ndarray, " F"], knots: Float[np.ndarray, "K 2"]
) -> Float[np.ndarray, " N"]:
    return np.interp(values @ weights, knots[:, 0], knots[:, 1])
