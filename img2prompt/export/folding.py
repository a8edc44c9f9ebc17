"""A head as plain layers: what normalises is folded into the weights, and so is a projection before it.

Other tools have linear layers and activations; most have no BatchNorm among their layers upon features.

# E = width of the features, P = width before a projection, D = width of the embedding
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from img2prompt.heads import MLP, DeepMLP, Head, JointVocabulary, Linear

ACTIVATIONS = (nn.ReLU, nn.GELU)


@dataclass
class Layer:
    """x -> activation(weight x + bias), or without an activation."""

    weight: Tensor
    bias: Tensor
    activation: type[nn.Module] | None = None


def folded(head: Head, projection: Float[Tensor, "E P"] | None = None) -> list[Layer]:
    """The layers of the head as it is after training, in float32; `projection` is what is applied to the features
    before them. Unit length is left to the caller. ValueError for a head that is more than layers upon the pooled
    features.
    """
    if head.layers or head.reads_tokens:
        raise ValueError(
            f"the head ({type(head).__name__}) reads more than the pooled features, and cannot be folded; "
            "format=onnx takes any head"
        )
    inner: Head = head.embed if isinstance(head, JointVocabulary) else head
    if isinstance(inner, Linear):
        weight, bias = inner.affine()
        layers = [Layer(weight.double(), bias.double())]
    elif isinstance(inner, MLP | DeepMLP):
        layers = _of_steps(inner.map)
    else:
        raise ValueError(f"the head {type(inner).__name__} cannot be folded; format=onnx takes any head")
    if projection is not None:
        layers[0].weight = layers[0].weight @ projection.double()
    return [Layer(one.weight.float().cpu(), one.bias.float().cpu(), one.activation) for one in layers]


def _of_steps(steps: nn.Sequential) -> list[Layer]:
    layers: list[Layer] = []
    # What BatchNorm does to an activation is done by the next layer.
    waiting: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    for step in steps:
        if isinstance(step, nn.Linear):
            weight, bias = step.weight.detach().double(), step.bias.detach().double()
            layers.append(Layer(*(waiting(weight, bias) if waiting else (weight, bias))))
            waiting = None
        elif isinstance(step, _BatchNorm):
            scale, shift = _scale_and_shift(step)
            last = layers[-1]
            if last.activation is None:
                last.weight, last.bias = last.weight * scale[:, None], last.bias * scale + shift
            else:
                waiting = _before(scale, shift)
        elif isinstance(step, ACTIVATIONS):
            layers[-1].activation = type(step)
        elif not isinstance(step, nn.Dropout | nn.Identity):
            raise ValueError(
                f"the head has a {type(step).__name__}, which cannot be folded; format=onnx takes any head"
            )
    return layers


def _before(scale: Tensor, shift: Tensor) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return lambda weight, bias: (weight * scale[None], bias + weight @ shift)


def _scale_and_shift(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """What BatchNorm does when it is not training: scale x + shift."""
    assert norm.running_mean is not None and norm.running_var is not None
    scale = norm.weight.detach().double() / torch.sqrt(norm.running_var.double() + norm.eps)
    return scale, norm.bias.detach().double() - norm.running_mean.double() * scale
