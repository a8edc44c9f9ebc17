"""Pairs that are made: the plan, what it needs, and the work; for `synthesize` and for a run that trains on them."""

import hashlib
import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from hydra.utils import instantiate
from tqdm import tqdm

from img2prompt.cache import cache_folder, check_free, free_bytes, size_of
from img2prompt.commands.conf import conf_folder
from img2prompt.commands.prompt_list import GRAMMAR, prompt_list
from img2prompt.commands.settings import check_values, did_you_mean
from img2prompt.data.lineage import Lineage
from img2prompt.files import write_table
from img2prompt.hub import describe
from img2prompt.predictors.trained import pick_device
from img2prompt.synthesis.contact_sheet import contact_sheet, samples_of
from img2prompt.synthesis.generator import Generator
from img2prompt.synthesis.pairs import Wanted, Worker, worker_of
from img2prompt.synthesis.produce import Work, produce, work_of
from img2prompt.synthesis.store import BYTES_BESIDE, BYTES_PER_PIXEL, Made, PictureStore

_LIBRARIES = ("img2prompt", "torch", "diffusers", "transformers", "pillow")


@dataclass
class Synthesis:
    """What is to be made, with what, and where it goes; nothing is made yet."""

    wanted: Wanted
    lineage: Lineage
    generator: Generator
    store: PictureStore
    worker: Worker
    work: Work
    batch_size: int

    @property
    def shards(self) -> int:
        return -(-len(self.wanted) // self.store.shard_size)

    def lines(self) -> list[str]:
        """The plan for people."""
        prompts = -(-len(self.wanted) // self.wanted.replicas)
        own = f", worker {self.worker.number} of {self.worker.count}" if self.worker.count > 1 else ""
        again = f" ({self.work.again} of them again, in a shard that grows)" if self.work.again else ""
        settings = {key: value for key, value in self.generator.settings.items() if value not in (None, "")}
        needed, free = size_of(_bytes_of(self)), size_of(free_bytes(self.store.folder))
        lines = [
            *self.lineage.lines(),
            f"images    {len(self.wanted)} for {prompts} prompts, in {self.shards} shards{own}: {self.work.there} are "
            f"there, {self.work.count} to make{again}",
            f"generator {', '.join(f'{key} {value}' for key, value in settings.items())}",
            f"out       {self.store.folder}: about {needed} more, {free} free",
        ]
        if self.generator.download is not None and self.work.count:
            lines.append(f"download  {describe(self.generator.download)}")
        return lines


def prepare(settings: Mapping[str, Any]) -> Synthesis:
    """Reads and filters the prompts, and finds out what is missing; ValueError says what is wrong."""
    _check(settings)
    worker = worker_of(settings["shard"], os.environ)
    settings = {**settings, "device": _own_device(settings["device"])}
    node = dict(settings["generator"])
    if node.get("device") == "auto":
        node["device"] = settings["device"]
    elif "device" not in node:
        pick_device(settings["device"])
    generator: Generator = instantiate(node)
    store = PictureStore(
        Path(settings["out"]),
        generator.settings,
        _versions(),
        settings["shard_size"],
        settings["format"],
        generator.saved_px,
        settings["threads"],
    )
    # Other settings need not wait for the prompts.
    wanted = Wanted([], settings["replicas"], settings["seed"], settings["count"])
    store.check(wanted)
    prompts, lineage = prompt_list(settings)
    wanted = replace(wanted, prompts=prompts)
    store.check(wanted)
    if wanted.count is not None and wanted.count > len(wanted):
        print(f"count={wanted.count}: what is left of the prompts makes {len(wanted)} images", file=sys.stderr)
    work = work_of(store, wanted, worker.shards(-(-len(wanted) // store.shard_size)))
    if work.count:
        generator.check()
    return Synthesis(wanted, lineage, generator, store, worker, work, settings["batch_size"])


def carry_out(synthesis: Synthesis) -> None:
    """Makes what is missing, and a contact sheet when all is there."""
    store, work, wanted = synthesis.store, synthesis.work, synthesis.wanted
    check_free(store.folder, _bytes_of(synthesis), "choose another out=, or free some")
    if work.count:
        synthesis.generator.load()
        # By now it knows what it has loaded.
        store.settings.update(synthesis.generator.settings)
        store.claim(wanted)
        write_table(store.folder / "lineage.csv", synthesis.lineage.table())
        with _Progress(work.count) as progress:
            failed = produce(work, synthesis.generator, store, synthesis.batch_size, progress.advance)
        if failed:
            told = "; ".join(repr(pair.prompt) for pair in failed[:3])
            print(f"{len(failed)} images stayed blank and were left out; the manifests name them (first: {told})")
    others = set(range(synthesis.shards)) - set(synthesis.worker.shards(synthesis.shards))
    if work_of(store, wanted, others).count:
        print(f"this worker's part is done; other workers have shards to make in {store.folder}")
        return
    blank, more = store.count_blank(len(wanted))
    if blank == len(wanted):
        raise ValueError(
            f"{store.folder}: every image came out blank: the model is damaged, or needs another generator.dtype; "
            "remove the folder before the next try"
        )
    sheet = store.folder / "contact_sheet.jpg"
    samples = samples_of(store.folder, store.image_format) if work.count or not sheet.exists() else []
    if samples:
        contact_sheet(samples, sheet)
    told = f"all {len(wanted)} images are" if not blank else f"{len(wanted) - blank} of {len(wanted)} images are"
    told += f" in {store.folder}"
    told += f", and {more} more of an earlier time" if more else ""
    told += f"; {blank} stayed blank, the manifests name them" if blank else ""
    print(f"{told}{f'; look at {sheet}' if sheet.exists() else ''}")


def made_for(settings: Mapping[str, Any]) -> Made | None:
    """The pairs that data.synthesis asks for, made now where they are not there yet; None for none of them.

    What the run's own pairs are left out for, they are left out for too.
    """
    if not settings["data"]["synthesis"]["count"]:
        return None
    try:
        synthesis = prepare(_synthesis_of(settings))
        print("\n".join(f"synthesis: {line}" for line in synthesis.lines()), flush=True)
        if settings["dry_run"]:
            print("synthesis: a dry run makes none of them, so they are in none of the numbers below")
            return None
        carry_out(synthesis)
    except ValueError as error:
        is_option = str(error).startswith("generator.")
        hint = " (generator.KEY is data.synthesis.options.KEY here)" if is_option else ""
        if not is_option and "=" in str(error):
            hint = " (keys of synthesize are data.synthesis.KEY here)"
        raise ValueError(f"data.synthesis: {error}{hint}") from None
    return Made(synthesis.store, len(synthesis.wanted))


def _synthesis_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of `synthesize` that those of a run amount to."""
    data, given = settings["data"], settings["data"]["synthesis"]
    usual = yaml.safe_load((conf_folder() / "synthesize.yaml").read_text())
    del usual["defaults"]
    # Training is one process's, however many train.
    usual |= {"shard": "0/1", "device": "cpu" if settings["trainer"]["accelerator"] == "cpu" else "auto"}
    own = {key: value for key, value in given.items() if key not in ("generator", "options", "weight")}
    for key in own.keys() - usual.keys():
        raise ValueError(f"{key}: no such key{did_you_mean(key, list(usual))}")
    if not given["weight"] > 0:
        raise ValueError(f"weight must be above 0, got {given['weight']}")
    filters = {key: data[key] for key in ("clean", "max_clip_tokens", "min_words", "max_words", "languages")}
    shared = {key: settings[key] for key in ("target", "cache_dir")}
    made = {**usual, **filters, **shared, **own, "generator": _generator(given["generator"], given["options"] or {})}
    if made["out"] is None:
        # More of them are in the same place, and how they are made does not matter.
        free = ("count", "out", "cache_dir", "batch_size", "threads", "device", "shard")
        parts = {key: value for key, value in made.items() if key not in free}
        for key in ("prompts", "modifiers", "keep_away", "words"):
            # Another file of this name is another set of prompts.
            names = made[key] if isinstance(made[key], list) else [made[key]]
            parts[key] = [_contents(Path(str(name))) or name for name in names]
        digest = hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=8).hexdigest()
        made["out"] = str(cache_folder(settings["cache_dir"]) / "synthesis" / digest)
    return made


def _contents(path: Path) -> str | None:
    """Of a file, or of what is read of a folder: word lists, or the validation prompts of a run."""
    files = [path] if path.is_file() else [*sorted(path.glob("*.txt")), path / "validation.parquet"]
    found = [file.read_bytes() for file in files if file.is_file()]
    return hashlib.blake2b(b"\0".join(found)).hexdigest() if found else None


def _generator(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a generator by its name, with some of its keys set."""
    folder = conf_folder() / "generator"
    choices = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in choices:
        close = did_you_mean(str(name), choices)
        raise ValueError(f"generator={name}: no such choice{close}; choices: {', '.join(choices)}")
    choice = yaml.safe_load((folder / f"{name}.yaml").read_text())
    for key in options:
        if key not in choice or key.startswith("_"):
            raise ValueError(f"options: {key} is no key of {name}{did_you_mean(key, list(choice))}")
    check_values(options, choice, "options.")
    return {**choice, **options}


class _Progress:
    """A bar with images/s and ETA; without a terminal a line after the first batch, and then one a minute."""

    def __init__(self, total: int) -> None:
        self._bar = tqdm(total=total, desc="images", unit=" images", disable=not sys.stderr.isatty())
        self._total, self._done, self._first = total, 0, 0
        self._began = self._told = time.monotonic()

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def advance(self, count: int) -> None:
        self._bar.update(count)
        self._done += count
        now = time.monotonic()
        # The first batch is slower than all others: loading, and compiling.
        seconds = max(now - self._began, 1e-9)
        rate = (self._done - self._first) / seconds
        if not self._first or (self._bar.disable and now - self._told > 60) or self._done == self._total:
            at_most = "at most " if not self._first and self._done < self._total else ""
            left = (self._total - self._done) / rate
            line = f"{self._done} of {self._total} images, {rate:.2f} images/s, ETA {at_most}{left:.0f} s"
            tqdm.write(line, sys.stderr)
            self._told = now
        if not self._first:
            self._first, self._began = self._done, now


def _check(settings: Mapping[str, Any]) -> None:
    for key in ("replicas", "batch_size", "shard_size", "threads"):
        if settings[key] < 1:
            raise ValueError(f"{key} must be at least 1, got {settings[key]}")
    if not settings["out"] or "://" in settings["out"]:
        raise ValueError(f"out={settings['out']}: must be a folder of this machine")
    count = settings["count"]
    if count is not None and count < 1:
        raise ValueError(f"count must be at least 1, or null, got {count}")
    if settings["prompts"] == GRAMMAR and count is None:
        raise ValueError("prompts=grammar needs count=N: it can make millions")
    if settings["prompts"] != GRAMMAR and settings["words"] is not None:
        raise ValueError(f"words={settings['words']}: only prompts=grammar reads word lists")
    some = settings["modifiers_per_prompt"]
    if len(some) != 2 or not all(type(one) is int for one in some):
        raise ValueError(f"modifiers_per_prompt={some}: must be [least, most]")
    thresholds = {"keep_away_threshold": [settings["keep_away_threshold"]]}
    thresholds["duplicate_threshold"] = [one for one in [settings["duplicate_threshold"]] if one is not None]
    thresholds["report_thresholds"] = settings["report_thresholds"]
    for key, values in thresholds.items():
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
                raise ValueError(f"{key} must be above 0 and at most 1, got {value}")


def _own_device(device: str) -> str:
    """Of several processes on a machine, each has a GPU of its own."""
    local = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID"))
    if device not in ("auto", "cuda") or local is None or not torch.cuda.is_available():
        return device
    return f"cuda:{int(local) % torch.cuda.device_count()}"


def _bytes_of(synthesis: Synthesis) -> int:
    store, (height, width) = synthesis.store, synthesis.generator.size_px
    scale = min(1.0, (store.saved_px or height) / min(height, width))
    pixels = height * width * scale**2
    return int(synthesis.work.count * (pixels * BYTES_PER_PIXEL[store.image_format] + BYTES_BESIDE))


def _versions() -> dict[str, str]:
    found = {}
    for library in _LIBRARIES:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return found
