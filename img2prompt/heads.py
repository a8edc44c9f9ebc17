"""Heads: an encoder's features become unit embeddings in the target's space.

# B = images in the batch, E = width of the features, T = width of the tokens, D = width of the embedding,
# V = words of a vocabulary
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from img2prompt.encoders.encoder import Features


@dataclass
class Outputs:
    """What a regressor says about a batch: `embedding` [B, D], each row of unit length, of a head with a vocabulary the
    logits of its words, and `norm`, the length of the embedding before it was made 1.
    """

    embedding: Float[Tensor, "B D"]
    words: Float[Tensor, "B V"] | None = None
    norm: Float[Tensor, " B"] | None = None


class Head(nn.Module, ABC):
    """Built with the widths of what it reads: `in_features` (E) of the pooled features, to which the means of the last
    `layers` blocks are joined, and `token_features` (T) of the tokens, where it `reads_tokens`.
    """

    config: dict[str, Any]
    is_affine = False  # whether it can be any affine map of the pooled features, as ridge regression finds one
    reads_tokens = False
    vocabulary_size = 0
    vocabulary: list[str] = []  # the words that it knows, once the training prompts have been read

    def __init__(self, layers: int = 0) -> None:
        super().__init__()
        if layers < 0:
            raise ValueError(f"head.layers must be at least 0, got {layers}")
        self.layers = layers

    @abstractmethod
    def forward(self, features: Features) -> Outputs: ...

    def set_affine(self, weight: Float[Tensor, "D E"], bias: Float[Tensor, " D"]) -> None:
        """Makes the head that affine map of the pooled features; ValueError unless `is_affine`."""
        raise ValueError(f"{type(self).__name__} is no affine map")

    def affine(self) -> tuple[Float[Tensor, "D E"], Float[Tensor, " D"]]:
        """Weight and bias of the affine map that `set_affine` sets; ValueError unless `is_affine`."""
        raise ValueError(f"{type(self).__name__} is no affine map")


class Linear(Head):
    """One affine map of the pooled features, then unit length; `dropout` of the features while training."""

    is_affine = True

    def __init__(self, in_features: int, out_features: int, dropout: float = 0.0, layers: int = 0) -> None:
        super().__init__(layers)
        self.dropout = nn.Dropout(dropout)
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / max(1, in_features) ** 0.5)
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, features: Features) -> Outputs:
        return _outputs(self.map(features.pooled))

    def map(self, pooled: Float[Tensor, "B E"]) -> Float[Tensor, "B D"]:
        return functional.linear(self.dropout(pooled), self.weight, self.bias)

    def set_affine(self, weight: Float[Tensor, "D E"], bias: Float[Tensor, " D"]) -> None:
        self.weight.data.copy_(weight)
        self.bias.data.copy_(bias)

    def affine(self) -> tuple[Float[Tensor, "D E"], Float[Tensor, " D"]]:
        return self.weight.data, self.bias.data


class MLP(Head):
    """Linear, BatchNorm, ReLU, dropout, linear, then unit length: the head of the competition's first place with its
    16,384 hidden units.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        hidden: int = 16384,
        batchnorm: bool = True,
        dropout: float = 0.0,
        layers: int = 0,
    ) -> None:
        super().__init__(layers)
        if hidden < 1:
            raise ValueError(f"head.hidden must be at least 1, got {hidden}")
        self.map = nn.Sequential(
            nn.Linear(in_features, hidden),
            nn.BatchNorm1d(hidden) if batchnorm else nn.Identity(),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, out_features),
        )

    def forward(self, features: Features) -> Outputs:
        return _outputs(self.map(features.pooled))


