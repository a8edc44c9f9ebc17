"""The rungs that are solved and not trained, before any step: the mean, and what texts alone tell."""

import torch
from torch.nn import functional

from img2prompt.build import build
from img2prompt.encoders.encoder import Encoder
from img2prompt.regressor import Regressor, build_regressor
from img2prompt.ridge import fit_from_texts
from img2prompt.training.scoring import features_of
from img2prompt.training.stages import Climb, Stage, Start
from img2prompt.training.words import fit_words


class Mean(Stage):
    """The mean training embedding for every image: what a score is worth without looking."""

    name = "mean"

    def run(self, climb: Climb) -> Regressor:
        encoder = build({"_target_": "img2prompt.encoders.blind.Blind"}, Encoder)
        constant = build_regressor(encoder, {"_target_": "img2prompt.heads.Linear"}, climb.regressor.target)
        mean = climb.regressor.target_mean.cpu()
        constant.target_mean.copy_(mean)
        constant.head.set_affine(torch.zeros(len(mean), 0), mean)
        return constant.to(climb.regressor.target_mean.device)


class TextOnly(Stage):
    """Ridge from features of the training prompts to targets, as if they were features of images: CLIP has both in one
    space. Its map becomes the head before any image is seen (the initialisation of the competition's seventh place).

    Features of texts and of images lie apart. Without an image the map has no intercept, so that lengths do not matter;
    with `images` of them, of which no prompt is read, each kind is centred on its own mean.
    """

    name = "text_only"

    def __init__(self, images: int = 0) -> None:
        if images < 0:
            raise ValueError(f"stages.text_only.images must be at least 0, got {images}")
        self.images = images

    def refusal(self, start: Start) -> str | None:
        if start.has_head:
            return "init_from brings its own head"
        if not start.pretrained:
            return "the encoder has no pretrained weights: its features mean nothing yet"
        return start.no_text if start.is_affine else "the head is no linear map"

    def run(self, climb: Climb) -> Regressor:
        data, head = climb.data, climb.regressor.head
        first = {data.samples[row].prompt: row for row in reversed(data.train_rows.tolist())}
        prompts, rows = list(first), list(first.values())
        texts, seen = climb.text_features(prompts), None
        if self.images:
            chosen = data.train_rows[: self.images].tolist()
            seen = features_of(climb.regressor, data, chosen, climb.bf16)[1][:, : texts.shape[1]]
        weight, bias = fit_from_texts(texts, data.targets[rows], seen)
        # Of what the head reads besides, texts say nothing.
        more = climb.regressor.encoder.widths(head.layers, False)[0] - weight.shape[1]
        head.set_affine(functional.pad(weight, (0, more)), bias)
        if data.labels is not None:
            if seen is not None:
                # Where images lie, as the map expects them.
                unit = functional.normalize(texts, dim=-1)
                texts = (unit - unit.mean(0)) * seen.norm(dim=-1).mean() + seen.mean(0)
            fit_words(head, functional.pad(texts, (0, more)), rows, data.labels)
        climb.head_is_fitted = True
        return climb.regressor
