"""P5: `--help` in less than a second; load and predict seven images, cold, on a CPU, in at most ten.

Whole processes, five runs each: a random ViT-B/16 of open_clip at its true size, seven 512 px images.

    python benchmarks/startup.py
"""

import statistics
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
RUNS = 5


def seconds(*arguments: str) -> list[float]:
    times = []
    for _ in range(RUNS):
        began = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
        times.append(time.perf_counter() - began)
    return times


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(0)
        choice = {"_target_": "img2prompt.encoders.openclip.OpenCLIP", "name": "ViT-B-16", "tag": "openai"}
        encoder = build(choice, Encoder)
        head = {"_target_": "img2prompt.heads.Linear"}
        build_regressor(encoder, head, Target("random", None, 384)).save(folder / "model.safetensors")
        write_pairs(Drawings(7, 1, 0, Procedural(512)).find().samples, folder)
        predict = [str(ROOT / "predict.py"), f"ckpt={folder / 'model.safetensors'}", f"images={folder / 'images'}"]
        timed = {
            "train.py --help": seconds(str(ROOT / "train.py"), "--help"),
            "predict.py --help": seconds(str(ROOT / "predict.py"), "--help"),
            "predict.py, ViT-B/16, 7 images": seconds(*predict, f"out={folder / 'p.csv'}", "device=cpu"),
        }
    record(
        "startup",
        [
            {
                "what": what,
                "median_seconds": f"{statistics.median(times):.2f}",
                "min_seconds": f"{min(times):.2f}",
                "max_seconds": f"{max(times):.2f}",
            }
            for what, times in timed.items()
        ],
    )


if __name__ == "__main__":
    main()