class DeepMLP(Head):
    """Hidden layers and a last linear map, then unit length; each hidden layer is linear, GELU, BatchNorm and dropout:
    the head upon a frozen CLIP of Reverse Stable Diffusion (Croitoru et al., 2023), where two have 8,192 units each.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        hidden: Any = (8192, 8192),
        dropout: float = 0.5,
        layers: int = 0,
    ) -> None:
        super().__init__(layers)
        _check_hidden(hidden)
        if not hidden:
            raise ValueError("head.hidden=[]: must be a [list] of widths of at least 1")
        steps: list[nn.Module] = []
        for wide, narrow in zip([in_features, *hidden], hidden, strict=False):
            steps += [nn.Linear(wide, narrow), nn.GELU(), nn.BatchNorm1d(narrow), nn.Dropout(dropout)]
        self.map = nn.Sequential(*steps, nn.Linear(hidden[-1], out_features))

    def forward(self, features: Features) -> Outputs:
        return _outputs(self.map(features.pooled))


class JointVocabulary(Head):
    """A linear head, or with `hidden` layers a deep one, and upon its embedding a linear map that says which words of a
    vocabulary the prompt has (Croitoru et al., Reverse Stable Diffusion, 2023). `vocabulary` is found by training, and
    kept in checkpoints.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        vocabulary_size: int = 1000,
        vocabulary: Sequence[str] = (),
        hidden: Any = (),
        dropout: float = 0.0,
        layers: int = 0,
    ) -> None:
        super().__init__(layers)
        if vocabulary_size < 1:
            raise ValueError(f"head.vocabulary_size must be at least 1, got {vocabulary_size}")
        if vocabulary and len(vocabulary) != vocabulary_size:
            raise ValueError(f"head.vocabulary_size={vocabulary_size}, and a vocabulary of {len(vocabulary)} words")
        _check_hidden(hidden)
        self.vocabulary_size = vocabulary_size
        self.vocabulary = list(vocabulary)
        self.is_affine = not hidden
        self.embed: Head = Linear(in_features, out_features, dropout)
        if hidden:
            self.embed = DeepMLP(in_features, out_features, hidden, dropout)
        self.words = nn.Linear(out_features, vocabulary_size)

    def forward(self, features: Features) -> Outputs:
        outputs = self.embed(features)
        return Outputs(outputs.embedding, self.words(outputs.embedding).float(), outputs.norm)

    def set_affine(self, weight: Float[Tensor, "D E"], bias: Float[Tensor, " D"]) -> None:
        self.embed.set_affine(weight, bias)

    def affine(self) -> tuple[Float[Tensor, "D E"], Float[Tensor, " D"]]:
        return self.embed.affine()


class AttentionPool(Linear):
    """The affine map of the pooled features, to which is added what `queries` learned queries find among the tokens by
    attention of `heads` heads, starting from nothing: the probe is where it begins.
    """

    reads_tokens = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        token_features: int,
        queries: int = 1,
        heads: int = 8,
        dropout: float = 0.0,
        layers: int = 0,
    ) -> None:
        super().__init__(in_features, out_features, dropout, layers)
        if queries < 1 or heads < 1 or token_features % heads:
            raise ValueError(
                f"head.queries={queries}, head.heads={heads}: need at least 1, and heads that divide the tokens' width "
                f"of {token_features}"
            )
        self.norm = nn.LayerNorm(token_features)
        self.query = nn.Parameter(torch.randn(queries, token_features) * 0.02)
        self.attention = nn.MultiheadAttention(token_features, heads, batch_first=True)
        self.found = nn.Linear(queries * token_features, out_features)
        nn.init.zeros_(self.found.weight)
        nn.init.zeros_(self.found.bias)

    def forward(self, features: Features) -> Outputs:
        assert features.tokens is not None
        tokens = self.norm(features.tokens)  # [B, N, T]
        # Not len(): an exported graph would hold the number of images.
        query = self.query.expand(tokens.shape[0], -1, -1)
        found, _ = self.attention(query, tokens, tokens, need_weights=False)
        return _outputs(self.map(features.pooled) + self.found(found.flatten(1)))


def _check_hidden(hidden: Any) -> None:
    is_list = isinstance(hidden, Sequence) and not isinstance(hidden, str)
    if not is_list or any(type(one) is not int or one < 1 for one in hidden):
        raise ValueError(f"head.hidden={hidden}: must be a [list] of widths of at least 1")


def _outputs(values: Float[Tensor, "B D"]) -> Outputs:
    # Unit length is taken in float32: in bf16 the norm alone would cost 0.4 % of the cosine.
    values = values.float()
    return Outputs(functional.normalize(values, dim=-1), norm=values.norm(dim=-1))
