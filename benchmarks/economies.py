"""T4: what is saved where less is computed: the last 8 of 32 blocks alone (goal 1.8x), half of the patches left out
(1.8x), and epochs of a linear probe on features that are computed once (100x). Each against the step that does all.

    python benchmarks/economies.py [rounds] [steps]
"""

import statistics
import sys

import torch
from record import record
from rounds import paired, ratio
from steps import DEVICE, WARM, data_of, ours, regressor_of

from img2prompt.training.kept import KeptFeatures
from img2prompt.training.scoring import features_of

# As deep as ViT-H/14, and so narrow that a CPU can train it.
DEEP = {
    "_target_": "img2prompt.encoders.timm_model.Timm",
    "name": "vit_tiny_patch16_224",
    "image_size_px": 160,
    "model_kwargs": {"depth": 32},
}
BATCH = 8
# Of the probe: what is kept can be had in large batches.
PROBE_BATCH = 64


def frozen_below(regressor, unfrozen: int | None) -> None:
    regressor.requires_grad_(True)
    blocks = regressor.encoder.blocks()
    for block in blocks[: len(blocks) - unfrozen] if unfrozen is not None else []:
        for parameter in block:
            parameter.requires_grad_(False)


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    steps = int(sys.argv[2]) if len(sys.argv) > 2 else 10
    if DEVICE == "cpu":
        torch.set_num_threads(1)
    regressor = regressor_of(DEEP)
    data, probed = data_of(regressor, BATCH), data_of(regressor, PROBE_BATCH)

    def speed(unfrozen: int | None = None, patch_dropout: float = 0.0, pairs=data, steps: int = steps) -> float:
        frozen_below(regressor, unfrozen)
        batches = pairs.train_batches("t4", 0, steps + WARM + 1)
        found = ours(regressor, batches, pairs.batch_size, steps, patch_dropout=patch_dropout)
        regressor.encoder.set_patch_dropout(0.0)
        return found

    rows, features = features_of(regressor, probed, list(range(len(probed.samples))), bf16=False)
    kept = probed.with_kept(KeptFeatures(rows, features))
    claims = {
        "last 8 of 32 blocks": ({"some": lambda: speed(unfrozen=8), "all": speed}, 1.8),
        "half of the patches": ({"some": lambda: speed(patch_dropout=0.5), "all": speed}, 1.8),
        "probe on kept features": (
            {
                "some": lambda: speed(unfrozen=0, pairs=kept, steps=10 * steps),
                "all": lambda: speed(unfrozen=0, pairs=probed, steps=2),
            },
            100,
        ),
    }
    results = []
    for claim, (ways, goal) in claims.items():
        speeds = paired(ways, rounds)
        results.append(
            {
                "claim": claim,
                "goal": goal,
                **{f"{way}_images_per_second": f"{statistics.median(found):.1f}" for way, found in speeds.items()},
                **ratio(speeds["some"], speeds["all"]),
            }
        )
    record("economies", results)


if __name__ == "__main__":
    main()
