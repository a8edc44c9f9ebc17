"""T3: our training step against a bare PyTorch loop of the same model on the same batches (goal: at least 0.98x).

Ours and the bare loop take turns and change places in every round (A B, B A, …), on one thread where there is no GPU.
The figure is the median of the paired ratios of images/s.

    python benchmarks/train_step.py [rounds] [steps]
"""

import statistics
import sys

import torch
from record import record
from rounds import paired, ratio
from steps import DEVICE, WARM, bare, data_of, ours, regressor_of

TIMM = "img2prompt.encoders.timm_model.Timm"
ENCODERS = {
    "demo (resnet10t, 64 px)": {
        "_target_": TIMM,
        "name": "resnet10t",
        "image_size_px": 64,
        "model_kwargs": {"channels": [32, 64, 128, 256], "stem_type": "", "stem_width": 32},
    },
    "vit_tiny_patch16, 96 px": {"_target_": TIMM, "name": "vit_tiny_patch16_224", "image_size_px": 96},
}
BATCH = 32


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    steps = int(sys.argv[2]) if len(sys.argv) > 2 else 30
    if DEVICE == "cpu":
        torch.set_num_threads(1)
    rows = []
    for name, choice in ENCODERS.items():
        regressor = regressor_of(choice)
        data = data_of(regressor, BATCH)
        batches = list(data.train_batches("t3", 0, 16))

        def with_lightning(regressor=regressor, data=data) -> float:
            return ours(regressor, data.train_batches("t3", 0, steps + WARM + 1), BATCH, steps)

        def alone(regressor=regressor, batches=batches) -> float:
            return bare(regressor, batches, BATCH, steps)

        speeds = paired({"ours": with_lightning, "bare": alone}, rounds)
        rows.append(
            {
                "model": name,
                **{f"{way}_images_per_second": f"{statistics.median(found):.1f}" for way, found in speeds.items()},
                **ratio(speeds["ours"], speeds["bare"]),
            }
        )
    record("train_step", rows)


if __name__ == "__main__":
    main()
