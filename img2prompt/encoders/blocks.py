"""The order in which an image meets the parameters of an encoder, as its own library tells it: input, block by block.

What learns slower the deeper it lies, and what is frozen, is decided by this order.
"""

from collections.abc import Sequence
from typing import Any

from timm.models import group_parameters
from torch import nn


def of_modules(
    model: nn.Module, blocks: Sequence[nn.Module], last: Sequence[nn.Parameter] = ()
) -> list[list[nn.Parameter]]:
    """One group for what comes before `blocks`, then one for each; what lies between two belongs to the later, what
    follows the last, and the parameters `last`, to the last.
    """
    number = {id(parameter): i for i, block in enumerate(blocks, 1) for parameter in block.parameters()}
    groups: list[list[nn.Parameter]] = [[] for _ in range(len(blocks) + 1)]
    ends = {id(parameter) for parameter in last}
    place = 0
    for parameter in model.parameters():
        if id(parameter) in ends:
            groups[-1].append(parameter)
        elif id(parameter) in number:
            place = number[id(parameter)]
            groups[place].append(parameter)
        else:
            # Before the first block, or on the way to the next one.
            groups[min(place + 1, len(blocks)) if place else 0].append(parameter)
    return groups


def has_tokens(model: Any) -> bool:
    """Whether a timm model hands a sequence of tokens on from block to block, of which some may be missing."""
    return hasattr(model, "patch_drop")


def modules_of_timm(model: Any) -> list[nn.Module]:
    """The blocks of a timm transformer, the stages of its other models."""
    for name in ("blocks", "stages", "layers"):
        if isinstance(getattr(model, name, None), nn.Sequential | nn.ModuleList):
            return list(getattr(model, name))
    return []


def of_timm(model: Any) -> list[list[nn.Parameter]]:
    """The layers of a timm model, which each of them names for itself."""
    groups: Any = group_parameters(model, model.group_matcher(coarse=False), return_values=True)
    return [groups[number] for number in sorted(groups)]
