"""Losses: named scalars to minimise, given what the regressor says and the batch."""

from jaxtyping import Float
from torch import Tensor, nn

from img2prompt.data.sample import Batch
from img2prompt.heads import Outputs


class Cosine(nn.Module):
    """The mean of 1 - cos(prediction, target) over the batch: 0 is perfect, 1 is orthogonal."""

    def forward(self, outputs: Outputs, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        # Both are of unit length, so their product is the cosine.
        return {"cosine": 1 - (outputs.embedding * batch.targets).sum(dim=-1).mean()}
