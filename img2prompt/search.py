"""Exact search by cosine, block by block: no index, and memory bounded by one block.

# Q = queries, N = rows, D = width of an embedding
"""

import time
from collections.abc import Iterator
from functools import cache

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

_BLOCK_ROWS = 1024
_BLOCK_COLUMNS = 4096
# The share of the squared norms that the principal components of the first pass keep: with fewer of them it is faster,
# and its bounds are so loose that too many pairs must be scored again.
_KEPT_NORM = 0.92
# The largest error of a bound: both rows are rounded to 8 bits (2 · 2^-8), and so is their product (2^-9), with some
# room for what a GPU loses in its sums. Sums of float32 lose less than 1e-5.
_BF16_MARGIN = 0.015
_FP32_MARGIN = 1e-5
_QUERIES_AT_ONCE = 4096
_SHORTENED_AT_ONCE = 65_536


def nearest(
    queries: Float[Tensor, "Q D"], bank: Float[Tensor, "N D"], count: int, block_rows: int = 65_536
) -> tuple[Float[Tensor, "Q K"], Int[Tensor, "Q K"]]:
    """The K = min(count, N) rows of `bank` with the highest cosine for each query, best first.

    Rows are of unit length. Returns cosines and row numbers.
    """
    if bank.shape[0] == 0 or count < 1:
        raise ValueError(f"nearest neighbours need a filled bank and count >= 1, got {len(bank)} rows, count {count}")
    if len(queries) > _QUERIES_AT_ONCE:
        parts = [nearest(part, bank, count, block_rows) for part in queries.split(_QUERIES_AT_ONCE)]
        return torch.cat([cosines for cosines, _ in parts]), torch.cat([rows for _, rows in parts])
    best = torch.empty(len(queries), 0, device=queries.device)
    rows = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(bank), block_rows):
        block = bank[start : start + block_rows].to(queries)
        cosines, numbers = (queries @ block.T).float().topk(min(count, len(block)), dim=1)
        best = torch.cat([best, cosines], dim=1)
        rows = torch.cat([rows, numbers + start], dim=1)
        order = best.sort(dim=1, descending=True, stable=True).indices[:, :count]
        best, rows = best.gather(1, order), rows.gather(1, order)
    return best, rows


def close_pairs(
    embeddings: Float[Tensor, "N D"], threshold: float, others: Float[Tensor, "M D"] | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """All pairs (i, j), j < i, whose cosine is at least `threshold`; with `others`, all pairs (i of N, j of M).

    Rows are of unit length. Yields (i, j, cosine) as arrays int64, int64, float32, block by block, the blocks in the
    order of i; besides a block only the shorter rows of the first pass are in memory. Exact: that pass over an upper
    bound of each cosine (the leading principal components, and the norm of what they leave out as one more coordinate),
    in bfloat16 where that is faster, finds candidates, and these are scored in float32.
    """
    within = others is None
    columns = embeddings if others is None else others
    sketch, sketch_columns, margin = _sketches(embeddings, columns)
    for start in range(0, len(embeddings), _BLOCK_ROWS):
        stop = min(start + _BLOCK_ROWS, len(embeddings))
        last = stop if within else len(columns)
        for left in range(0, last, _BLOCK_COLUMNS):
            right = min(left + _BLOCK_COLUMNS, last)
            bound = sketch[start:stop] @ sketch_columns[left:right].T
            rows = (bound.amax(1) >= threshold - margin).nonzero()[:, 0]
            if not len(rows):
                continue
            places = (bound[rows] >= threshold - margin).nonzero()
            i, j = rows[places[:, 0]] + start, places[:, 1] + left
            if within:
                i, j = i[j < i], j[j < i]
            cosines = _cosines(embeddings, columns, i, j, start, left, stop, right)
            kept = cosines >= threshold
            if kept.any():
                yield i[kept].cpu().numpy(), j[kept].cpu().numpy(), cosines[kept].cpu().numpy()


def _cosines(
    rows: Tensor, columns: Tensor, i: Tensor, j: Tensor, start: int, left: int, stop: int, right: int
) -> Tensor:
    if len(i) * 256 < (stop - start) * (right - left):
        return torch.linalg.vecdot(rows[i], columns[j])
    # So many that the whole block is cheaper.
    return (rows[start:stop] @ columns[left:right].T)[i - start, j - left]


def _sketches(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, float]:
    """Shorter rows [N, K], [M, K] whose product is at least the cosine, but for the margin."""
    width = rows.shape[1]
    sample = columns[:: max(1, len(columns) // 16_384)].cpu().double()
    energies, basis = torch.linalg.eigh(sample.T @ sample)
    kept = energies.flip(0).cumsum(0) / energies.sum().clamp(min=1e-12)
    count = 32 * (int((kept < _KEPT_NORM).sum()) // 32 + 1) - 1
    dtype = _fast_dtype(rows.device)
    if count < 0.75 * width:
        leading = basis.flip(1)[:, :count].to(rows)
        same = columns is rows
        rows = _shortened(rows, leading, dtype)
        columns = rows if same else _shortened(columns, leading, dtype)
    return rows.to(dtype), columns.to(dtype), _BF16_MARGIN if dtype == torch.bfloat16 else _FP32_MARGIN


def _shortened(rows: Tensor, leading: Tensor, dtype: torch.dtype) -> Tensor:
    short = torch.empty(len(rows), leading.shape[1] + 1, dtype=dtype, device=rows.device)
    for start in range(0, len(rows), _SHORTENED_AT_ONCE):
        part = rows[start : start + _SHORTENED_AT_ONCE]
        kept = part @ leading
        # Never less than it is, though it is a difference of two rounded sums.
        left_out = ((part.square().sum(1) - kept.square().sum(1)).clamp(min=0) + 1e-6).sqrt()
        short[start : start + len(part)] = torch.cat([kept, left_out[:, None]], dim=1)
    return short


@cache
def _fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where its products are faster than float32's. The results of a search do not depend on it."""
    if device.type == "cuda":
        # Older ones emulate it.
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float32
    if device.type != "cpu":
        return torch.float32
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        block = torch.ones(1024, 256, dtype=dtype)
        block @ block.T
        began = time.perf_counter()
        block @ block.T
        seconds[dtype] = time.perf_counter() - began
    return min(seconds, key=lambda dtype: seconds[dtype])
