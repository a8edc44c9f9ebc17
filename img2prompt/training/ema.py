"""The exponential moving average of the weights, which is what validates and is kept."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class Ema:
    """Averages the parameters of `module` that require gradients, and the statistics of its BatchNorm layers: after
    step t (from 0), average = d average + (1 - d) weight with d = min(decay, (1 + t) / (10 + t)), so that a short run
    is not held back by its beginning.
    """

    def __init__(self, module: nn.Module, decay: float, averages: Mapping[str, Tensor] | None = None) -> None:
        self.decay = decay
        trained = {name: parameter.data for name, parameter in module.named_parameters() if parameter.requires_grad}
        for prefix, layer in module.named_modules():
            if isinstance(layer, _BatchNorm):
                buffers = layer.named_buffers(prefix, recurse=False)
                trained |= {name: buffer for name, buffer in buffers if buffer.is_floating_point()}
        self._weights = list(trained.values())
        self.averages = {name: weight.clone() for name, weight in trained.items()}
        for name, average in (averages or {}).items():
            self.averages[name].copy_(average)

    def decay_at(self, step: int) -> float:
        return min(self.decay, (1 + step) / (10 + step))

    def update(self, step: int) -> None:
        torch._foreach_lerp_(list(self.averages.values()), self._weights, 1 - self.decay_at(step))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it the module has the averaged weights."""
        kept = [weight.clone() for weight in self._weights]
        for weight, average in zip(self._weights, self.averages.values(), strict=True):
            weight.copy_(average)
        try:
            yield
        finally:
            for weight, before in zip(self._weights, kept, strict=True):
                weight.copy_(before)
