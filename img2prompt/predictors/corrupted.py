"""A predictor that sees its images after something has happened to them: what the robustness card measures."""

from typing import Any

from jaxtyping import UInt8
from torch import Tensor

from img2prompt.data.corruptions import corrupted
from img2prompt.predictions import Prediction
from img2prompt.predictors.predictor import Predictor


class Corrupted(Predictor):
    """`inner`, whose images go through one of `CORRUPTIONS` first."""

    def __init__(self, inner: Predictor, corruption: str) -> None:
        self.inner, self.corruption = inner, corruption
        self.dimension, self.target = inner.dimension, inner.target

    def prepare(self, image: UInt8[Tensor, "3 H W"]) -> Any:
        return self.inner.prepare(corrupted(image, self.corruption))

    def predict_batch(self, ids: list[str], prepared: list[Any]) -> Prediction:
        return self.inner.predict_batch(ids, prepared)
