"""Retrieval upon a model: its predictions are drawn towards the prompts of a bank that are nearest to them.

# M = members, N = images, D = width of an embedding, P = prompts of the bank
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from img2prompt.metrics import cosines
from img2prompt.refine.refiner import Refiner, blend, equal, fold_numbers
from img2prompt.search import nearest

_SHARES = tuple(share / 20 for share in range(20))
# A gain below it is none: so much lies between two equal runs.
_LEAST_GAIN = 5e-4


class BankBlend(Refiner):
    """(1 - share) of the blend of the members and `share` of the mean of its `neighbours` nearest prompts, weighed by a
    softmax of their cosines over `temperature`. The share is fitted; where nothing is gained it is 0. `bank` names the
    file; its embeddings are given by `use` before the fit.
    """

    name = "blend with a bank"

    def __init__(self, bank: str | Sequence[str] | None, neighbours: int = 20, temperature: float = 0.05) -> None:
        if bank is None:
            raise ValueError("refiner.bank must be given: a file of prompts, or a [list], such as a run's bank.parquet")
        if neighbours < 1:
            raise ValueError(f"refiner.neighbours must be at least 1, got {neighbours}")
        if not temperature > 0:
            raise ValueError(f"refiner.temperature must be above 0, got {temperature}")
        self.bank, self.neighbours, self.temperature = bank, neighbours, temperature

    def use(self, embeddings: Float[Tensor, "P D"]) -> None:
        """Of unit length; they may lie on disk, and are read as they are needed."""
        self._rows = embeddings

    def fit(
        self,
        members: Float[Tensor, "M N D"],
        targets: Float[Tensor, "N D"],
        groups: Int[np.ndarray, " N"],
        weights: Sequence[float] | None = None,
    ) -> None:
        self.weights = equal(len(members)) if weights is None else torch.tensor(weights, dtype=torch.float32)
        blended = blend(members, self.weights)
        near = self._near(blended)
        # [shares, N]
        scores = torch.stack([cosines(_drawn(blended, near, share), targets) for share in _SHARES]).cpu()
        folds = torch.from_numpy(fold_numbers(groups))
        held_out = torch.empty(len(folds))
        for fold in folds.unique():
            inside = folds == fold
            # One group alone is judged by itself: there is nothing else.
            others = ~inside if (~inside).any() else inside
            held_out[inside] = scores[int(scores[:, others].mean(1).argmax())][inside]
        self.plain, self.held_out = float(scores[0].mean()), float(held_out.mean())
        best = int(scores.mean(1).argmax())
        self.share = _SHARES[best] if self.held_out > self.plain + _LEAST_GAIN else 0.0

    def refine(self, members: Float[Tensor, "M N D"]) -> Float[Tensor, "N D"]:
        blended = blend(members, self.weights)
        return _drawn(blended, self._near(blended), self.share) if self.share else blended

    def lines(self) -> list[str]:
        told = f"{self.held_out:.4f} cross-validated by prompt, {self.plain:.4f} without the bank"
        if not self.share:
            return [f"the bank adds nothing here and is left out: {told}"]
        return [f"{self.share:.0%} of the nearest {self.neighbours} of {len(self._rows)} prompts: {told}"]

    def _near(self, blended: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        found, rows = nearest(blended, self._rows, self.neighbours)
        weights = (found / self.temperature).softmax(dim=-1)
        prompts = functional.normalize(self._rows[rows.to(self._rows.device)].to(blended), dim=-1)
        return functional.normalize((weights[..., None] * prompts).sum(1), dim=-1)


def _drawn(blended: Float[Tensor, "N D"], near: Float[Tensor, "N D"], share: float) -> Float[Tensor, "N D"]:
    return functional.normalize((1 - share) * blended + share * near, dim=-1)
