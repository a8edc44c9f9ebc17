"""What an encoder's frozen part says of rows, computed once: it stands for their pixels.

# R = rows, E = width of the features, C, h, w = channels, height and width of a latent
"""

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
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


class KeptPrefix:
    """What the prefix of an encoder makes of the images of some rows, on disk; fractions in half precision."""

    def __init__(self, stores: Mapping[str, Store], keys: Mapping[int, bytes], count: int) -> None:
        self._stores = stores
        self._places = {name: np.full(count, -1, dtype=np.int64) for name in stores}
        for name, store in stores.items():
            self._places[name][list(keys)] = store.places(list(keys.values()))

    def of(self, rows: Sequence[int]) -> tuple[list[int], dict[str, Tensor]]:
        good = [row for row in rows if all(places[row] >= 0 for places in self._places.values())]
        found = {name: store.read(self._places[name][good]) for name, store in self._stores.items()}
        return good, {
            name: torch.from_numpy(one.astype(np.float32) if one.dtype == np.float16 else one)
            for name, one in found.items()
        }


def keep_prefix(encoder: Encoder, data: "PairData", folder: Path) -> KeptPrefix | None:
    """The prefix's word on all rows, from `folder` or computed now, of several ranks by the first; None where images
    are no files, of which one could say whether they have changed. ValueError when the disk is too small.
    """
    rows = [*data.train_rows.tolist(), *data.val_rows.tolist()]
    try:
        keys = {row: key_of(data.samples[row].source.stamp(data.samples[row].location)) for row in rows}
    except (ValueError, OSError):
        return None
    if not ranks.number():
        _fill(_stores(encoder, folder), encoder, data, keys)
    ranks.wait()
    return KeptPrefix(_stores(encoder, folder), keys, len(data.samples))


def _stores(encoder: Encoder, folder: Path) -> dict[str, Store]:
    size = encoder.preprocessing.image_size_px
    blank = torch.zeros(1, 3, size, size, dtype=torch.uint8, device=next(encoder.parameters()).device)
    stores = {}
    with torch.no_grad():
        for name, said in encoder.frozen(blank).items():
            about = {"version": _VERSION, **encoder.preprocessing.as_arguments(), "weights": _digest(encoder, name)}
            kind = np.float16 if said.is_floating_point() else np.int32
            stores[name] = Store(folder / name / key_of(*about.values()).hex(), tuple(said.shape[1:]), kind, about)
    return stores


def _fill(stores: Mapping[str, Store], encoder: Encoder, data: "PairData", keys: dict[int, bytes]) -> None:
    first = {key: row for row, key in reversed(keys.items())}
    lacking = np.any([store.places(list(first)) < 0 for store in stores.values()], axis=0).tolist()
    missing = {row: key for (key, row), one in zip(first.items(), lacking, strict=True) if one}
    if not missing:
        return
    named, row_bytes = " and ".join(stores), sum(store.row_bytes for store in stores.values())
    folder = next(iter(stores.values())).folder
    check_free(folder, len(missing) * row_bytes, "choose another cache_dir, or data.cache=none")
    size = size_of(len(missing) * row_bytes)
    print(f"{named} of {len(missing)} images, {size}, are kept in {folder.parent.parent}", file=sys.stderr)
    device = next(encoder.parameters()).device
    waiting: dict[str, list[np.ndarray]] = {name: [] for name in stores}
    waiting_keys: list[bytes] = []

    def write() -> None:
        for name, store in stores.items():
            # One of them may be there of an earlier run, whose other word was another.
            new = np.flatnonzero(store.places(waiting_keys) < 0)
            store.add([waiting_keys[i] for i in new], np.stack(waiting[name])[new])
            waiting[name].clear()
        waiting_keys.clear()

    bar = tqdm(total=len(missing), desc=named, unit=" images", disable=not sys.stderr.isatty())
    with bar, torch.no_grad():
        for batch in data.batches_of(list(missing)):
            for name, said in encoder.frozen(batch.inputs["images"].to(device)).items():
                waiting[name] += list(said.cpu().numpy().astype(stores[name].dtype))
            waiting_keys += [missing[row] for row in batch.rows.tolist()]
            bar.update(len(batch.rows))
            if len(waiting_keys) * row_bytes > _STORED_AT_ONCE_BYTES:
                write()
        if waiting_keys:
            write()


def _digest(encoder: Encoder, name: str) -> str:
    """Of all that a word of the prefix is made of."""
    config, tensors = encoder.prefix_state(name)
    digest = hashlib.blake2b(json.dumps(config, sort_keys=True).encode(), digest_size=16)
    for key, value in sorted(tensors.items()):
        digest.update(f"{key}\0".encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
