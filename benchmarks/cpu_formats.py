"""P3: the same regressor on a CPU by torch in float32 and in bf16, and as an ONNX graph with and without int8.

Without arguments a ViT-B/16 of true size with random weights, which are enough for speed and say nothing of accuracy;
with a trained checkpoint and images also the least cosine to torch in float32. One thread, batches of eight.

    python benchmarks/cpu_formats.py [ROUNDS] [CKPT IMAGES]
"""

import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from record import record
from rounds import paired, ratio
from torch import Tensor

from img2prompt.build import build
from img2prompt.data.images import decode
from img2prompt.data.listing import list_images
from img2prompt.encoders.attention import sequence_first
from img2prompt.encoders.encoder import Encoder
from img2prompt.export.check import IMAGES, drawn
from img2prompt.export.onnx import to_int8, write_onnx
from img2prompt.predictors.onnx import FILE
from img2prompt.predictors.predictor import Item, items_of
from img2prompt.predictors.trained import Trained
from img2prompt.regressor import Regressor, Target, build_regressor, load_regressor

BATCH = 8


def sessions(regressor: Regressor, folder: Path) -> dict[str, onnxruntime.InferenceSession]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    write_onnx(regressor, folder)
    shutil.copy(folder / FILE, folder / "fp32.onnx")
    to_int8(folder)
    files = {"onnx fp32": "fp32.onnx", "onnx int8": FILE}
    return {
        name: onnxruntime.InferenceSession(str(folder / file), options, providers=["CPUExecutionProvider"])
        for name, file in files.items()
    }


def main(rounds: int = 5, ckpt: str | None = None, images: str | None = None) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random = {"_target_": "img2prompt.encoders.openclip.OpenCLIP", "name": "ViT-B-16", "tag": "openai"}

    def made() -> Regressor:
        if ckpt is not None:
            return load_regressor(Path(ckpt))
        head = {"_target_": "img2prompt.heads.Linear"}
        return build_regressor(build(random, Encoder), head, Target("random", None, 384)).eval()

    regressor = made()
    prepare = Trained(regressor, top_k=0).prepare
    items: list[Item] = drawn() if images is None else items_of(list_images(images).files[:IMAGES])
    pixels = torch.stack([prepare(decode(item.read())) for item in items])
    batch = pixels[:BATCH].contiguous()
    halved = made()
    halved.load_state_dict(regressor.state_dict())
    sequence_first(halved.encoder)

    def in_bf16(given: Tensor) -> np.ndarray:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            return halved({"images": given}).embedding.float().numpy()

    def in_fp32(given: Tensor) -> np.ndarray:
        with torch.inference_mode():
            return regressor({"images": given}).embedding.numpy()

    with tempfile.TemporaryDirectory() as temporary:
        graphs = sessions(regressor, Path(temporary))
        ways: dict[str, Callable[[Tensor], np.ndarray]] = {"torch fp32": in_fp32, "torch bf16": in_bf16}
        for name, graph in graphs.items():
            ways[name] = lambda given, graph=graph: graph.run(None, {"images": given.numpy()})[0]

        def seconds(way: Callable[[Tensor], np.ndarray]) -> float:
            began = time.perf_counter()
            way(batch)
            return (time.perf_counter() - began) / BATCH

        times = paired({name: lambda way=way: seconds(way) for name, way in ways.items()}, rounds)
        said = {name: np.concatenate([way(part) for part in pixels.split(BATCH)]) for name, way in ways.items()}
    rows: list[dict[str, object]] = []
    for name, own in times.items():
        cosines = (said[name] * said["torch fp32"]).sum(1) / np.linalg.norm(said[name], axis=1)
        rows.append(
            {
                "claim": "P3 on a CPU, one thread",
                "model": "ViT-B/16, random weights" if ckpt is None else str(regressor.encoder.config.get("name")),
                "what": name,
                "median_seconds_per_image": f"{sorted(own)[len(own) // 2]:.4f}",
                "least_cosine": "" if ckpt is None else f"{cosines.min():.5f}",
                # How many times as fast.
                **ratio(times["torch fp32"], own),
            }
        )
    record("cpu_formats" if ckpt is None else "cpu_formats_trained", rows)


if __name__ == "__main__":
    main(*(int(arg) for arg in sys.argv[1:2]), *sys.argv[2:4])
