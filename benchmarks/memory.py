"""P6: peak memory of prediction does not grow with the folder.

Whole processes of `predict.py` over folders of one 64 px picture under many names, with a small network; the peak is
that of the process. The list of files and ids is all that may grow.

    python benchmarks/memory.py [COUNT …]
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from record import record

from img2prompt.build import build
from img2prompt.data.drawings import Drawings
from img2prompt.encoders.encoder import Encoder
from img2prompt.regressor import Target, build_regressor
from img2prompt.synthesis.procedural import Procedural
from img2prompt.training.pairs import write_pairs

ROOT = Path(__file__).parent.parent
ENCODER = {"_target_": "img2prompt.encoders.timm_model.Timm", "name": "test_vit", "image_size_px": 64}


def peak_mib(command: list[str]) -> tuple[float, float]:
    """Peak memory and seconds of a process, which is waited for apart from all others."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, command
    # Bytes on a Mac, kilobytes elsewhere.
    return usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10), time.perf_counter() - began


def main(*counts: int) -> None:
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        torch.manual_seed(0)
        head = {"_target_": "img2prompt.heads.Linear"}
        build_regressor(build(ENCODER, Encoder), head, Target("random", None, 384)).save(folder / "model.safetensors")
        write_pairs(Drawings(2, 1, 0, Procedural(64)).find().samples, folder)
        picture = next((folder / "images").iterdir())
        for count in counts or (500, 5_000, 50_000):
            many = folder / str(count)
            many.mkdir()
            for number in range(count):
                os.link(picture, many / f"{number:06d}.png")
            files = [f"ckpt={folder / 'model.safetensors'}", f"images={many}", f"out={folder / 'p.parquet'}"]
            peak, seconds = peak_mib([sys.executable, str(ROOT / "predict.py"), *files, "device=cpu"])
            rows.append({"claim": "P6", "images": count, "peak_mib": f"{peak:.0f}", "seconds": f"{seconds:.1f}"})
    record("memory", rows)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
