"""Deep prompts: tokens that are learnt, and put among those of an image before each layer of CLIP's image tower (Jia et
al., Visual Prompt Tuning, 2022; SD-IPC-FT has them).

# B = images in the batch, S = side of an image, V = width of its state, L = layers, P = prompts of a layer
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def prompted_states(
    vision: Any, pixels: Float[Tensor, "B 3 S S"], prompts: Float[Tensor, "L P V"]
) -> Float[Tensor, "B V"]:
    """The state of images where each layer sees its own prompts behind the class token, and every patch as ever."""
    tokens = vision.pre_layrnorm(vision.embeddings(pixels))
    for layer, own in zip(vision.encoder.layers, prompts, strict=True):
        among = torch.cat([tokens[:, :1], own.expand(len(tokens), -1, -1), tokens[:, 1:]], dim=1)
        said = layer(among, None)
        tokens = torch.cat([said[:, :1], said[:, 1 + len(own) :]], dim=1)
    return vision.post_layernorm(tokens[:, 0])
