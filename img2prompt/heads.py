"""Heads: an encoder's features become unit embeddings in the target's space.

# B = images in the batch, E = width of the features, D = width of the embedding
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from img2prompt.encoders.encoder import Features


@dataclass
class Outputs:
    """What a regressor says about a batch: `embedding` [B, D], each row of unit length."""

    embedding: Float[Tensor, "B D"]


class Head(nn.Module, ABC):
    config: dict[str, Any]
    is_affine = False  # whether it can be any affine map of the pooled features, as ridge regression finds one

    @abstractmethod
    def forward(self, features: Features) -> Outputs: ...

    def set_affine(self, weight: Float[Tensor, "D E"], bias: Float[Tensor, " D"]) -> None:
        """Makes the head that affine map of the pooled features, where `is_affine`."""
        raise NotImplementedError


class Linear(Head):
    """One affine map of the pooled features, then unit length; `dropout` of the features while training."""

    is_affine = True

    def __init__(self, in_features: int, out_features: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / max(1, in_features) ** 0.5)
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, features: Features) -> Outputs:
        values = functional.linear(self.dropout(features.pooled), self.weight, self.bias)
        # Unit length is taken in float32: in bf16 the norm alone would cost 0.4 % of the cosine.
        return Outputs(functional.normalize(values.float(), dim=-1))

    def set_affine(self, weight: Float[Tensor, "D E"], bias: Float[Tensor, " D"]) -> None:
        self.weight.data.copy_(weight)
        self.bias.data.copy_(bias)


class MLP(Head):
    """Linear, BatchNorm, ReLU, dropout, linear, then unit length: the head of the competition's first place with its
    16,384 hidden units.
    """

    def __init__(
        self, in_features: int, out_features: int, hidden: int = 16384, batchnorm: bool = True, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(in_features, hidden),
            nn.BatchNorm1d(hidden) if batchnorm else nn.Identity(),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, out_features),
        )

    def forward(self, features: Features) -> Outputs:
        return Outputs(functional.normalize(self.layers(features.pooled).float(), dim=-1))
