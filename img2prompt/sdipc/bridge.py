"""SD-IPC as a predictor of prompts' embeddings: a thin bridge from Stable Diffusion's conditions, fitted on texts.

It is offered in both of CLIP's spaces: T, to which an image is converted, and C, which images and texts share anyway
and which is the control: nothing is gained by T that C does not have.

# N = prompts of the bank, M = images, K = width of T or of C, D = width of the embeddings
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
# The mean of fewer images is too much their own.
_FEWEST_TO_CENTRE = 20


@dataclass(frozen=True)
class Bridge:
    """`way` ridge: a map of texts' states to their embeddings, applied to those of images. nearest: the mean embedding
    of the `neighbours` prompts that are nearest to an image.
    """

    name: str
    way: str = "ridge"
    space: str = "T"
    neighbours: int = 10

    def __post_init__(self) -> None:
        for key, choices in (("way", WAYS), ("space", SPACES)):
            if getattr(self, key) not in choices:
                raise ValueError(f"predictor.{key}={getattr(self, key)}: must be one of {', '.join(choices)}")
        if self.neighbours < 1:
            raise ValueError(f"predictor.neighbours must be at least 1, got {self.neighbours}")


def bridged(
    how: Bridge, texts: Float[Tensor, "N K"], targets: Float[Tensor, "N D"], images: Float[Tensor, "M K"]
) -> Float[Tensor, "M D"]:
    """Unit embeddings of images, whose states are in the space of the texts'. From some twenty images on, each kind is
    centred on its own mean, so that what is said of an image depends on which others are with it.
    """
    are_many = len(images) >= _FEWEST_TO_CENTRE
    if how.way == "ridge":
        weight, bias = fit_from_texts(texts, targets, images if are_many else None)
        return functional.normalize(images @ weight.T + bias, dim=-1)
    bank, queries = (functional.normalize(one, dim=-1) for one in (texts, images))
    if are_many:
        bank, queries = (functional.normalize(one - one.mean(0), dim=-1) for one in (bank, queries))
    _, rows = nearest(queries, bank, min(how.neighbours, len(bank)))
    return functional.normalize(targets[rows].mean(1), dim=-1)


@torch.inference_mode()
def text_states(clip: Any, tokenizer: Any, prompts: Sequence[str]) -> dict[str, Float[Tensor, "N K"]]:
    """States of prompts at their end, in each space; what is beyond CLIP's length is not read."""
    parts = []
    for start in range(0, len(prompts), _TEXTS_AT_ONCE):
        some = list(prompts[start : start + _TEXTS_AT_ONCE])
        # As Stable Diffusion reads them.
        told = tokenizer(some, padding="max_length", truncation=True, max_length=_length(clip), return_tensors="pt")
        tokens = told.input_ids.to(clip.device)
        states = clip.text_model(tokens).last_hidden_state
        parts.append(states[torch.arange(len(tokens)), ends_of(tokens, tokenizer.eos_token_id)])
    found = torch.cat(parts).float()
    return {"T": found.cpu(), "C": clip.text_projection(found).cpu()}


@torch.inference_mode()
def image_states(clip: Any, projector: Any, pixels: Iterator[Tensor]) -> dict[str, Float[Tensor, "M K"]]:
    """States of images in each space; `pixels` are batches as CLIP wants them."""
    found = torch.cat([clip.vision_model(batch).pooler_output.float() for batch in pixels])
    return {"T": projector(found).cpu(), "C": clip.visual_projection(found).cpu()}


def load_tokenizer(name: str) -> Any:
    return loaded("clip", name, CLIPTokenizer)


def _length(clip: Any) -> int:
    return int(clip.config.text_config.max_position_embeddings)
