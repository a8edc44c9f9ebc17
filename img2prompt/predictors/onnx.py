"""A model that was exported as ONNX, run by onnxruntime."""

import sys
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from jaxtyping import UInt8
from torch import Tensor

from img2prompt.data.fitting import fit
from img2prompt.predictions import Prediction
from img2prompt.predictors.exported import Exported
from img2prompt.provenance import Provenance

FILE = "model.onnx"


class OnnxFolder(Exported):
    """What the graph says; it normalises by itself, and images are fitted as the checkpoint's encoder wants them."""

    def __init__(self, folder: Path, provenance: Provenance, device: str, precision: str) -> None:
        super().__init__(folder, provenance)
        if precision != "fp32":
            raise ValueError(f"precision={precision}: an ONNX model computes in its own; leave it at fp32")
        self.wanted = provenance.preprocessing
        self.session = session_of(folder / FILE, device)

    def prepare(self, image: UInt8[Tensor, "3 H W"]) -> UInt8[Tensor, "3 S S"]:
        return fit(image, self.wanted.image_size_px, self.wanted.interpolation, self.wanted.resize_mode)

    def predict_batch(self, ids: list[str], prepared: list[Tensor]) -> Prediction:
        if not prepared:
            return self.nothing()
        images = np.ascontiguousarray(torch.stack(prepared).numpy())
        (found,) = self.session.run(["embeddings"], {"images": images})
        return self.prediction(ids, torch.from_numpy(found))


def session_of(path: Path, device: str) -> onnxruntime.InferenceSession:
    """The session of a graph, on a GPU where this onnxruntime has one; ValueError for a file that it cannot read."""
    providers = ["CPUExecutionProvider"]
    if device.startswith("cuda"):
        if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            providers.insert(0, "CUDAExecutionProvider")
        else:
            print("this onnxruntime has no GPU; the CPU predicts (onnxruntime-gpu has one)", file=sys.stderr)
    try:
        return onnxruntime.InferenceSession(str(path), providers=providers)
    except Exception as error:
        # Its errors are classes of its own, without a common one.
        raise ValueError(f"{path}: not a graph that onnxruntime reads ({' '.join(str(error).split())[:160]})") from None
