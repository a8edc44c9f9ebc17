"""A model that was exported for timm, opened by it."""

from pathlib import Path
from typing import Any

import timm
import torch
from jaxtyping import UInt8
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor

from img2prompt.data.fitting import fit
from img2prompt.data.images import as_picture
from img2prompt.predictions import Prediction
from img2prompt.predictors.exported import OWN_TRANSFORM, Exported
from img2prompt.provenance import Provenance


class TimmFolder(Exported):
    """What the model of `timm.create_model("local-dir:folder")` says of images that its own transform prepares or,
    where the export says that this is another than the encoder's, the encoder's.
    """

    def __init__(self, folder: Path, provenance: Provenance, device: str, precision: str) -> None:
        super().__init__(folder, provenance)
        self.device, self.precision = torch.device(device), precision
        model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True)
        self.model = model.to(self.device).eval()
        self.data = resolve_model_data_config(model)
        self.transform = create_transform(**self.data, is_training=False)
        is_other = provenance.options.get(OWN_TRANSFORM) is not None
        self.own = provenance.preprocessing if is_other else None

    def prepare(self, image: UInt8[Tensor, "3 H W"]) -> Tensor:
        if self.own is None:
            return self.transform(as_picture(image))
        fitted = fit(image, self.own.image_size_px, self.own.interpolation, self.own.resize_mode)
        mean, std = (torch.tensor(self.data[key]).view(3, 1, 1) for key in ("mean", "std"))
        return (fitted.float() / 255 - mean) / std

    @torch.inference_mode()
    def predict_batch(self, ids: list[str], prepared: list[Tensor]) -> Prediction:
        if not prepared:
            return self.nothing()
        images = torch.stack(prepared).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            found = self.model(images)
        return self.prediction(ids, found)
