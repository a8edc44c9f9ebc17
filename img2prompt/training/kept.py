"""What an encoder's frozen part says of rows, computed once: it stands for their pixels.

# R = rows, E = width of the features, C, h, w = channels, height and width of a latent
"""

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from img2prompt import ranks
from img2prompt.cache import Store, check_free, key_of, size_of
from img2prompt.encoders.encoder import Encoder

if TYPE_CHECKING:
    from img2prompt.training.datamodule import PairData

# To be raised when the same images give other latents: kept ones are not used then.
_VERSION = 1
_STORED_AT_ONCE_BYTES = 256 * 2**20


@runtime_checkable
class Kept(Protocol):
    def of(self, rows: Sequence[int]) -> tuple[list[int], dict[str, Tensor]]:
        """The rows that are kept, and what the encoder is given for them."""
        ...


class KeptFeatures:
    """Pooled features [R, E] of some rows of the table, in memory."""

    def __init__(self, rows: Sequence[int], values: Float[Tensor, "R E"]) -> None:
        self._values = values
        self._places = {row: place for place, row in enumerate(rows)}

    def of(self, rows: Sequence[int]) -> tuple[list[int], dict[str, Tensor]]:
        good = [row for row in rows if row in self._places]
        return good, {"pooled": self._values[[self._places[row] for row in good]]}


class KeptLatents:
    """What the prefix of an encoder makes of the images of some rows, on disk in half precision."""

    def __init__(self, name: str, store: Store, places: np.ndarray) -> None:
        self._name, self._store, self._places = name, store, places

    def of(self, rows: Sequence[int]) -> tuple[list[int], dict[str, Tensor]]:
        good = [row for row in rows if self._places[row] >= 0]
        return good, {self._name: torch.from_numpy(self._store.read(self._places[good])).float()}


def keep_latents(encoder: Encoder, data: "PairData", folder: Path) -> KeptLatents | None:
    """The prefix's word on all rows, from `folder` or computed now, of several ranks by the first; None where images
    are no files, of which one could say whether they have changed. ValueError when the disk is too small.
    """
    rows = [*data.train_rows.tolist(), *data.val_rows.tolist()]
    try:
        keys = {row: key_of(data.samples[row].source.stamp(data.samples[row].location)) for row in rows}
    except (ValueError, OSError):
        return None
    device = next(encoder.parameters()).device
    size = encoder.preprocessing.image_size_px
    with torch.no_grad():
        shape = tuple(encoder.frozen(torch.zeros(1, 3, size, size, dtype=torch.uint8, device=device)).shape[1:])
    about = {"version": _VERSION, **encoder.preprocessing.as_arguments(), "weights": _digest(encoder)}
    place = folder / encoder.prefix_name / key_of(*about.values()).hex()
    if not ranks.number():
        _fill(Store(place, shape, np.float16, about), encoder, data, keys)
    ranks.wait()
    store = Store(place, shape, np.float16, about)
    places = np.full(len(data.samples), -1, dtype=np.int64)
    places[rows] = store.places([keys[row] for row in rows])
    return KeptLatents(encoder.prefix_name, store, places)


def _fill(store: Store, encoder: Encoder, data: "PairData", keys: dict[int, bytes]) -> None:
    first = {key: row for row, key in reversed(keys.items())}
    there = store.places(list(first)) >= 0
    missing = {row: key for (key, row), is_there in zip(first.items(), there, strict=True) if not is_there}
    check_free(store.folder, len(missing) * store.row_bytes, "choose another cache_dir, or data.cache=none")
    if missing:
        size = size_of(len(missing) * store.row_bytes)
        print(f"{encoder.prefix_name} of {len(missing)} images, {size}, are kept in {store.folder}", file=sys.stderr)
    device = next(encoder.parameters()).device
    waiting: list[tuple[bytes, np.ndarray]] = []

    def write() -> None:
        store.add([key for key, _ in waiting], np.stack([row for _, row in waiting]))
        waiting.clear()

    bar = tqdm(total=len(missing), desc=encoder.prefix_name, unit=" images", disable=not sys.stderr.isatty())
    with bar, torch.no_grad():
        for batch in data.batches_of(list(missing)):
            said = encoder.frozen(batch.inputs["images"].to(device)).half().cpu().numpy()
            waiting += [(missing[row], one) for row, one in zip(batch.rows.tolist(), said, strict=True)]
            bar.update(len(said))
            if len(waiting) * store.row_bytes > _STORED_AT_ONCE_BYTES:
                write()
        if waiting:
            write()


def _digest(encoder: Encoder) -> str:
    """Of all that the prefix is made of."""
    config, tensors = encoder.prefix_state()
    digest = hashlib.blake2b(json.dumps(config, sort_keys=True).encode(), digest_size=16)
    for name, value in sorted(tensors.items()):
        digest.update(f"{name}\0".encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
