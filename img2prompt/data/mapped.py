"""Rows of many texts on disk, in half precision, made once and never read whole: the bank of a retrieval.

# N = texts, E = width of a row
"""

import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from img2prompt.cache import check_free, key_of
from img2prompt.files import locked, write_json

_AT_ONCE = 65_536


def mapped_rows(
    folder: Path,
    texts: Sequence[str],
    about: Sequence[Any],
    width: int,
    encode: Callable[[list[str]], Float[np.ndarray, "B E"]],
    advance: Callable[[int], object] = lambda count: None,
) -> Float[Tensor, "N E"]:
    """The unit rows that `encode` makes of the texts, float16, mapped from a file in `folder` that goes by the texts
    and by what the encoder is (`about`, plain data). What is there is not made again; a process that is killed loses
    what it was making, and the next goes on. `advance` is told of texts that are done. ValueError where the disk is too
    small.
    """
    own = folder / key_of(len(texts), *texts, "", *about).hex()
    path, state = own.with_suffix(".npy"), own.with_suffix(".json")
    with locked(own.with_suffix(".lock"), f"{own}: another process is making this bank; wait for it"):
        done = _done(state, path)
        if done == 0:
            check_free(folder, 2 * len(texts) * width, "choose another cache_dir, or a smaller bank")
            np.lib.format.open_memmap(path, "w+", np.float16, (len(texts), width)).flush()
        rows = np.lib.format.open_memmap(path, "r+")
        advance(done)
        while done < len(texts):
            some = list(texts[done : done + _AT_ONCE])
            made = encode(some)
            rows[done : done + len(some)] = made / np.linalg.norm(made, axis=1, keepdims=True).clip(min=1e-12)
            rows.flush()
            done += len(some)
            # After the rows, so that what it counts is on the disk.
            write_json(state, {"done": done, "width": width, "about": [str(one) for one in about]})
            advance(len(some))
    with warnings.catch_warnings():
        # It is only read; a mapping that can be written to would count as memory, all of it.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(np.lib.format.open_memmap(path, "r"))


def _done(state: Path, path: Path) -> int:
    try:
        done = int(json.loads(state.read_text(encoding="utf-8"))["done"])
    except (OSError, ValueError, TypeError, KeyError):
        return 0
    return done if path.is_file() else 0
