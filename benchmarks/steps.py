"""Training steps to be timed: ours under Lightning, and the bare loop of the same model."""

import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from lightning import Trainer
from torch import nn
from torch.nn import functional

from img2prompt.build import build
from img2prompt.data.drawings import Drawings
from img2prompt.data.order import Draws
from img2prompt.data.pixels import Pixels
from img2prompt.data.sample import Batch, Sample
from img2prompt.encoders.encoder import Encoder
from img2prompt.losses import Cosine
from img2prompt.regressor import Regressor, Target, build_regressor
from img2prompt.synthesis.procedural import Procedural
from img2prompt.training.augment import Augment
from img2prompt.training.callbacks import Log
from img2prompt.training.datamodule import PairData
from img2prompt.training.ema import Ema
from img2prompt.training.guard import Guard
from img2prompt.training.loop import Loop
from img2prompt.training.module import RegressorModule
from img2prompt.training.optim import AdamW
from img2prompt.training.run_folder import MetricsFile

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Steps that are not counted: caches, threads and the allocator find their sizes.
WARM = 5


def regressor_of(encoder: dict, head: dict | None = None) -> Regressor:
    torch.manual_seed(0)
    built = build(encoder, Encoder)
    regressor = build_regressor(built, head or {"_target_": "img2prompt.heads.Linear"}, Target("random", None, 384))
    return regressor.to(DEVICE).to(memory_format=torch.channels_last)


def data_of(
    regressor: Regressor, batch: int, count: int = 512, samples: list[Sample] | None = None, keep_gib: float = 8.0
) -> PairData:
    """Drawings or `samples` with random targets, kept in memory if `keep_gib` allows it."""
    want = regressor.encoder.preprocessing
    samples = samples or Drawings(count, 2, 0, Procedural(64)).find().samples
    pixels = Pixels(samples, want.image_size_px, want.interpolation, want.resize_mode, keep_gib=keep_gib)
    pixels.fill(lambda count: None)
    targets = functional.normalize(torch.randn(len(samples), 384), dim=-1)
    rows = np.arange(len(samples))
    draws = Draws(rows, rows, np.ones(len(rows)), rows.astype(np.uint64))
    return PairData(samples, targets, pixels, rows, rows[:1], draws, batch, 1, 0)


def ours(
    regressor: Regressor,
    batches: Iterable[Batch],
    batch: int,
    steps: int,
    precision: str = "32-true",
    ema_decay: float | None = None,
    **more: float,
) -> float:
    """Images/s of Lightning with our module, schedule and logging. `more` goes to the module."""
    loop = Loop()
    module = RegressorModule(
        regressor=regressor,
        loss=Cosine(),
        optim=AdamW(lr=1e-4),
        pretrained=True,
        seed=0,
        stage="timed",
        start=0,
        total=steps + WARM,
        augment=Augment(),
        frozen_batchnorm=False,
        loop=loop,
        guard=Guard(loop.max_skipped_steps, torch.device(DEVICE)),
        ema=Ema(regressor, ema_decay) if ema_decay is not None else None,
        **more,
    )
    times: list[float] = []
    wrapped = module.training_step

    def timed(*args):
        # To wait for a GPU at every step would slow it down.
        if len(times) in (WARM, WARM + steps):
            _wait()
        times.append(time.perf_counter())
        return wrapped(*args)

    module.training_step = timed
    with tempfile.TemporaryDirectory() as folder:
        Trainer(
            accelerator="gpu" if DEVICE == "cuda" else "cpu",
            devices=1,
            precision=precision,
            max_epochs=1,
            logger=[MetricsFile(Path(folder, "metrics.csv"))],
            callbacks=[Log(10)],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            use_distributed_sampler=False,
        ).fit(module, batches)
    return batch * steps / (times[WARM + steps] - times[WARM])


def bare(
    regressor: nn.Module, batches: list[Batch], batch: int, steps: int, precision: torch.dtype | None = None
) -> float:
    """Images/s of forward, loss, backward, clipping and AdamW alone, on batches that are already there."""
    optimizer = torch.optim.AdamW(regressor.parameters(), lr=1e-4, weight_decay=0.05, fused=True)
    regressor.train()
    began = 0.0
    for step in range(steps + WARM):
        if step == WARM:
            _wait()
            began = time.perf_counter()
        one = batches[step % len(batches)]
        inputs = {name: value.to(DEVICE, non_blocking=True) for name, value in one.inputs.items()}
        with torch.autocast(DEVICE, precision or torch.bfloat16, enabled=precision is not None):
            embedding = regressor(inputs).embedding
            loss = 1 - (embedding * one.targets.to(DEVICE)).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(regressor.parameters(), 1.0)
        optimizer.step()
    _wait()
    return batch * steps / (time.perf_counter() - began)


class Repeated:
    """A loader of `count` batches that are there already. (Lightning takes a list for a list of loaders.)"""

    def __init__(self, batches: list[Batch], count: int) -> None:
        self.batches, self.count = batches, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Batch]:
        return (self.batches[number % len(self.batches)] for number in range(self.count))


def _wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
