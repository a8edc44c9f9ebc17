"""D1: the losses of two processes equal those of one with the same batch (goal: to 1e-5, models without BatchNorm).

Each loss trains a small ViT from scratch on drawn pairs, without dropout and augmentation, once on one device and once
on two: `python train.py trainer.devices=2` in a process of its own, as users start it. Compared are the training losses
of all steps and the validation cosines of all epochs. AdamW makes whole steps of gradients that are rounding alone, so
the differences grow with the number of steps. Each process has one CPU thread.

    python benchmarks/ddp.py [epochs]
"""

import csv
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from record import record

ROOT = Path(__file__).parent.parent
MODEL = ("encoder=timm", "encoder.name=test_vit", "encoder.image_size_px=32", "+encoder.model_kwargs.patch_size=8")
USUAL = (
    *("data.count=400", "data.batch_size=32", "augment=none", "optim.lr=1e-3", "encoder.pretrained=false"),
    *("stages.finetune.log_every_n_steps=1", "data.keep_split=null"),
)
LOSSES = {
    "cosine": ("loss=cosine",),
    "softmax, negatives of the batch": ("loss=softmax",),
    "sigmoid, negatives of the batch": ("loss=sigmoid",),
    "cosine, 2 batches a step": ("loss=cosine", "data.batch_size=16", "trainer.accumulate_grad_batches=2"),
}


def trained(folder: Path, *overrides: str) -> tuple[list[dict[str, str]], float]:
    """The rows of metrics.csv, and images/s."""
    command = [sys.executable, str(ROOT / "train.py"), *MODEL, *USUAL, *overrides, f"run_dir={folder}"]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file)), json.loads((folder / "summary.json").read_text())["images_per_second"]


def largest(one: list[dict[str, str]], two: list[dict[str, str]], start: str) -> float:
    """The largest difference of the values whose names begin with `start`."""
    differences = [
        abs(float(first[key]) - float(second[key]))
        for first, second in zip(one, two, strict=True)
        for key in first
        if key.startswith(start) and first[key]
    ]
    assert differences
    return max(differences)


def main() -> None:
    epochs = sys.argv[1] if len(sys.argv) > 1 else "8"
    accelerator = "gpu" if torch.cuda.device_count() > 1 else "cpu"
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, overrides in LOSSES.items():
            own = (*overrides, f"trainer.max_epochs={epochs}", f"trainer.accelerator={accelerator}")
            one, alone = trained(Path(folder, name, "one"), *own, "trainer.devices=1")
            two, together = trained(Path(folder, name, "two"), *own, "trainer.devices=2")
            rows.append(
                {
                    "loss": name,
                    "steps": one[-1]["step"],
                    "largest_difference_first_10_steps": f"{largest(one[:10], two[:10], 'train/'):.1e}",
                    "largest_difference": f"{largest(one, two, 'train/'):.1e}",
                    "largest_difference_val_cosine": f"{largest(one, two, 'val/'):.1e}",
                    "images_per_second_one": f"{alone:.0f}",
                    "images_per_second_two": f"{together:.0f}",
                }
            )
    record("ddp", rows)


if __name__ == "__main__":
    main()
