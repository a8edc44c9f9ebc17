"""P5: `--help` in less than a second; load and predict seven images, cold, on a CPU, in at most ten.

Whole processes, five runs each, seven 512 px images: the demo's network, and a ViT-B/16 of open_clip at its true size
with random weights. Then the same in parts, in a fresh process each: importing the libraries, loading the model, its
first prediction.

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
HEAD = {"_target_": "img2prompt.heads.Linear"}
ENCODERS = {
    "resnet10t": {"_target_": "img2prompt.encoders.timm_model.Timm", "name": "resnet10t", "image_size_px": 64},
    "ViT-B-16": {"_target_": "img2prompt.encoders.openclip.OpenCLIP", "name": "ViT-B-16", "tag": "openai"},
}

PARTS = """
import sys, time
began = time.perf_counter()
from img2prompt.commands import predict
from img2prompt.regressor import read_header
from importlib import import_module
from pathlib import Path
import_module(read_header(Path(sys.argv[1])).encoder["_target_"].rpartition(".")[0])
imported = time.perf_counter()
predictor = predict.load(sys.argv[1], "cpu")
loaded = time.perf_counter()
predictor.predict(sys.argv[2])
print(imported - began, loaded - imported, time.perf_counter() - loaded)
"""


def parts(checkpoint: Path, images: Path) -> list[list[float]]:
    """Seconds of importing, loading and predicting, one list of runs for each."""
    runs = []
    for _ in range(RUNS):
        command = [sys.executable, "-c", PARTS, str(checkpoint), str(images)]
        runs.append([float(part) for part in subprocess.check_output(command, text=True).split()])
    return [list(times) for times in zip(*runs, strict=True)]


def seconds(*arguments: str) -> list[float]:
    times = []
    for _ in range(RUNS):
        began = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
        times.append(time.perf_counter() - began)
    return times


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        torch.manual_seed(0)
        for name, choice in ENCODERS.items():
            regressor = build_regressor(build(choice, Encoder), HEAD, Target("random", None, 384))
            regressor.save(folder / f"{name}.safetensors")
        write_pairs(Drawings(7, 1, 0, Procedural(512)).find().samples, folder)
        timed = {
            "train.py --help": seconds(str(ROOT / "train.py"), "--help"),
            "predict.py --help": seconds(str(ROOT / "predict.py"), "--help"),
        }
        for name in ENCODERS:
            files = [f"ckpt={folder / name}.safetensors", f"images={folder / 'images'}", f"out={folder / 'p.csv'}"]
            timed[f"predict.py, {name}, 7 images"] = seconds(str(ROOT / "predict.py"), *files, "device=cpu")
            inside = parts(folder / f"{name}.safetensors", folder / "images")
            for part, times in zip(("imports", "model load", "first prediction"), inside, strict=True):
                timed[f"{name}: {part}"] = times
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
