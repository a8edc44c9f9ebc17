"""Test-time views: an image is predicted as several pictures of it, and the mean of what they say is its prediction."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from img2prompt.predictions import Prediction
from img2prompt.predictors.predictor import Predictor, nearest_columns

# flip: mirrored. crops: four corners and the middle. sizes: the middle, which is seen larger.
VIEWS = ("flip", "crops", "sizes")
# Shares of each side.
_CROP, _ZOOM = 0.875, 0.75


class Views(Predictor):
    """A predictor that sees the whole image and these views of it. The columns are those of the whole, but for the
    nearest prompts, which are those of the mean, and `agreement`: the mean cosine of the views with it.
    """

    def __init__(self, inner: Predictor, views: Sequence[str], top_k: int) -> None:
        self.inner, self.views, self.top_k = inner, tuple(views), top_k
        self.dimension, self.target, self.bank = inner.dimension, inner.target, inner.bank
        self.mean, self.mean_of, self.files = inner.mean, inner.mean_of, inner.files

    def controls(self) -> Mapping[str, Predictor]:
        seen_once = {"the whole image alone": self.inner}
        return seen_once | {name: Views(one, self.views, self.top_k) for name, one in self.inner.controls().items()}

    def prepare(self, image: UInt8[Tensor, "3 H W"]) -> list[Any]:
        return [self.inner.prepare(view) for view in views_of(image, self.views)]

    def predict_batch(self, ids: list[str], prepared: list[list[Any]]) -> Prediction:
        if not ids:
            return self._with_agreement(self.inner.predict_batch([], []), [])
        each = len(prepared[0])
        # As many at once as without views.
        parts = []
        for view in range(each):
            parts.append(self.inner.predict_batch(ids, [own[view] for own in prepared]))
        stacked = np.stack([part.embeddings for part in parts])
        mean = stacked.mean(0)
        mean /= np.linalg.norm(mean, axis=1, keepdims=True).clip(min=1e-12)
        found = Prediction(ids, mean.astype(np.float32), parts[0].columns)
        return self._with_agreement(found, (stacked * mean).sum(-1).mean(0).tolist())

    def _with_agreement(self, found: Prediction, agreement: list[float]) -> Prediction:
        if "nearest_prompts" in found.columns:
            found.columns |= nearest_columns(self.bank, torch.from_numpy(found.embeddings), self.top_k)
        found.columns["agreement"] = agreement
        return found


def views_of(image: UInt8[Tensor, "3 H W"], names: Sequence[str]) -> list[UInt8[Tensor, "3 _ _"]]:
    """The whole image, and its views in the order of `VIEWS`; mirrored are all of them."""
    found = [image]
    if "crops" in names:
        found += [_cut(image, _CROP, top, left) for top, left in ((0, 0), (0, 1), (1, 0), (1, 1), (0.5, 0.5))]
    if "sizes" in names:
        found.append(_cut(image, _ZOOM, 0.5, 0.5))
    if "flip" in names:
        found += [view.flip(-1) for view in found]
    return [_as_decoded(view) for view in found]


def _as_decoded(view: Tensor) -> Tensor:
    """With its colours beside each other in memory: from other orders torch resizes bytes to a single pixel wrongly."""
    return view.permute(1, 2, 0).contiguous().permute(2, 0, 1)


def _cut(image: Tensor, share: float, top: float, left: float) -> Tensor:
    """A part of so much of each side, with so much of the rest above it and on its left."""
    height, width = image.shape[1:]
    high, wide = (max(1, round(share * length)) for length in (height, width))
    first, second = round(top * (height - high)), round(left * (width - wide))
    return image[:, first : first + high, second : second + wide]
