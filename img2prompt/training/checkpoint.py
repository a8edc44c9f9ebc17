"""The state of a stage in progress: what `resume=` needs beyond the weights. Plain types and tensors only."""

import pickle
from pathlib import Path
from typing import Any

import torch

from img2prompt.files import replacing

_KEYS = {"stage", "step", "total", "best", "seconds", "regressor", "optimizer"}


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Writes the state whole or not at all."""
    with replacing(path) as temporary:
        torch.save(state, temporary)


def read_state(path: Path) -> dict[str, Any] | None:
    """The state at `path`, None when there is none; ValueError when it is damaged. Executes nothing in the file."""
    if not path.is_file():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        reason = "" if isinstance(state, dict) and set(state) == _KEYS else "not what a stage writes"
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = type(error).__name__
    if reason:
        raise ValueError(f"{path}: damaged training state ({reason}); start anew in another run_dir")
    return state
