"""Conditions that are changed: by words beside the image (equation 8 of Ding et al., 2023), or by further images.

# B = images, T = tokens, K = width of a text's state
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

ALPHA = 0.9


def edited(
    text: Float[Tensor, "B T K"], ends: Int[Tensor, " B"], converted: Float[Tensor, "B K"], alpha: float = ALPHA
) -> Float[Tensor, "B T K"]:
    """Equation 8: the states of a text before its end, and from its end on `alpha` times those that are there and what
    the image was converted to. `ends` are the places of the end of each text, which need not be alike.
    """
    image = converted[:, None].to(text.dtype)
    behind = torch.arange(text.shape[1], device=text.device) >= ends[:, None].to(text.device)
    return torch.where(behind[..., None], image + alpha * text, text)


def blended(converted: Float[Tensor, "B K"]) -> Float[Tensor, "1 K"]:
    """One condition of several images: the mean of their directions, with the length that they have. ValueError when
    they cancel each other out.
    """
    if len(converted) == 1:
        return converted
    mean = functional.normalize(converted.float(), dim=-1).mean(0, keepdim=True)
    if mean.norm() < 1e-6:
        raise ValueError("the images cancel each other out; leave one of them out")
    return (functional.normalize(mean, dim=-1) * converted.float().norm(dim=-1).mean()).to(converted.dtype)


def ends_of(tokens: Int[Tensor, "B T"], end: int) -> Int[Tensor, " B"]:
    """Where each text ends: the first place of the token `end`. ValueError when one has none."""
    found = tokens == end
    if not found.any(dim=1).all():
        raise ValueError("a text has no end token")
    return found.int().argmax(dim=1)
