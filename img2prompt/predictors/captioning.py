"""Captioners as predictors: what a model says of an image, and the embedding of that."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import UInt8
from torch import Tensor

from img2prompt.data.targets import TextEncoder
from img2prompt.predictions import Prediction
from img2prompt.predictors.predictor import Predictor, Setting


class Captioning(Predictor):
    """Embeddings of captions, with a column `caption`. `fit` makes an image ready, in any thread; `say` says something
    of each of several.
    """

    def __init__(
        self,
        fit: Callable[[UInt8[Tensor, "3 H W"]], Any],
        say: Callable[[Sequence[Any]], list[str]],
        setting: Setting,
    ) -> None:
        self._fit, self._say, self._setting = fit, say, setting
        self.dimension = self._words.dimension
        self.target = setting.target(self.dimension)

    @cached_property
    def _words(self) -> TextEncoder:
        return TextEncoder(self._setting.text, self._setting.device, "fp32")

    def prepare(self, image: UInt8[Tensor, "3 H W"]) -> Any:
        return self._fit(image)

    def predict_batch(self, ids: list[str], prepared: list[Any]) -> Prediction:
        captions = [" ".join(caption.split()) for caption in self._say(prepared)] if prepared else []
        embeddings = self._words.embed(captions) if captions else np.zeros((0, self.dimension), np.float32)
        return Prediction(ids, embeddings, {"caption": captions})
