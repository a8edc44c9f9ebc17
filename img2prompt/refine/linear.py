"""Plain ridge regression from the blend of the members to the target: what every refiner must beat.

# M = members, N = images, D = width of an embedding
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from img2prompt.refine.refiner import Refiner, blend, equal
from img2prompt.ridge import fit_ridge


class Linear(Refiner):
    """One ridge upon the blend, with the penalty that is best over folds of prompts (`ridge.py`)."""

    name = "plain ridge"

    def fit(
        self,
        members: Float[Tensor, "M N D"],
        targets: Float[Tensor, "N D"],
        groups: Int[np.ndarray, " N"],
        weights: Sequence[float] | None = None,
    ) -> None:
        self.weights = equal(len(members)) if weights is None else torch.tensor(weights, dtype=torch.float32)
        blended = blend(members, self.weights)
        # In float64, which not every device has.
        self.ridge = fit_ridge(blended.cpu(), targets.cpu(), torch.from_numpy(groups))

    def refine(self, members: Float[Tensor, "M N D"]) -> Float[Tensor, "N D"]:
        blended = blend(members, self.weights)
        weight, bias = self.ridge.weight.to(blended), self.ridge.bias.to(blended)
        return functional.normalize(blended @ weight.T + bias, dim=-1)

    def lines(self) -> list[str]:
        return [f"plain ridge {self.ridge.cosine:.4f} cross-validated by prompt, penalty {self.ridge.penalty:.3g}"]
