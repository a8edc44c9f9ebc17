"""A model that was exported for timm, opened by it."""

import json
from pathlib import Path
from typing import Any

import timm
import torch
from jaxtyping import UInt8
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor

from img2prompt.data.fitting import fit
from img2prompt.data.images import as_picture
from img2prompt.encoders.timm_model import REFUSED
from img2prompt.predictions import Prediction
from img2prompt.predictors.exported import OWN_TRANSFORM, Exported
from img2prompt.provenance import Provenance


class TimmFolder(Exported):
    """What the model of `timm.create_model("local-dir:folder")` says of images that its own transform prepares or,
    where the export says that this is another than the encoder's, the encoder's.
    """

    def __init__(self, folder: Path, provenance: Provenance, device: str, precision: str) -> None:
        super().__init__(folder, provenance)
        _check_config(folder / "config.json")
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


def _check_config(path: Path) -> None:
    """ValueError for arguments that would make timm read other files, or ask the network: the folder is anybody's."""
    arguments = json.loads(path.read_text(encoding="utf-8")).get("model_args") or {}
    refused = next((key for key in arguments if key in REFUSED and key != "num_classes"), None)
    if refused is not None:
        raise ValueError(f"{path}: refused, its model_args have {refused}")
