"""How good a regressor is on some rows: the one way in which every rung is scored."""

from collections.abc import Callable

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


class Interrupted(Exception):
    """A signal asked for the end."""


@torch.no_grad()
def score(
    regressor: Regressor, data: PairData, bf16: bool, is_over: Callable[[], bool] = lambda: False
) -> tuple[Float[Tensor, " N"], list[int], Tensor]:
    """Cosines of the validation rows with their targets, these rows, and the predictions [N, D]. Interrupted when
    `is_over` says so between two batches.
    """
    rows, predicted = _mapped(regressor, data, data.val_rows.tolist(), bf16, head=True, is_over=is_over)
    return cosines(predicted, data.targets[rows]), rows, predicted


def _mapped(
    regressor: Regressor,
    data: PairData,
    rows: list[int],
    bf16: bool,
    head: bool,
    is_over: Callable[[], bool] = lambda: False,
) -> tuple[list[int], Tensor]:
    device = regressor.target_mean.device
    training = regressor.training
    regressor.eval()
    good: list[int] = []
    parts: list[Tensor] = []
    for batch in data.batches_of(rows):
        if is_over():
            raise Interrupted
        inputs = {name: value.to(device) for name, value in batch.inputs.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            features = regressor.features(inputs)
            value = regressor.head(features).embedding if head else features.pooled
        good += batch.rows.tolist()
        parts.append(value.float().cpu())
    regressor.train(training)
    if not parts:
        raise ValueError("no validation image can be decoded" if head else "no training image can be decoded")
    return good, torch.cat(parts)
