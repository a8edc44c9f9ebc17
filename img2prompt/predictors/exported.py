"""What the predictors of exported folders share: one file each opens a format by the library that it is for."""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from img2prompt.predictions import Prediction
from img2prompt.predictors.predictor import Predictor
from img2prompt.provenance import Provenance

# An option of format=timm: where its own transform is another than the encoder's (see `export.timm`).
OWN_TRANSFORM = "own_transform"


class Exported(Predictor):
    """A predictor of embeddings alone, of an exported folder."""

    def __init__(self, folder: Path, provenance: Provenance) -> None:
        self.target = provenance.header.target
        self.dimension = self.target.dimension
        self.mean, self.mean_of = torch.tensor(provenance.target_mean), "the training targets"
        self.files = sorted(path for path in folder.rglob("*") if path.is_file())

    def prediction(self, ids: list[str], embeddings: Float[Tensor, "B D"]) -> Prediction:
        if embeddings.shape[1] != self.dimension:
            raise ValueError(f"the exported model says {embeddings.shape[1]} numbers, its provenance {self.dimension}")
        if not embeddings.isfinite().all():
            raise ValueError(f"the exported model predicts values that are not finite (first image: {ids[0]})")
        return Prediction(ids, torch.nn.functional.normalize(embeddings.float(), dim=-1).cpu().numpy())

    def nothing(self) -> Prediction:
        return Prediction([], np.zeros((0, self.dimension), dtype=np.float32))
