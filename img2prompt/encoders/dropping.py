"""What is left out while an encoder trains: patches of an image, and whole blocks."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.layers import PatchDropout, PatchDropoutWithIndices
from timm.models.eva import Eva
from torch import Tensor, nn


def drop_patches(model: Any, rate: float) -> None:
    """Lets a timm transformer train on a random part of each image's patches (Li et al., FLIP, 2023)."""
    # Rotary positions have to follow the patches that stay.
    kind = PatchDropoutWithIndices if isinstance(model, Eva) else PatchDropout
    nothing = None if isinstance(model, Eva) else nn.Identity()
    model.patch_drop = kind(rate, model.num_prefix_tokens).train(model.training) if rate else nothing


def drop_blocks(blocks: Sequence[nn.Module], rate: float) -> None:
    """Lets residual blocks be left out at random, image by image: the last at `rate`, those before it less, the first
    never (stochastic depth, Huang et al., 2016; its linear rule).
    """
    for number, block in enumerate(blocks):
        block.register_forward_hook(_dropping(rate * number / max(1, len(blocks) - 1)))


def _dropping(rate: float) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    def hook(block: nn.Module, args: Any, after: Tensor) -> Tensor:
        if not block.training or rate == 0:
            return after
        before = args[0]
        stays = torch.rand(len(after), *[1] * (after.ndim - 1), device=after.device) >= rate
        return before + (after - before) * stays / (1 - rate)

    return hook
