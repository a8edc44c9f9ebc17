"""The matrix-multiplication rate of the device, against which utilisation is counted."""

import time

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def matmul_rate(dtype: torch.dtype = torch.bfloat16) -> float:
    """The best of ten products of large square matrices, in FLOP/s."""
    size = 8192 if DEVICE == "cuda" else 2048
    left, right = (torch.randn(size, size, device=DEVICE, dtype=dtype) for _ in range(2))
    rates = []
    for _ in range(10):
        _wait()
        began = time.perf_counter()
        for _ in range(4):
            left @ right
        _wait()
        rates.append(4 * 2 * size**3 / (time.perf_counter() - began))
    return max(rates)


def _wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
