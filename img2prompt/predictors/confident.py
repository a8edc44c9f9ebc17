"""A predictor that says of each image how near the truth it expects to be."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtyping import UInt8
from torch import Tensor

from img2prompt.predictions import Prediction
from img2prompt.predictors.predictor import Predictor
from img2prompt.refine.confidence import Confidence


class Confident(Predictor):
    """`inner` with a column `confidence`: the expected cosine of each prediction with its prompt. Of the nearest
    prompts, which it may read, `top_k` are left.
    """

    def __init__(self, inner: Predictor, confidence: Confidence, file: Path, top_k: int) -> None:
        self.inner, self.confidence, self.top_k = inner, confidence, top_k
        self.dimension, self.target, self.bank = inner.dimension, inner.target, inner.bank
        self.mean, self.mean_of, self.files = inner.mean, inner.mean_of, [*inner.files, file]

    def controls(self) -> Mapping[str, Predictor]:
        return self.inner.controls()

    def prepare(self, image: UInt8[Tensor, "3 H W"]) -> Any:
        return self.inner.prepare(image)

    def predict_batch(self, ids: list[str], prepared: list[Any]) -> Prediction:
        found = self.inner.predict_batch(ids, prepared)
        found.columns["confidence"] = self.confidence(found).tolist() if ids else []
        for name in ("nearest_prompts", "nearest_cosines"):
            if self.top_k < 1:
                found.columns.pop(name, None)
            elif name in found.columns:
                found.columns[name] = [one[: self.top_k] for one in found.columns[name]]
        return found
