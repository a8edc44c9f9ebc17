"""A model that was exported for sentence-transformers, opened by it."""

from pathlib import Path

import torch
from jaxtyping import UInt8
from PIL import Image
from sentence_transformers import SentenceTransformer
from torch import Tensor
from transformers.utils import logging as transformers_logging

from img2prompt.data.images import as_picture
from img2prompt.predictions import Prediction
from img2prompt.predictors.exported import Exported
from img2prompt.provenance import Provenance


class SentenceTransformersFolder(Exported):
    """What `SentenceTransformer(folder).encode(images)` says."""

    def __init__(self, folder: Path, provenance: Provenance, device: str, precision: str) -> None:
        super().__init__(folder, provenance)
        self.device, self.precision = torch.device(device), precision
        transformers_logging.disable_progress_bar()
        self.model = SentenceTransformer(str(folder), device=device, local_files_only=True)

    def prepare(self, image: UInt8[Tensor, "3 H W"]) -> Image.Image:
        return as_picture(image)

    @torch.inference_mode()
    def predict_batch(self, ids: list[str], prepared: list[Image.Image]) -> Prediction:
        if not prepared:
            return self.nothing()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            found = self.model.encode(
                prepared, batch_size=len(prepared), convert_to_tensor=True, show_progress_bar=False
            )
        return self.prediction(ids, found)
