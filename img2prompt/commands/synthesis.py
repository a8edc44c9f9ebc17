"""Pairs that are made: the plan, what it needs, and the work; for `synthesize` and for a run that trains on them."""

import hashlib
import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from hydra.utils import instantiate
from tqdm import tqdm

from img2prompt.cache import cache_folder, check_free
from img2prompt.commands.conf import conf_folder
from img2prompt.commands.prompt_list import GRAMMAR, prompt_list
from img2prompt.commands.settings import did_you_mean
from img2prompt.commands.table import Table
from img2prompt.files import write_table
from img2prompt.hub import describe
from img2prompt.synthesis.contact_sheet import contact_sheet, samples_of
from img2prompt.synthesis.generator import Generator
from img2prompt.synthesis.pairs import Pair, Worker, pairs_of, worker_of
from img2prompt.synthesis.produce import Work, produce, work_of
from img2prompt.synthesis.store import BYTES_PER_PIXEL, Made, PictureStore

_LIBRARIES = ("img2prompt", "torch", "diffusers", "transformers", "pillow")


@dataclass
class Synthesis:
    """What is to be made, with what, and where it goes; nothing is made yet."""

    pairs: list[Pair]
    table: Table
    generator: Generator
    store: PictureStore
    worker: Worker
    work: Work
    batch_size: int

    @property
    def shards(self) -> int:
        return -(-len(self.pairs) // self.store.shard_size)

    def lines(self) -> list[str]:
        """The plan for people."""
        needed = _bytes_of(self) / 2**30
        prompts = len({pair.prompt for pair in self.pairs})
        own = f", worker {self.worker.number} of {self.worker.count}" if self.worker.count > 1 else ""
        lines = [
            *self.table.lineage.lines(),
            f"images    {len(self.pairs)} of {prompts} prompts in {self.shards} shards{own}: {self.work.there} are "
            f"there, {self.work.count} to make",
            f"generator {', '.join(f'{key} {value}' for key, value in self.generator.settings.items())}",
            f"out       {self.store.folder}: about {needed:.2f} GiB more",
        ]
        if self.generator.download is not None and self.work.count:
            lines.append(f"download  {describe(self.generator.download)}")
        return lines


def prepare(settings: Mapping[str, Any]) -> Synthesis:
    """Reads and filters the prompts, and finds out what is missing; ValueError says what is wrong."""
    _check(settings)
    worker = worker_of(settings["shard"], os.environ)
    node = dict(settings["generator"])
    if node.get("device") == "auto":
        node["device"] = _own_device(settings["device"])
    generator: Generator = instantiate(node)
    store = PictureStore(
        Path(settings["out"]),
        {**generator.settings, "base_seed": settings["seed"]},
        _versions(),
        settings["shard_size"],
        settings["format"],
        generator.saved_px,
        settings["threads"],
    )
    store.check_settings()
    table = prompt_list(settings)
    pairs = pairs_of([sample.prompt for sample in table.samples], settings["replicas"], settings["seed"])
    count = settings["count"]
    if count is not None and count > len(pairs):
        print(f"count={count}: the prompts make {len(pairs)} images and no more", file=sys.stderr)
    pairs = pairs[:count]
    work = work_of(store, pairs, worker)
    return Synthesis(pairs, table, generator, store, worker, work, settings["batch_size"])


def carry_out(synthesis: Synthesis) -> None:
    """Makes what is missing, and a contact sheet when all is there."""
    store, work = synthesis.store, synthesis.work
    check_free(store.folder, _bytes_of(synthesis), "choose another out=, or free some")
    if work.count:
        synthesis.generator.load()
    store.claim()
    if work.count:
        write_table(store.folder / "lineage.csv", synthesis.table.lineage.table())
        with _Progress(work.count) as progress:
            failed = produce(work, synthesis.generator, store, synthesis.batch_size, progress.advance)
        if failed:
            told = "; ".join(repr(pair.prompt) for pair in failed[:3])
            print(f"{len(failed)} images stayed blank and were left out; the manifests name them (first: {told})")
    if all(store.has(shard) for shard in range(synthesis.shards)):
        sheet = store.folder / "contact_sheet.jpg"
        samples = samples_of(store.folder, store.image_format) if work.count or not sheet.exists() else []
        if samples:
            contact_sheet(samples, sheet)
        print(f"all {len(synthesis.pairs)} images are in {store.folder}; look at {sheet}")
    else:
        print(f"this worker's part is done; other workers have shards to make in {store.folder}")


def made_for(settings: Mapping[str, Any]) -> Made | None:
    """The pairs that data.synthesis asks for, made now where they are not there yet; None for none of them.

    What the run's own pairs are left out for, they are left out for too.
    """
    data, wanted = settings["data"], settings["data"]["synthesis"]
    if not wanted["count"]:
        return None
    if not wanted["weight"] > 0:
        raise ValueError(f"data.synthesis.weight must be above 0, got {wanted['weight']}")
    usual = yaml.safe_load((conf_folder() / "synthesize.yaml").read_text())
    del usual["defaults"]
    own = {key: value for key, value in wanted.items() if key not in ("weight", "options")}
    filters = {key: data[key] for key in ("clean", "max_clip_tokens", "min_words", "max_words", "languages")}
    shared = {key: settings[key] for key in ("target", "cache_dir")}
    given = {**usual, **filters, **shared, **own, "generator": _generator(wanted["generator"], wanted["options"] or {})}
    if given["out"] is None:
        # More of them are in the same place, and how fast they are made does not matter.
        free = ("count", "out", "cache_dir", "batch_size", "threads")
        made_of = {key: value for key, value in given.items() if key not in free}
        key = hashlib.blake2b(json.dumps(made_of, sort_keys=True).encode(), digest_size=8).hexdigest()
        given["out"] = str(cache_folder(settings["cache_dir"]) / "synthesis" / key)
    synthesis = prepare(given)
    print("\n".join(f"synthesis: {line}" for line in synthesis.lines()), flush=True)
    if settings["dry_run"]:
        print("synthesis: a dry run makes none of them, so they are in none of the numbers below")
        return None
    carry_out(synthesis)
    return Made(synthesis.store.folder, len(synthesis.pairs))


def _generator(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a generator by its name, with some of its keys set."""
    folder = conf_folder() / "generator"
    choices = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in choices:
        close = did_you_mean(str(name), choices)
        raise ValueError(f"data.synthesis.generator={name}: no such choice{close}; choices: {', '.join(choices)}")
    choice = yaml.safe_load((folder / f"{name}.yaml").read_text())
    for key in options:
        if key not in choice or key.startswith("_"):
            raise ValueError(f"data.synthesis.options: {key} is no key of {name}{did_you_mean(key, list(choice))}")
    return {**choice, **options}


class _Progress:
    """A bar with images/s and ETA; without a terminal a line after the first batch, and then one a minute."""

    def __init__(self, total: int) -> None:
        self._bar = tqdm(total=total, desc="images", unit=" images", disable=not sys.stderr.isatty())
        self._total, self._done = total, 0
        self._began = self._told = time.monotonic()

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def advance(self, count: int) -> None:
        self._bar.update(count)
        is_first, self._done = not self._done, self._done + count
        now = time.monotonic()
        if is_first or (self._bar.disable and now - self._told > 60) or self._done == self._total:
            rate = self._done / max(now - self._began, 1e-9)
            left = (self._total - self._done) / rate
            tqdm.write(f"{self._done} of {self._total} images, {rate:.2f} images/s, ETA {left:.0f} s", sys.stderr)
            self._told = now


def _check(settings: Mapping[str, Any]) -> None:
    for key in ("replicas", "batch_size", "shard_size", "threads"):
        if settings[key] < 1:
            raise ValueError(f"{key} must be at least 1, got {settings[key]}")
    count = settings["count"]
    if count is not None and count < 1:
        raise ValueError(f"count must be at least 1, or null, got {count}")
    if settings["prompts"] == GRAMMAR and count is None:
        raise ValueError("prompts=grammar needs count=N: it can make millions")
    some = settings["modifiers_per_prompt"]
    if len(some) != 2 or not all(isinstance(one, int) for one in some):
        raise ValueError(f"modifiers_per_prompt={some}: must be [least, most]")
    if not 0 < settings["keep_away_threshold"] <= 1:
        raise ValueError(f"keep_away_threshold must be above 0 and at most 1, got {settings['keep_away_threshold']}")


def _own_device(device: str) -> str:
    """Of several processes on a machine, each has a GPU of its own."""
    local = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID"))
    if device not in ("auto", "cuda") or local is None or not torch.cuda.is_available():
        return device
    return f"cuda:{int(local) % torch.cuda.device_count()}"


def _bytes_of(synthesis: Synthesis) -> int:
    store, (height, width) = synthesis.store, synthesis.generator.size_px
    scale = min(1.0, (store.saved_px or height) / min(height, width))
    return int(synthesis.work.count * height * width * scale**2 * BYTES_PER_PIXEL[store.image_format])


def _versions() -> dict[str, str]:
    found = {}
    for library in _LIBRARIES:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return found
