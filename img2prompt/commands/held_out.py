"""The validation images of a run that has been, exactly those that it was scored on, to score other weights on them."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from img2prompt.commands import assembly
from img2prompt.commands.conf import conf_folder
from img2prompt.commands.earlier import trained_in
from img2prompt.commands.settings import compose
from img2prompt.commands.table import embedder, progress
from img2prompt.data.pixels import Pixels
from img2prompt.data.split import trained_on
from img2prompt.data.targets import locate
from img2prompt.encoders.encoder import Preprocessing, Uninitialised
from img2prompt.files import read_table
from img2prompt.hub import describe
from img2prompt.training.datamodule import PairData
from img2prompt.training.pairs import Rows
from img2prompt.training.resume import check_same_values, continued


@dataclass
class HeldOut:
    """What `training.scoring.score` needs, and on how many images of the run it scores."""

    data: PairData
    device: str
    bf16: bool
    of: int  # images that validate in the run, of which `data` has those that no other run trained on


def held_out(
    folder: Path,
    runs: Sequence[Path],
    want: Preprocessing,
    device: str,
    batch_size: int | None,
    cache_dir: str | None,
) -> HeldOut:
    """The validation images of the run in `folder` that none of `runs` trained on, nor on anything close to them.

    A run with the same rows on the same sides has trained on none. ValueError when the data of `folder` have changed
    since, or when the other runs leave less than half of the images.
    """
    settings = _settings(folder, device, cache_dir)
    data = settings["data"]
    device, precision = assembly.device_and_precision(settings["trainer"])
    text_model = locate(settings["target"]["model"], settings["target"]["revision"])
    if text_model.download is not None:
        print(f"downloading {describe(text_model.download)}", file=sys.stderr)
    embed = embedder(settings, text_model, device)
    rows, _ = assembly.rows(settings, assembly.table(settings), embed, device, folder)
    batch_size = batch_size or data["batch_size"]
    with Uninitialised():
        first = assembly.encoder(settings["encoder"]).preprocessing
    pairs = _as_recorded(folder, rows, first, data["threads"], batch_size)
    chosen = pairs.val_rows
    others = [run for run in runs if _sides(run) != _sides(folder)]
    if others:
        earlier = trained_in(others, data, embed)
        samples, targets = [rows.samples[row] for row in chosen], rows.targets[chosen]
        chosen = chosen[~trained_on(samples, targets, data["group_threshold"], earlier)]
        if 2 * len(chosen) < len(pairs.val_rows):
            raise ValueError(
                f"{folder}: the other runs ({', '.join(str(run) for run in others)}) trained on all but {len(chosen)} "
                f"of its {len(pairs.val_rows)} validation images, or close to them; merge runs of one split (the same "
                "data and data.seed), or give run= another of them"
            )
    pixels = Pixels(
        [rows.samples[row] for row in chosen],
        want.image_size_px,
        want.interpolation,
        want.resize_mode,
        data["cache_gib"],
        data["threads"],
    )
    with progress(len(chosen), "pixels", "images") as bar:
        pixels.fill(bar.update)
    if pixels.bad:
        row, reason = min(pixels.bad.items())
        raise ValueError(f"{folder}: its images have changed: {pixels.samples[row].id}: {reason}; put them back")
    scored = PairData(
        pixels.samples,
        rows.targets[chosen],
        pixels,
        np.arange(0),
        np.arange(len(chosen)),
        pairs.draws,
        batch_size,
        1,
        pairs.seed,
    )
    return HeldOut(scored, device, precision.startswith("bf16"), len(pairs.val_rows))


def _settings(folder: Path, device: str, cache_dir: str | None) -> dict[str, Any]:
    """The settings of the run; where it is scored now, and where embeddings are kept, may differ."""
    settings = compose("train", [])
    settings["trainer"]["accelerator"] = device
    settings["cache_dir"] = cache_dir
    given = ["trainer.accelerator", *(["cache_dir"] if cache_dir is not None else [])]
    saved = continued(folder, settings, given, conf_folder())
    # However many trained it, one scores.
    saved["trainer"]["devices"] = 1
    return saved


def _as_recorded(folder: Path, rows: Rows, want: Preprocessing, threads: int, batch_size: int) -> PairData:
    """The pairs of the run without the images that were bad then; nothing is decoded but what shows that they are the
    same images.
    """
    pixels = Pixels(rows.samples, want.image_size_px, want.interpolation, want.resize_mode, -1.0, threads)
    bad = {one["id"]: one["reason"] for one in read_table(folder / "bad_images.csv")}
    pixels.bad = {row: bad[sample.id] for row, sample in enumerate(rows.samples) if sample.id in bad}
    good = np.array([row not in pixels.bad for row in range(len(rows.samples))])
    train, val = np.flatnonzero(~rows.validates & good), np.flatnonzero(rows.validates & good)
    pairs = PairData(rows.samples, rows.targets, pixels, train, val, rows.draws(train), batch_size, 1, 0)
    check_same_values(folder, pairs)
    return pairs


def _sides(run: Path) -> dict[str, Any]:
    """What data.json says of the rows of a run and of their sides."""
    try:
        record = json.loads((run / "data.json").read_text())
        return {key: record[key] for key in ("pairs", "validate", "blake2b")}
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{run / 'data.json'}: damaged") from None
