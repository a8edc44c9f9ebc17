"""Attention on a CPU in bfloat16, without a copy of its weights for every token.

nn.MultiheadAttention turns its batches round, and of what then lies scattered in memory torch makes a product for each
token, for which bfloat16 weights are copied as often (torch 2.15): a ViT is slowed down ten times, where it should be
twice as fast.
"""

from typing import Any

from torch import nn


def sequence_first(module: nn.Module) -> None:
    """Has every attention of `module` that takes [B, N, E] turn its inputs round by itself, and lay them out anew."""
    for one in module.modules():
        if isinstance(one, nn.MultiheadAttention) and one.batch_first:
            one.batch_first = False
            one.register_forward_pre_hook(_turned)
            one.register_forward_hook(_turned_back)


def _turned(attention: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    query, *others = arguments
    turned = {id(one): one.transpose(0, 1).contiguous() for one in (query, *others)}
    # What was one tensor stays one: then the three maps are one product.
    return tuple(turned[id(one)] for one in (query, *others))


def _turned_back(attention: nn.Module, arguments: Any, output: tuple[Any, Any]) -> tuple[Any, Any]:
    return output[0].transpose(0, 1), output[1]
