"""The optimiser: which parameter learns how fast, and how that changes over a run."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from img2prompt.regressor import Regressor


@dataclass(frozen=True)
class AdamW:
    """AdamW with warm-up and cosine decay to zero, exactly as long as the run.

    `lr` is the encoder's peak; None chooses `lr_pretrained` or `lr_scratch` by whether the encoder brings weights,
    because what trains one ruins the other. The head of a pretrained encoder learns `head_lr_factor` times as fast, and
    each of its blocks `layer_decay` times as fast as the block above it (Bao et al., BEiT, 2021).
    Norms and biases (all that has one dimension) do not decay. With `ema_decay` the moving average of the weights is
    what validates and is kept (see `Ema`).
    """

    lr: float | None = None
    lr_pretrained: float = 3e-5
    lr_scratch: float = 3e-3
    head_lr_factor: float = 10.0
    layer_decay: float = 1.0
    weight_decay: float = 0.05
    betas: Sequence[float] = (0.9, 0.999)
    warmup_fraction: float = 0.1
    ema_decay: float | None = None

    def __post_init__(self) -> None:
        for name in ("lr", "lr_pretrained", "lr_scratch", "head_lr_factor"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"optim.{name} must be at least 0, got {getattr(self, name)}")
        if len(self.betas) != 2 or not all(isinstance(beta, int | float) and 0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optim.betas must be two numbers from 0 to below 1, got {list(self.betas)}")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"optim.layer_decay must be above 0 and at most 1, got {self.layer_decay}")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"optim.ema_decay must be from 0 to below 1, or null, got {self.ema_decay}")
        if self.weight_decay < 0:
            raise ValueError(f"optim.weight_decay must be at least 0, got {self.weight_decay}")
        if not 0 <= self.warmup_fraction <= 1:
            raise ValueError(f"optim.warmup_fraction must be between 0 and 1, got {self.warmup_fraction}")

    def peak_lr(self, pretrained: bool) -> float:
        if self.lr is not None:
            return self.lr
        return self.lr_pretrained if pretrained else self.lr_scratch

    def build(self, regressor: Regressor, pretrained: bool, loss: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimiser over every parameter that requires gradients, those of the loss included, each in exactly one
        group.
        """
        lr = self.peak_lr(pretrained)
        head_lr = lr * self.head_lr_factor if pretrained else lr
        # What learns anew has no depth that it should keep.
        decay = self.layer_decay if pretrained else 1.0
        blocks = regressor.encoder.blocks()
        # What learns alike is one group: each costs a kernel of its own.
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for above, block in enumerate(reversed(blocks)):
            _add(groups, block, lr * decay**above, self.weight_decay)
        _add(groups, regressor.head.parameters(), head_lr, self.weight_decay)
        _add(groups, loss.parameters() if loss is not None else (), head_lr, 0.0)
        device = next(regressor.parameters()).device.type
        return torch.optim.AdamW(
            [
                {"params": parameters, "lr": peak, "peak_lr": peak, "weight_decay": weight_decay}
                for (peak, weight_decay), parameters in groups.items()
            ],
            betas=(self.betas[0], self.betas[1]),
            fused=device in ("cuda", "cpu"),
        )

    def lr_factor(self, step: int, total: int) -> float:
        """The share of the peak learning rate at `step` of `total`: linear up to 1, then half a cosine to 0."""
        warmup = max(1, round(self.warmup_fraction * total))
        if step < warmup:
            return (step + 1) / warmup
        progress = (step - warmup) / max(1, total - warmup)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def _add(
    groups: dict[tuple[float, float], list[nn.Parameter]],
    parameters: Iterable[nn.Parameter],
    lr: float,
    weight_decay: float,
) -> None:
    for parameter in parameters:
        if parameter.requires_grad:
            groups.setdefault((lr, weight_decay if parameter.ndim > 1 else 0.0), []).append(parameter)
