"""T3: our training step against a bare PyTorch loop of the same model on the same batches (goal: at least 0.98x).

Ours and the bare loop take turns and change places in every round (A B, B A, …), on one thread where there is no GPU.
The figure is the median of the paired ratios of images/s.

    python benchmarks/train_step.py [rounds] [steps]
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from lightning import Trainer
from record import record
from torch.nn import functional

from img2prompt.build import build
from img2prompt.data.drawings import Drawings
from img2prompt.data.order import Draws
from img2prompt.data.pixels import Pixels
from img2prompt.encoders.encoder import Encoder
from img2prompt.losses import Cosine
from img2prompt.regressor import Regressor, Target, build_regressor
from img2prompt.synthesis.procedural import Procedural
from img2prompt.training.augment import Augment
from img2prompt.training.callbacks import Log
from img2prompt.training.datamodule import PairData
from img2prompt.training.module import RegressorModule
from img2prompt.training.optim import AdamW
from img2prompt.training.run_folder import MetricsFile

ENCODERS = {
    "demo (resnet10t, 64 px)": {
        "name": "resnet10t",
        "image_size_px": 64,
        "model_kwargs": {"channels": [32, 64, 128, 256], "stem_type": "", "stem_width": 32},
    },
    "vit_tiny_patch16, 96 px": {"name": "vit_tiny_patch16_224", "image_size_px": 96},
}
BATCH = 32
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def regressor_of(choice: dict) -> Regressor:
    torch.manual_seed(0)
    encoder = build({"_target_": "img2prompt.encoders.timm_model.Timm", **choice}, Encoder)
    regressor = build_regressor(encoder, {"_target_": "img2prompt.heads.Linear"}, Target("random", None, 384))
    return regressor.to(DEVICE).to(memory_format=torch.channels_last)


def data_of(regressor: Regressor) -> PairData:
    want = regressor.encoder.preprocessing
    samples = Drawings(512, 2, 0, Procedural(64)).find().samples
    pixels = Pixels(samples, want.image_size_px, want.interpolation, want.resize_mode, keep_gib=8)
    pixels.fill(lambda count: None)
    targets = functional.normalize(torch.randn(len(samples), 384), dim=-1)
    rows = torch.arange(len(samples)).numpy()
    draws = Draws(rows, rows, np.ones(len(rows)), rows.astype(np.uint64))
    return PairData(samples, targets, pixels, rows, rows[:1], draws, BATCH, seed=0)


def ours(regressor: Regressor, data: PairData, steps: int) -> float:
    """Images/s of Lightning with our module, loader, schedule and logging; the first five steps are not counted."""
    module = RegressorModule(regressor, Cosine(), AdamW(lr=1e-3), False, 0, "t3", 0, steps + 5, Augment(), False)
    times: list[float] = []
    wrapped = module.training_step

    def timed(batch, batch_idx):
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter())
        return wrapped(batch, batch_idx)

    module.training_step = timed
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="gpu" if DEVICE == "cuda" else "cpu",
            devices=1,
            max_epochs=1,
            gradient_clip_val=1.0,
            logger=[MetricsFile(Path(folder, "metrics.csv"))],
            callbacks=[Log(10)],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
        )
        trainer.fit(module, data.train_batches("t3", 0, steps + 5))
    return BATCH * (len(times) - 6) / (times[-1] - times[5])


def bare(regressor: Regressor, data: PairData, steps: int) -> float:
    """Images/s of forward, loss, backward, clipping and AdamW alone, on batches that are already there."""
    optimizer = torch.optim.AdamW(regressor.parameters(), lr=1e-3, weight_decay=0.05, fused=True)
    batches = list(data.train_batches("t3", 0, 16))
    regressor.train()
    began = 0.0
    for step in range(steps + 5):
        if step == 5:
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
        batch = batches[step % 16]
        embedding = regressor({"images": batch.inputs["images"].to(DEVICE, non_blocking=True)}).embedding
        loss = 1 - (embedding * batch.targets.to(DEVICE)).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(regressor.parameters(), 1.0)
        optimizer.step()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return BATCH * steps / (time.perf_counter() - began)


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    steps = int(sys.argv[2]) if len(sys.argv) > 2 else 30
    if DEVICE == "cpu":
        torch.set_num_threads(1)
    rows = []
    for name, choice in ENCODERS.items():
        regressor = regressor_of(choice)
        data = data_of(regressor)
        pairs = []
        for number in range(rounds):
            speeds = {}
            for loop in (ours, bare) if number % 2 == 0 else (bare, ours):
                speeds[loop] = loop(regressor, data, steps)
            pairs.append((speeds[ours], speeds[bare]))
        ratios = sorted(a / b for a, b in pairs)
        rows.append(
            {
                "model": name,
                "ours_images_per_second": f"{statistics.median(a for a, _ in pairs):.1f}",
                "bare_images_per_second": f"{statistics.median(b for _, b in pairs):.1f}",
                "median_ratio": f"{statistics.median(ratios):.3f}",
                "min_ratio": f"{ratios[0]:.3f}",
                "max_ratio": f"{ratios[-1]:.3f}",
            }
        )
    record("train_step", rows)


if __name__ == "__main__":
    main()
