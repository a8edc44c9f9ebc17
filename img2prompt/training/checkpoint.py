"""The state of a stage in progress: what `resume=` needs beyond the weights. Plain types and tensors only."""

import pickle
from pathlib import Path
from typing import Any

import torch

from img2prompt.files import replacing


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Writes the state whole or not at all."""
    with replacing(path) as temporary:
        torch.save(state, temporary)


def read_state(path: Path) -> dict[str, Any] | None:
    """The state at `path`, None when there is none; ValueError when it is damaged. Executes nothing in the file."""
    if not path.is_file():
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{path}: damaged training state ({type(error).__name__}); start anew in another run_dir"
        ) from None
