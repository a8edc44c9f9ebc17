"""T5: training on the images of a folder against batches that are already on the device (goal: at least 0.97x), with
the decoded pixels kept in memory, and with every image decoded in every epoch.

    python benchmarks/real_data.py FOLDER [rounds] [steps]
"""

import statistics
import sys
from dataclasses import replace
from pathlib import Path

from record import record
from rounds import paired, ratio
from steps import DEVICE, WARM, Repeated, data_of, ours, regressor_of

from img2prompt.data.kaggle import Kaggle
from img2prompt.data.sample import Batch

BATCH = 32 if DEVICE == "cpu" else 256
ENCODER = (
    {"_target_": "img2prompt.encoders.timm_model.Timm", "name": "tf_efficientnet_lite0", "image_size_px": 224}
    if DEVICE == "cpu"
    else {"_target_": "img2prompt.encoders.openclip.OpenCLIP", "name": "ViT-L-14", "tag": "openai"}
)


def on_device(batch: Batch) -> Batch:
    inputs = {name: value.to(DEVICE) for name, value in batch.inputs.items()}
    return replace(batch, inputs=inputs, targets=batch.targets.to(DEVICE), rows=batch.rows.to(DEVICE))


def main() -> None:
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 5
    steps = int(sys.argv[3]) if len(sys.argv) > 3 else 10
    precision = "bf16-mixed" if DEVICE == "cuda" else "32-true"
    samples = Kaggle(Path(sys.argv[1])).find().samples
    regressor = regressor_of(ENCODER)
    total = steps + WARM + 1
    rows = []
    for name, keep_gib in (("kept in memory", 8.0), ("decoded in every epoch", 0.0)):
        data = data_of(regressor, BATCH, samples=samples, keep_gib=keep_gib)
        there = Repeated([on_device(batch) for batch in data.train_batches("t5", 0, 4)], total)

        def real(data=data) -> float:
            return ours(regressor, data.train_batches("t5", 0, total), BATCH, steps, precision)

        def synthetic(there=there) -> float:
            return ours(regressor, there, BATCH, steps, precision)

        speeds = paired({"real": real, "synthetic": synthetic}, rounds)
        rows.append(
            {
                "pixels": name,
                **{f"{way}_images_per_second": f"{statistics.median(found):.1f}" for way, found in speeds.items()},
                **ratio(speeds["real"], speeds["synthetic"]),
            }
        )
    record("real_data", rows)


if __name__ == "__main__":
    main()
