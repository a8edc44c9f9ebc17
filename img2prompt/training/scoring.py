"""How good a regressor is on some rows: the one way in which every rung is scored."""

import torch
from jaxtyping import Float
from torch import Tensor

from img2prompt.metrics import cosines
from img2prompt.regressor import Regressor
from img2prompt.training.datamodule import PairData


@torch.no_grad()
def features_of(regressor: Regressor, data: PairData, rows: list[int], bf16: bool) -> tuple[list[int], Tensor]:
    """The rows whose image is good, and their pooled features [N, E] in float32 on the CPU, in evaluation mode."""
    return _mapped(regressor, data, rows, bf16, head=False)


@torch.no_grad()
def embeddings_of(regressor: Regressor, data: PairData, rows: list[int], bf16: bool) -> tuple[list[int], Tensor]:
    """The rows whose image is good, and their predicted unit embeddings [N, D] on the CPU, in evaluation mode."""
    return _mapped(regressor, data, rows, bf16, head=True)


def score(regressor: Regressor, data: PairData, bf16: bool) -> tuple[Float[Tensor, " N"], list[int], Tensor]:
    """Cosines of the validation rows with their targets, these rows, and the predictions [N, D]."""
    rows, predicted = embeddings_of(regressor, data, data.val_rows.tolist(), bf16)
    return cosines(predicted, data.targets[rows]), rows, predicted


def _mapped(regressor: Regressor, data: PairData, rows: list[int], bf16: bool, head: bool) -> tuple[list[int], Tensor]:
    device = regressor.target_mean.device
    training = regressor.training
    regressor.eval()
    good: list[int] = []
    parts: list[Tensor] = []
    for batch in data.batches_of(rows):
        inputs = {name: value.to(device) for name, value in batch.inputs.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            features = regressor.encoder(inputs)
            value = regressor.head(features).embedding if head else features.pooled
        good += batch.rows.tolist()
        parts.append(value.float().cpu())
    regressor.train(training)
    if not parts:
        raise ValueError("no validation image can be decoded" if head else "no training image can be decoded")
    return good, torch.cat(parts)
