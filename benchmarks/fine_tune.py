"""T1 and T2: a full fine-tune of an experiment's encoder at its true size, random weights, bf16, blocks compiled.

T1: what part of the matrix-multiplication rate, taken in the same command, the step uses (goal 55 % for ViT-H/14 on one
H200); a step counts three forward passes. T2: against the same Lightning module without compiling, on the library's own
eager model in bf16 (goal 1.3x for ViT-H/14, 1.5x for EVA02-L). Compilation is not counted.

    python benchmarks/fine_tune.py [experiment] [batch] [rounds] [steps]
"""

import statistics
import sys

import torch
from matmul import matmul_rate
from record import record
from rounds import paired, ratio
from steps import DEVICE, WARM, Repeated, bare, data_of, ours, regressor_of
from torch.utils.flop_counter import FlopCounterMode

from img2prompt.commands.settings import compose


def flops_of(regressor) -> float:
    """Of one image forward."""
    with FlopCounterMode(display=False) as counter:
        regressor.encoder.dry_run()
    return counter.get_total_flops()


def main() -> None:
    experiment = sys.argv[1] if len(sys.argv) > 1 else "vit_h"
    batch = int(sys.argv[2]) if len(sys.argv) > 2 else 128
    rounds = int(sys.argv[3]) if len(sys.argv) > 3 else 3
    steps = int(sys.argv[4]) if len(sys.argv) > 4 else 20
    choice = compose("train", [f"+experiment={experiment}", "data=kaggle", "data.root=none"])["encoder"]
    choice = {key: value for key, value in choice.items() if key != "pretrained"}
    regressor = regressor_of(choice)
    flops = flops_of(regressor)
    regressor.encoder.compile_blocks()
    data = data_of(regressor, batch, count=4 * batch)
    batches = list(data.train_batches("t1", 0, 4))
    peak = matmul_rate()

    def compiled() -> float:
        return ours(regressor, Repeated(batches, steps + WARM + 1), batch, steps, "bf16-mixed", ema_decay=0.9998)

    def eager() -> float:
        return ours(plain, Repeated(batches, steps + WARM + 1), batch, steps, "bf16-mixed", ema_decay=0.9998)

    def loop() -> float:
        return bare(plain, batches, batch, steps, torch.bfloat16)

    compiled()
    peak_gib = torch.cuda.max_memory_allocated() / 2**30 if DEVICE == "cuda" else None
    plain = regressor_of(choice)
    speeds = paired({"ours": compiled, "eager_lightning": eager, "eager_loop": loop}, rounds)
    speed = statistics.median(speeds["ours"])
    row = {
        "experiment": experiment,
        "batch": batch,
        "forward_gflop_per_image": f"{flops / 1e9:.1f}",
        "matmul_tflop_per_second": f"{peak / 1e12:.1f}",
        **{f"{way}_images_per_second": f"{statistics.median(found):.1f}" for way, found in speeds.items()},
        "utilisation": f"{3 * flops * speed / peak:.3f}",
        **ratio(speeds["ours"], speeds["eager_lightning"]),
    }
    if peak_gib is not None:
        row["peak_gib"] = f"{peak_gib:.1f}"
    record(f"fine_tune_{experiment}", [row])


if __name__ == "__main__":
    main()
