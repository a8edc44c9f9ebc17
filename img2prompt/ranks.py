"""Ranks: the processes that train one model together, one a device. Alone, nothing here does or costs anything.

The first rank (number 0) does what a single process does: it finds and decodes, scores what is not a step, writes and
prints. The others take their share of the rows of each step, and of what validates, and are told all else.
"""

import os
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, distributed

# Waiting is no fault: the first rank may embed and decode for hours. A rank that dies closes its connections.
_PATIENCE = timedelta(days=7)
_MOST_BYTES_AT_ONCE = 2**28


def count() -> int:
    """How many ranks have joined; 1 alone."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def number() -> int:
    """Which of them this process is, from 0."""
    return distributed.get_rank() if count() > 1 else 0


def started() -> int:
    """How many processes the environment says there are, in the variables that torchrun sets; 1 without them."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def join() -> None:
    """Waits until every rank that the environment speaks of is there; does nothing alone, or a second time."""
    if started() > 1 and count() == 1:
        # Tensors on GPUs go by NCCL; what the hosts tell each other never waits for a GPU.
        has_nccl = torch.cuda.is_available() and distributed.is_nccl_available()
        distributed.init_process_group("cpu:gloo,cuda:nccl" if has_nccl else "gloo", timeout=_PATIENCE)


def leave() -> None:
    if count() > 1:
        distributed.destroy_process_group()


def is_lost(error: BaseException) -> bool:
    """Whether the error says no more than that another rank is gone."""
    told = str(error)
    return isinstance(error, RuntimeError) and (
        isinstance(error, distributed.DistError) or "gloo" in told or "Connection closed by peer" in told
    )


def share_of(rows: np.ndarray) -> np.ndarray:
    """The part of the rows of a batch that is this rank's."""
    return np.array_split(rows, count())[number()] if count() > 1 else rows


def own(name: str) -> str:
    """`name` for the first rank and another one for each other: chance that is seeded by it differs."""
    return f"{name}/rank{number()}" if number() else name


def from_first(value: Any = None) -> Any:
    """The first rank's `value`, on all ranks."""
    if count() == 1:
        return value
    told = [value]
    distributed.broadcast_object_list(told, src=0)
    return told[0]


@torch.no_grad()
def copy_first(tensors: Iterable[Tensor]) -> None:
    """Gives the tensors of all ranks, in their place, the values of the first rank's."""
    if count() == 1:
        return
    for tensor in tensors:
        whole = tensor.detach().contiguous()
        for part in whole.view(-1).split(_MOST_BYTES_AT_ONCE // whole.element_size()):
            distributed.broadcast(part, src=0)
        if whole.data_ptr() != tensor.data_ptr():
            tensor.copy_(whole)


def means(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The means of these scalars over the ranks."""
    if count() == 1:
        return dict(values)
    stacked = torch.stack([value.float() for value in values.values()])
    distributed.all_reduce(stacked)
    return dict(zip(values, (stacked / count()).unbind(), strict=True))


def largest(*numbers: float) -> tuple[float, ...]:
    """The largest of each of these numbers over the ranks. It waits for the other hosts, and for no GPU."""
    if count() == 1:
        return numbers
    told = torch.tensor(numbers, dtype=torch.float64)
    distributed.all_reduce(told, distributed.ReduceOp.MAX)
    return tuple(told.tolist())


def gathered(tensor: Float[Tensor, "B D"]) -> Float[Tensor, "N D"]:
    """The rows of all ranks, in the order of the ranks, without gradients; each rank must have as many."""
    if count() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(count())]
    distributed.all_gather(parts, tensor.detach().contiguous())
    return torch.cat(parts)


def every(value: Any) -> list[Any]:
    """What each rank has, in the order of the ranks."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    distributed.all_gather_object(values, value)
    return values


def wait() -> None:
    """Until all ranks are here."""
    largest(0.0)
