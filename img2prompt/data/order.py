"""Which rows are batch k: a pure function of (seed, stage, step), so that a resumed run sees what it would have."""

import hashlib
from functools import lru_cache

import numpy as np


def steps_per_epoch(count: int, batch_size: int) -> int:
    """Batches in an epoch over `count` rows. The remainder of a full batch is left out: other rows in each epoch."""
    return max(1, count // batch_size)


def batch_rows(count: int, batch_size: int, seed: int, stage: str, step: int) -> np.ndarray:
    """Positions 0..count-1 of the rows of batch `step`, counted from the start of the stage; int64."""
    epoch, batch = divmod(step, steps_per_epoch(count, batch_size))
    return _epoch_order(count, seed, stage, epoch)[batch * batch_size : (batch + 1) * batch_size]


def step_seed(seed: int, stage: str, step: int) -> int:
    """A seed for everything random in one step (dropout, augmentation), in 0..2^63-1."""
    digest = hashlib.blake2b(f"{seed}\0{stage}\0{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@lru_cache(maxsize=2)
def _epoch_order(count: int, seed: int, stage: str, epoch: int) -> np.ndarray:
    return np.random.default_rng(step_seed(seed, f"{stage}/order", epoch)).permutation(count)
