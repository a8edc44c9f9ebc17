"""The text tower that belongs to an image tower of open_clip: prompts become features in the space of its images."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import open_clip
import torch
from jaxtyping import Float
from open_clip.model import _build_text_tower
from torch import Tensor, nn

from img2prompt.encoders.encoder import Uninitialised, load_strictly

_BATCH = 64


def text_tower_refusal(name: str) -> str | None:
    """Why the prompts of model `name` cannot be encoded; None where they can."""
    config = open_clip.get_model_config(name)["text_cfg"]
    if "hf_model_name" in config or "hf_tokenizer_name" in config:
        return "its text tower has a tokenizer on the Hub, which is not fetched"
    return None


def build_text_tower(name: str, quick_gelu: bool, weights: Mapping[str, Tensor], where: str) -> nn.Module:
    """The text tower of model `name`, with those of the whole model's `weights` that are its own; ValueError names
    `where` if they are not all there.
    """
    config: dict[str, Any] = open_clip.get_model_config(name)
    with Uninitialised():
        tower = _build_text_tower(config["embed_dim"], config["text_cfg"], quick_gelu=quick_gelu)
    own = text_weights(weights)
    load_strictly(tower, {key: own[key] for key in tower.state_dict() if key in own}, where)
    return tower.eval()


def text_weights(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a whole model that may be its text tower's, under the tower's names; empty of an image tower alone."""
    prefixed = {key.removeprefix("text."): value for key, value in weights.items() if key.startswith("text.")}
    # The first CLIP models keep the text tower's tensors beside the image tower, under no name of their own.
    found = prefixed or {key: value for key, value in weights.items() if not key.startswith("visual.")}
    return found if "token_embedding.weight" in found else {}


@torch.no_grad()
def text_features(
    tower: nn.Module,
    name: str,
    prompts: Sequence[str],
    device: str,
    advance: Callable[[int], object],
    is_bf16: bool | None = None,
) -> Float[Tensor, "N E"]:
    """Features of the prompts, in float32 on the CPU; what is longer than the tower reads is cut off. Computed in
    bfloat16 or not, by default where there is a GPU.
    """
    kind = torch.device(device).type
    tokenizer: Any = open_clip.get_tokenizer(name)
    tower = tower.to(device)
    parts = []
    for first in range(0, len(prompts), _BATCH):
        tokens = tokenizer(list(prompts[first : first + _BATCH])).to(device)
        with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda" if is_bf16 is None else is_bf16):
            parts.append(tower(tokens).float().cpu())
        advance(len(tokens))
    return torch.cat(parts)
