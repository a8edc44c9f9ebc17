"""What `export` has written, as a predictor: each format is opened by the library that it is for."""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from img2prompt.predictions import Prediction
from img2prompt.predictors.predictor import Predictor
from img2prompt.provenance import PROVENANCE, Provenance, read_provenance

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
        if not embeddings.isfinite().all():
            raise ValueError(f"the exported model predicts values that are not finite (first image: {ids[0]})")
        return Prediction(ids, torch.nn.functional.normalize(embeddings.float(), dim=-1).cpu().numpy())

    def nothing(self) -> Prediction:
        return Prediction([], np.zeros((0, self.dimension), dtype=np.float32))


def open_exported(folder: Path, device: str, precision: str) -> Exported:
    """The predictor of an exported folder whose format is another library's."""
    provenance = read_provenance(folder)
    if provenance.format == "diffusers":
        raise ValueError(f"{folder}: a pipeline of diffusers, which makes images; img2prompt synthesize uses it")
    # Each format imports its own library, and no other.
    if provenance.format == "sentence_transformers":
        from img2prompt.predictors.sentence_transformers import SentenceTransformersFolder

        return SentenceTransformersFolder(folder, provenance, device, precision)
    if provenance.format == "timm":
        from img2prompt.predictors.timm import TimmFolder

        return TimmFolder(folder, provenance, device, precision)
    if provenance.format == "onnx":
        from img2prompt.predictors.onnx import OnnxFolder

        return OnnxFolder(folder, provenance, device, precision)
    raise ValueError(f"{folder / PROVENANCE}: format {provenance.format!r} is unknown to this version")
