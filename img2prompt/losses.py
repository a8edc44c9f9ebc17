"""Losses: named scalars to minimise, given what the regressor says and the batch.

# B = images in the batch, D = embedding width, M = embeddings that a prediction is told apart from
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from img2prompt import ranks
from img2prompt.data.sample import Batch
from img2prompt.heads import Outputs

NEGATIVES = ("batch", "all")
# Targets as close as this are one prompt, or might as well be: they are no negatives of each other.
_SAME = 0.999
# Logits that are held at once; more are computed again for the gradient.
_MOST_LOGITS = 2**26


class Loss(nn.Module):
    """Called with (outputs, batch): the parts of the loss by name, each a mean over the batch. `prepare` is told all
    training targets [N, D] before the first step. Parameters of a loss are trained with the head's.
    """

    reads_words = False  # needs a head with a vocabulary

    def prepare(self, targets: Float[Tensor, "N D"]) -> None: ...


class Cosine(Loss):
    """The mean of 1 - cos(prediction, target) over the batch: 0 is perfect, 1 is orthogonal."""

    def forward(self, outputs: Outputs, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        return {"cosine": 1 - _cosines(outputs, batch).mean()}


class Angular(Loss):
    """The mean angle between prediction and target, in half turns: 0 is perfect, 0.5 is orthogonal."""

    def forward(self, outputs: Outputs, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        # At an angle of zero the gradient of acos is infinite.
        return {"angular": torch.acos(_cosines(outputs, batch).clamp(-1 + 1e-6, 1 - 1e-6)).mean() / math.pi}


class MeanSquaredError(Loss):
    """The mean square of the differences of all numbers; between unit vectors 2 (1 - cos) / D."""

    def forward(self, outputs: Outputs, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        return {"mse": functional.mse_loss(outputs.embedding, batch.targets)}


class Huber(Loss):
    """Squares up to `delta` and lines beyond, of the differences of all numbers; between unit vectors and with delta 1
    this is (1 - cos) / D.
    """

    def __init__(self, delta: float = 1.0) -> None:
        super().__init__()
        if delta <= 0:
            raise ValueError(f"loss.delta must be above 0, got {delta}")
        self.delta = delta

    def forward(self, outputs: Outputs, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        return {"huber": functional.huber_loss(outputs.embedding, batch.targets, delta=self.delta)}


class Words(Loss):
    """The binary cross-entropy of the words that a head with a vocabulary says, the mean over all of them."""

    reads_words = True

    def forward(self, outputs: Outputs, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        assert outputs.words is not None and batch.labels is not None
        return {"words": functional.binary_cross_entropy_with_logits(outputs.words, batch.labels)}


class _Contrast(Loss, ABC):
    """Tells the target of each image apart from others: those of the batch, or all training targets."""

    def __init__(self, negatives: str = "batch") -> None:
        super().__init__()
        if negatives not in NEGATIVES:
            raise ValueError(f"loss.negatives={negatives}: must be one of {', '.join(NEGATIVES)}")
        self.negatives = negatives
        self._all = torch.zeros(0, 0)

    def prepare(self, targets: Float[Tensor, "N D"]) -> None:
        if self.negatives == "all":
            self._all = targets

    def _mean(self, outputs: Outputs, batch: Batch) -> Float[Tensor, ""]:
        # In bfloat16 a cosine of 0.999 is 1, and the right target would be among the wrong ones.
        with torch.autocast(outputs.embedding.device.type, enabled=False):
            return self._mean_in_float32(outputs, batch)

    def _mean_in_float32(self, outputs: Outputs, batch: Batch) -> Float[Tensor, ""]:
        predicted, targets = outputs.embedding.float(), batch.targets.float()
        # Targets have no gradient: those of the other ranks are told, and the mean of the ranks' means is that of all.
        self._all = self._all.to(predicted)
        others = ranks.gathered(targets) if self.negatives == "batch" else self._all
        rows = max(1, _MOST_LOGITS // max(1, len(others)))
        total = predicted.new_zeros(())
        for first in range(0, len(predicted), rows):
            part = predicted[first : first + rows], targets[first : first + rows], others
            whole = len(predicted) <= rows
            total = total + (self._sum(*part) if whole else checkpoint(self._sum, *part, use_reentrant=False))
        return total / len(predicted)

    @abstractmethod
    def _sum(self, predicted: Tensor, targets: Tensor, others: Tensor) -> Tensor:
        """The sum of the losses of these rows."""


class Softmax(_Contrast):
    """Cross-entropy of the right target among the negatives (InfoNCE; Radford et al., CLIP, 2021, the direction from
    image to text), at a `temperature` that is trained.
    """

    def __init__(self, negatives: str = "batch", temperature: float = 0.05) -> None:
        super().__init__(negatives)
        if temperature <= 0:
            raise ValueError(f"loss.temperature must be above 0, got {temperature}")
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)))

    def forward(self, outputs: Outputs, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        return {"softmax": self._mean(outputs, batch)}

    def _sum(self, predicted: Tensor, targets: Tensor, others: Tensor) -> Tensor:
        # As in CLIP, the scale stays below 100.
        scale = self.log_scale.clamp(max=math.log(100)).exp()
        right = (predicted * targets).sum(-1, keepdim=True)
        wrong = (scale * (predicted @ others.T)).masked_fill(targets @ others.T > _SAME, -torch.inf)
        logits = torch.cat([scale * right, wrong], dim=1)
        return functional.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.long), reduction="sum")


class Sigmoid(_Contrast):
    """Every pair of image and target judged by itself as right or wrong, with a trained scale and bias (Zhai et al.,
    SigLIP, 2023, algorithm 1).
    """

    def __init__(self, negatives: str = "batch", scale: float = 10.0, bias: float = -10.0) -> None:
        super().__init__(negatives)
        if scale <= 0:
            raise ValueError(f"loss.scale must be above 0, got {scale}")
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))
        self.bias = nn.Parameter(torch.tensor(float(bias)))

    def forward(self, outputs: Outputs, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        return {"sigmoid": self._mean(outputs, batch)}

    def _sum(self, predicted: Tensor, targets: Tensor, others: Tensor) -> Tensor:
        scale = self.log_scale.exp()
        right = functional.logsigmoid(scale * (predicted * targets).sum(-1) + self.bias)
        wrong = functional.logsigmoid(-(scale * (predicted @ others.T) + self.bias))
        return -(right.sum() + wrong.masked_fill(targets @ others.T > _SAME, 0).sum())


class WeightedSum(Loss):
    """Several losses, each times its weight (1 where none is given)."""

    def __init__(self, parts: Mapping[str, Loss], weights: Mapping[str, float]) -> None:
        super().__init__()
        if not parts or set(weights) - set(parts):
            raise ValueError(f"loss: weights for {', '.join(weights) or 'nothing'}, parts {', '.join(parts) or 'none'}")
        self.parts = nn.ModuleDict(dict(parts))
        self.weights = dict(weights)

    def prepare(self, targets: Float[Tensor, "N D"]) -> None:
        for part in self.parts.values():
            assert isinstance(part, Loss)
            part.prepare(targets)

    def forward(self, outputs: Outputs, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        values: dict[str, Tensor] = {}
        for name, part in self.parts.items():
            values[name] = self.weights.get(name, 1.0) * torch.stack(list(part(outputs, batch).values())).sum()
        return values


def _cosines(outputs: Outputs, batch: Batch) -> Float[Tensor, " B"]:
    # Both are of unit length, so their product is the cosine.
    return (outputs.embedding * batch.targets).sum(dim=-1)
