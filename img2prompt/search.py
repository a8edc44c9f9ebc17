"""Exact nearest neighbours by cosine, block by block: no index, memory bounded by one block."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def nearest(
    queries: Float[Tensor, "Q D"], bank: Float[Tensor, "N D"], count: int, block_rows: int = 65_536
) -> tuple[Float[Tensor, "Q K"], Int[Tensor, "Q K"]]:
    """The K = min(count, N) rows of `bank` with the highest cosine for each query, best first.

    Rows are of unit length. Returns cosines and row numbers.
    """
    if bank.shape[0] == 0 or count < 1:
        raise ValueError(f"nearest neighbours need a filled bank and count >= 1, got {len(bank)} rows, count {count}")
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
