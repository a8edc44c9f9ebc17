"""SD-IPC as a predictor of prompts' embeddings: a thin bridge from Stable Diffusion's conditions, fitted on texts.

It is offered in both of CLIP's spaces: T, to which an image is converted, and C, which images and texts share anyway
and which is the control: nothing is gained by T that C does not have.

# N = prompts of the bank, M = images, K = width of T or of C, D = width of the embeddings
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from transformers import CLIPTokenizer

from img2prompt.encoders.parts import loaded
from img2prompt.ridge import fit_from_texts
from img2prompt.sdipc.editing import ends_of
from img2prompt.search import nearest

WAYS, SPACES = ("ridge", "nearest"), ("T", "C")
_TEXTS_AT_ONCE = 64


class Bridge:
    """From states of images to unit embeddings of their prompts, by the states of texts and their embeddings alone.

    `way` ridge: a map of the texts' states, applied to those of images. nearest: the mean embedding of the `neighbours`
    texts that are nearest to an image. With the states of some images (`seen`) each kind is centred on its own mean.
    """

    def __init__(
        self,
        way: str,
        neighbours: int,
        texts: Float[Tensor, "N K"],
        targets: Float[Tensor, "N D"],
        seen: Float[Tensor, "M K"] | None,
    ) -> None:
        self.way, self.neighbours, self.targets = way, min(neighbours, len(texts)), targets
        self.centre: Float[Tensor, " K"] | None = None
        if way == "ridge":
            self.weight, self.bias = fit_from_texts(texts, targets, seen)
            return
        self.texts = functional.normalize(texts, dim=-1)
        if seen is not None:
            self.centre = functional.normalize(seen, dim=-1).mean(0)
            self.texts = functional.normalize(self.texts - self.texts.mean(0), dim=-1)

    def __call__(self, images: Float[Tensor, "M K"]) -> Float[Tensor, "M D"]:
        if self.way == "ridge":
            return functional.normalize(images @ self.weight.T + self.bias, dim=-1)
        queries = functional.normalize(images, dim=-1)
        if self.centre is not None:
            queries = functional.normalize(queries - self.centre, dim=-1)
        _, rows = nearest(queries, self.texts, self.neighbours)
        return functional.normalize(self.targets[rows].mean(1), dim=-1)


@torch.inference_mode()
def text_states(
    clip: Any, tokenizer: Any, prompts: Sequence[str], advance: Callable[[int], object] = lambda count: None
) -> Float[Tensor, "N K"]:
    """States of prompts at their end, in T; what is beyond CLIP's length is not read."""
    parts = []
    length = int(clip.config.text_config.max_position_embeddings)
    for start in range(0, len(prompts), _TEXTS_AT_ONCE):
        some = list(prompts[start : start + _TEXTS_AT_ONCE])
        # As Stable Diffusion reads them.
        told = tokenizer(some, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        tokens = told.input_ids.to(clip.device)
        states = clip.text_model(tokens).last_hidden_state
        parts.append(states[torch.arange(len(tokens)), ends_of(tokens, tokenizer.eos_token_id)].float().cpu())
        advance(len(some))
    return torch.cat(parts)


@torch.inference_mode()
def texts_in(space: str, clip: Any, states: Float[Tensor, "N T"]) -> Float[Tensor, "N K"]:
    """States of prompts in T, in one of the spaces."""
    return states if space == "T" else clip.text_projection(states.to(clip.device)).cpu()


@torch.inference_mode()
def images_in(space: str, clip: Any, projector: Any, pixels: Float[Tensor, "M 3 S S"]) -> Float[Tensor, "M K"]:
    """States of images in one of the spaces; `pixels` as CLIP wants them."""
    found = clip.vision_model(pixels).pooler_output.float()
    return (projector(found) if space == "T" else clip.visual_projection(found)).cpu()


def load_tokenizer(name: str, revision: str | None = None) -> Any:
    return loaded("clip", name, CLIPTokenizer, revision=revision)
