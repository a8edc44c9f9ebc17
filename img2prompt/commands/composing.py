"""A composed prompt for each prediction, by the predictor's bank and the text encoder of its target."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float

from img2prompt.compose import Modifiers, compose, modifiers_of
from img2prompt.data.targets import TextEncoder, embeddings_of, locate
from img2prompt.predictions import Prediction
from img2prompt.predictors.predictor import Predictor, Setting, text_model_of

# Images that are searched together: their prompts fill the batches of the text encoder.
_AT_ONCE = 64


@dataclass(frozen=True)
class Composing:
    """How prompts are composed: beams that are kept, and the phrases of a prompt at most."""

    beams: int
    phrases: int

    def __post_init__(self) -> None:
        for key, value in (("compose_beams", self.beams), ("compose_phrases", self.phrases)):
            if value < 1:
                raise ValueError(f"{key} must be at least 1, got {value}")


class Composer:
    """Composes prompts for the predictions of one predictor, by this text encoder where it is loaded already.
    ValueError where there is no bank.
    """

    def __init__(
        self, how: Composing, predictor: Predictor, setting: Setting, encoder: TextEncoder | None = None
    ) -> None:
        if predictor.bank is None or not predictor.bank.prompts:
            raise ValueError(
                "compose=true: there is no bank of prompts to take phrases from; a run has its own in bank.parquet, "
                "beside its checkpoints folder"
            )
        self.how, self.bank, self.setting = how, predictor.bank, setting
        self.model = text_model_of(predictor, setting)
        texts = modifiers_of(self.bank.prompts)
        # With a prompt of the bank, so that there is an embedding where there is no modifier.
        embeddings = embeddings_of([*texts, self.bank.prompts[0]], self.model, "fp32", setting.device, setting.cache)
        if embeddings.shape[1] != predictor.dimension:
            raise ValueError(
                f"{self.model.name} has dimension {embeddings.shape[1]}, the predictions {predictor.dimension}"
            )
        self.modifiers = Modifiers(texts, torch.from_numpy(embeddings[:-1]).to(self.bank.embeddings.device))
        self._encoder = encoder

    def options(self) -> list[str | int]:
        """What the composed prompts depend on besides the bank."""
        return ["compose", self.how.beams, self.how.phrases, self.model.name, str(self.model.revision)]

    def add_to(self, prediction: Prediction) -> None:
        """The columns `composed_prompt` and `composed_cosine`."""
        found = [
            one
            for part in torch.from_numpy(prediction.embeddings).split(_AT_ONCE)
            for one in compose(part, self.bank, self.modifiers, self._encode, self.how.beams, self.how.phrases)
        ]
        prediction.columns["composed_prompt"] = [one.prompt for one in found]
        prediction.columns["composed_cosine"] = [one.cosine for one in found]

    def _encode(self, texts: list[str]) -> Float[np.ndarray, "N D"]:
        if self._encoder is None:
            # What was to be downloaded is here by now.
            self._encoder = TextEncoder(locate(self.model.name, self.model.revision), self.setting.device)
        return self._encoder.embed(texts)
