"""How good a regressor is on some rows: the one way in which every rung is scored."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from img2prompt import ranks
from img2prompt.heads import Outputs
from img2prompt.metrics import cosines, word_scores
from img2prompt.regressor import Regressor
from img2prompt.training.datamodule import PairData


@torch.no_grad()
def features_of(
    regressor: Regressor, data: PairData, rows: list[int], bf16: bool, together: bool = False
) -> tuple[list[int], Tensor]:
    """The rows whose image is good, and their pooled features [N, E] in float32 on the CPU, in evaluation mode.
    `together`: every rank calls it, encodes some of the batches, and is given the features of all.
    """
    return _mapped(regressor, data, rows, bf16, None, together=together)


class Interrupted(Exception):
    """A signal asked for the end."""


@dataclass
class Scored:
    """Of N validation images: `cosines` [N] with their targets, which `rows` they are, what was `predicted` [N, D], of
    which length that was (`norms`), and how well `words` are told where the head has a vocabulary (see `word_scores`).
    """

    cosines: Float[Tensor, " N"]
    rows: list[int]
    predicted: Float[Tensor, "N D"]
    norms: Float[Tensor, " N"]
    words: dict[str, float]


@torch.no_grad()
def score(
    regressor: Regressor,
    data: PairData,
    bf16: bool,
    is_over: Callable[[], bool] = lambda: False,
    together: bool = False,
    rows: list[int] | None = None,
) -> Scored:
    """Scores the validation rows, or without their words other `rows`. Interrupted when `is_over` says so between two
    batches. `together`: every rank calls it, and is given what a single one would find.
    """
    wanted = data.val_rows.tolist() if rows is None else rows
    said_of = _embedding if rows is not None or data.labels is None else _said
    good, said = _mapped(regressor, data, wanted, bf16, said_of, is_over=is_over, together=together)
    width = regressor.target.dimension
    predicted, norms, logits = said[:, :width], said[:, width], said[:, width + 1 :]
    words = word_scores(logits, data.labels.of(good)) if data.labels is not None and logits.shape[1] else {}
    return Scored(cosines(predicted, data.targets[good]), good, predicted, norms, words)


def _embedding(outputs: Outputs) -> Float[Tensor, "B D_and_1"]:
    """Embeddings, and behind them their norms."""
    assert outputs.norm is not None
    return torch.cat([outputs.embedding, outputs.norm[:, None]], dim=1)


def _said(outputs: Outputs) -> Float[Tensor, "B D_and_1_and_V"]:
    """… and behind these the logits of words if there are any."""
    return _embedding(outputs) if outputs.words is None else torch.cat([_embedding(outputs), outputs.words], dim=1)


def _mapped(
    regressor: Regressor,
    data: PairData,
    rows: list[int],
    bf16: bool,
    said_of: Callable[[Outputs], Tensor] | None,
    is_over: Callable[[], bool] = lambda: False,
    together: bool = False,
) -> tuple[list[int], Tensor]:
    device = regressor.target_mean.device
    training = regressor.training
    regressor.eval()
    good: list[int] = []
    parts: list[Tensor] = []
    over = False
    # Whole batches, so that each has the shape, and its rows the last digits, that they have on one device.
    for batch in data.batches_of(rows, ranks.number(), ranks.count()) if together else data.batches_of(rows):
        over = is_over()
        if over:
            break
        inputs = {name: value.to(device) for name, value in batch.inputs.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            features = regressor.features(inputs)
            value = said_of(regressor.head(features)) if said_of else features.pooled
        good += batch.rows.tolist()
        parts.append(value.float().cpu())
    regressor.train(training)
    if together and ranks.count() > 1:
        found = ranks.every((over, good, [part.numpy() for part in parts]))
        over = any(over for over, _, _ in found)
        good = [row for _, own, _ in found for row in own]
        parts = [torch.from_numpy(part) for _, _, own in found for part in own]
    if over:
        raise Interrupted
    if not parts:
        raise ValueError("no validation image can be decoded" if said_of else "no training image can be decoded")
    values = torch.cat(parts)
    if together and ranks.count() > 1:
        place = {row: i for i, row in enumerate(rows)}
        order = sorted(range(len(good)), key=lambda i: place[good[i]])
        good, values = [good[i] for i in order], values[order]
    return good, values
