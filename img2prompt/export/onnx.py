"""An ONNX graph from pixels in 0..255 to unit embeddings: normalisation and head are inside, and any number of images.

With `int8` the weights of matrix products are 8-bit numbers, which is faster on a CPU and costs accuracy.
"""

import logging
import warnings
from pathlib import Path

import onnx
import torch
from jaxtyping import Float, UInt8
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import Tensor, nn

from img2prompt.encoders.huggingface import HuggingFace
from img2prompt.encoders.openclip import OpenCLIP
from img2prompt.encoders.timm_model import Timm
from img2prompt.predictors.onnx import FILE
from img2prompt.regressor import Regressor

WHICH = "encoder=openclip, timm and huggingface, with any head"


class _Graph(nn.Module):
    def __init__(self, regressor: Regressor) -> None:
        super().__init__()
        self.regressor = regressor

    def forward(self, images: UInt8[Tensor, "B 3 S S"]) -> Float[Tensor, "B D"]:
        return self.regressor({"images": images}).embedding


def write_onnx(regressor: Regressor, folder: Path) -> None:
    """Writes model.onnx: `images` uint8 [B, 3, S, S] -> `embeddings` float32 [B, D]. ValueError for an encoder that is
    more than one network.
    """
    if not isinstance(regressor.encoder, OpenCLIP | Timm | HuggingFace):
        raise ValueError(
            f"the encoder {regressor.encoder.config.get('name')} is more than one network; format=onnx has {WHICH}"
        )
    side = regressor.encoder.preprocessing.image_size_px
    # Two images: an axis of length one would be taken for a constant.
    example = torch.zeros(2, 3, side, side, dtype=torch.uint8)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            _Graph(regressor).eval(),
            (example,),
            input_names=["images"],
            output_names=["embeddings"],
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    # Where in our code each node comes from, with the paths of this machine.
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()
    # Of a large one, whose file would be above 2 GiB, the weights lie beside it.
    program.save(str(folder / FILE))


def to_int8(folder: Path) -> None:
    """Replaces the weights of matrix products in model.onnx by 8-bit ones, a scale for each row."""
    whole, small = folder / FILE, folder / "int8"
    small.mkdir()
    graph = onnx.load(whole)
    is_large = any(folder.glob(f"{FILE}.*"))
    # Shapes that the exporter noted before it turned weights round; they are inferred anew.
    del graph.graph.value_info[:]
    # It advises, on the root logger, what is done for it above.
    logging.disable(logging.WARNING)
    try:
        quantize_dynamic(
            graph,
            small / FILE,
            ["MatMul", "Gemm"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=is_large,
        )
    finally:
        logging.disable(logging.NOTSET)
    for path in folder.glob(f"{FILE}*"):
        path.unlink()
    for path in small.iterdir():
        path.replace(folder / path.name)
    small.rmdir()
