"""K1: DAKL at full size, its time and peak memory, and its cosine beside plain ridge's, on made-up embeddings.

The source has five images a centroid. Prompts lie in 100 of 384 dimensions around a mean; an image is its prompt
through a map, which is another one for the target, and noise.

    python benchmarks/dakl.py [centroids] [targets]
"""

import resource
import sys
import time

import numpy as np
import torch
from record import record
from torch import Tensor
from torch.nn.functional import normalize

from img2prompt.refine.dakl import Dakl
from img2prompt.refine.linear import Linear
from img2prompt.refine.refiner import mean_cosine

_PER_CENTROID = 5
_WIDTH = 384


def main() -> None:
    centroids = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    targets = int(sys.argv[2]) if len(sys.argv) > 2 else 30_000
    source, goals = _images(_PER_CENTROID * centroids, shift=0.0, seed=1)
    target, truth = _images(targets, shift=0.1, seed=2)
    groups = np.arange(len(goals))
    before = _peak_gib()
    dakl, ridge = Dakl(centroids), Linear()
    seconds = []
    for step in (lambda: dakl.fit(source, goals, groups), lambda: dakl.refine(target)):
        began = time.perf_counter()
        refined = step()
        seconds.append(time.perf_counter() - began)
    peak = _peak_gib()
    began = time.perf_counter()
    ridge.fit(source, goals, groups)
    plain = ridge.refine(target)
    seconds.append(time.perf_counter() - began)
    assert refined is not None
    print("\n".join(dakl.lines() + ridge.lines()))
    record(
        "dakl",
        [
            {
                "claim": "K1 DAKL with alpha chosen on the source",
                "source": len(goals),
                "centroids": centroids,
                "targets": targets,
                "kmeans_seconds": f"{seconds[0]:.1f}",
                "kernel_and_alpha_seconds": f"{seconds[1]:.1f}",
                "peak_gib_above_start": f"{peak - before:.2f}",
                "peak_gib": f"{peak:.2f}",
                "ridge_seconds": f"{seconds[2]:.1f}",
                "dakl_cosine": f"{mean_cosine(refined, truth):.4f}",
                "ridge_cosine": f"{mean_cosine(plain, truth):.4f}",
                "unrefined_cosine": f"{mean_cosine(target[0], truth):.4f}",
            }
        ],
    )


def _images(count: int, shift: float, seed: int) -> tuple[Tensor, Tensor]:
    """A member's predictions [1, count, D] and their targets [count, D]."""
    world, drawn, other = (torch.Generator().manual_seed(one) for one in (0, seed, 3))
    basis, mean = torch.randn(100, _WIDTH, generator=world), 5 * torch.randn(_WIDTH, generator=world)
    bent = torch.eye(_WIDTH) + 0.5 * torch.randn(_WIDTH, _WIDTH, generator=world) / _WIDTH**0.5
    bent += shift * torch.randn(_WIDTH, _WIDTH, generator=other) / _WIDTH**0.5
    prompts = normalize(torch.randn(count, 100, generator=drawn) @ basis + mean, dim=1)
    noise = torch.randn(count, _WIDTH, generator=drawn) / _WIDTH**0.5
    return normalize(prompts @ bent + 0.7 * noise, dim=1)[None], prompts


def _peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
