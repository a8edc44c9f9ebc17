"""What is known of the images that are predicted: their prompts, by which predictions are scored."""

import sys
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from img2prompt.data.kaggle import read_prompts
from img2prompt.data.listing import Listing
from img2prompt.data.prompts import prompt_key, prompt_numbers
from img2prompt.data.targets import embeddings_of
from img2prompt.metrics import bootstrap_interval, cosines
from img2prompt.predictions import Prediction
from img2prompt.predictors.predictor import Predictor, Setting, predict_files, text_model_of


class Truth:
    """The prompts that predictions are scored against."""

    def __init__(self, path: str, predictor: Predictor, setting: Setting) -> None:
        self.path, self.predictor, self.setting = path, predictor, setting
        self.prompts = {image_id: prompt for image_id, prompt in read_prompts(path) if prompt.strip()}
        self.model = text_model_of(predictor, setting)
        self.targets: dict[str, np.ndarray] = {}

    def embed(self, listing: Listing) -> None:
        """The targets of the images that are listed; ValueError when none has a prompt: the ids are others."""
        ids = [file.id for file in listing.files if file.id in self.prompts]
        if listing.files and not ids:
            raise ValueError(
                f"prompts={self.path}: none of its {len(self.prompts)} imgIds with a prompt (first: "
                f"{next(iter(self.prompts), None)}) is the id of an image (first: {listing.files[0].id})"
            )
        texts = [self.prompts[one] for one in ids]
        embeddings = embeddings_of(texts, self.model, "fp32", self.setting.device, self.setting.cache)
        if embeddings.shape[1] != self.predictor.dimension:
            raise ValueError(
                f"{self.model.name} has dimension {embeddings.shape[1]}, the predictions {self.predictor.dimension}"
            )
        self.targets = dict(zip(ids, embeddings, strict=True))
        known = {prompt_key(prompt) for prompt in self.predictor.bank.prompts} if self.predictor.bank else set()
        seen = sum(prompt_key(text) in known for text in texts)
        if seen:
            print(f"{seen} of these images have a prompt of the bank: their scores are too good", file=sys.stderr)

    def print_score(self, parts: Iterable[Prediction]) -> None:
        found, targets, prompts = self._scored(parts)
        if not len(found):
            print(f"none of the images that could be read has a prompt in {self.path}", file=sys.stderr)
            return
        values = cosines(found, targets)
        low, high = bootstrap_interval(values, prompt_numbers(prompts))
        # What a model must beat that looks at no image; of what has learnt from no prompts, the mean of what it says.
        mean, whose = self.predictor.mean, self.predictor.mean_of
        if mean is None:
            mean, whose = found.mean(0), "the predictions"
        constant = cosines(mean.expand_as(targets), targets)
        print(
            f"mean cosine {values.mean():.4f} (95 % interval {low:.4f} to {high:.4f}) over {len(values)} images; "
            f"constant mean of {whose} {constant.mean():.4f}"
        )

    def print_controls(self, listing: Listing, batch_size: int, threads: int) -> None:
        """The scores of what stands beside the predictor."""
        files = [file for file in listing.files if file.id in self.targets]
        for name, control in self.predictor.controls().items():
            found, targets, prompts = self._scored(predict_files(control, files, batch_size, threads))
            if len(found):
                values = cosines(found, targets)
                low, high = bootstrap_interval(values, prompt_numbers(prompts))
                print(f"  beside it, {name}: {values.mean():.4f} ({low:.4f} to {high:.4f})")

    def _scored(self, parts: Iterable[Prediction]) -> tuple[Float[Tensor, "N D"], Float[Tensor, "N D"], list[str]]:
        """Predictions that have a target, these targets, and their prompts."""
        found: list[Any] = [np.zeros((0, self.predictor.dimension), np.float32)]
        targets: list[Any] = [np.zeros((0, self.predictor.dimension), np.float32)]
        prompts: list[str] = []
        for part in parts:
            rows = [row for row, image_id in enumerate(part.ids) if image_id in self.targets]
            if rows:
                prompts += [self.prompts[part.ids[row]] for row in rows]
                found.append(part.embeddings[rows])
                targets.append(np.stack([self.targets[part.ids[row]] for row in rows]))
        return torch.from_numpy(np.concatenate(found)), torch.from_numpy(np.concatenate(targets)), prompts
