"""The state of a stage in progress: what `resume=` needs beyond the weights. Plain types and tensors only.

Two states are kept, last.ckpt and the one before it: a disk can damage a file long after it was written whole.
"""

import os
import pickle
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from img2prompt.files import replacing

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
_KEYS = {
    "stage",
    "step",  # absolute, of the stage
    "total",
    "scored",  # whether the validation that is due at this step is done
    "best",
    "kept",  # [[cosine, step], …] of the checkpoints that are kept
    "seconds",
    "skipped",  # steps whose gradients were not finite
    "regressor",
    "loss",
    "optimizer",
    "ema",  # averaged weights by name; empty without
}


def write_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Writes last.ckpt whole or not at all; what it was before is previous.ckpt then."""
    kept = _on_cpu(state)
    with replacing(folder / LAST, size_bytes(kept)) as temporary:
        # Through a file of Python's, so that a full disk says what it is.
        with temporary.open("wb") as file:
            torch.save({**kept, "crc32": _crc32(kept, 0)}, file)
        if (folder / LAST).exists():
            os.replace(folder / LAST, folder / PREVIOUS)


def read_state(folder: Path) -> dict[str, Any] | None:
    """The newest whole state in `folder`, None when there has been none. Executes nothing in the files.

    ValueError when there are states and all are damaged: to begin anew in silence would be worse.
    """
    damaged: list[str] = []
    for path in (folder / LAST, folder / PREVIOUS):
        if not path.is_file():
            continue
        state, reason = _read(path)
        if not reason:
            if damaged:
                print(f"{damaged[0]}; going on from {path.name}, step {state['step']}", file=sys.stderr)
            return state
        damaged.append(f"{path}: damaged training state ({reason})")
    if damaged:
        raise ValueError(f"{'; '.join(damaged)}; start anew in another run_dir")
    return None


def room_bytes(regressor: nn.Module, has_ema: bool, keep: int, stages: int) -> int:
    """What the folder of checkpoints of a run takes at most: two states and one that is being written, and weights, of
    each stage its best and `keep` of its epochs.
    """
    weights = size_bytes(regressor.state_dict())
    trained = size_bytes([parameter for parameter in regressor.parameters() if parameter.requires_grad])
    return 3 * (weights + (3 if has_ema else 2) * trained) + stages * (1 + keep) * weights


def size_bytes(value: Any) -> int:
    """How many bytes the tensors of a state have."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return sum(size_bytes(item) for item in items)


def _read(path: Path) -> tuple[dict[str, Any], str]:
    """The state, and what is wrong with it if anything is."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
        return {}, type(error).__name__
    if not isinstance(state, dict) or set(state) != {*_KEYS, "crc32"}:
        return {}, "not what a stage writes"
    expected = state.pop("crc32")
    return state, "" if _crc32(state, 0) == expected else "its checksum differs"


def _on_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        # As it lies in memory: the fused optimiser walks weights and moments together, whatever their strides say.
        return value.detach().cpu()
    if isinstance(value, Mapping):
        return {key: _on_cpu(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_on_cpu(item) for item in value]
    return value


def _crc32(value: Any, crc: int) -> int:
    # The archive that torch.save writes has checksums, and torch.load reads it without looking at them.
    if isinstance(value, Tensor):
        flat: Any = value.reshape(-1).view(torch.uint8).numpy()
        return zlib.crc32(flat, crc)
    if isinstance(value, Mapping):
        for key, item in value.items():
            crc = _crc32(item, zlib.crc32(repr(key).encode(), crc))
        return crc
    if isinstance(value, list | tuple):
        for item in value:
            crc = _crc32(item, crc)
        return crc
    return zlib.crc32(repr(value).encode(), crc)
