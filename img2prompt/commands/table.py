"""From the data settings to the table of rows: found, cleaned, filtered, embedded, without duplicates, split."""

import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from img2prompt.cache import cache_folder
from img2prompt.commands.sources import find, item_source
from img2prompt.data.cleaning import cleaned
from img2prompt.data.duplicates import largest_cosine, near, survivors
from img2prompt.data.filters import Dropped, in_languages, of_length, too_long_for_clip, well_formed
from img2prompt.data.lineage import Lineage
from img2prompt.data.mixture import named
from img2prompt.data.prompts import prompt_key, prompt_numbers
from img2prompt.data.sample import Found, Sample, Source, image_key
from img2prompt.data.split import Earlier, Sides, split
from img2prompt.data.targets import TextModel, embeddings_of
from img2prompt.training.pairs import Rows, select

_REASONS = {
    "near validation": "of a validation image, or close to a validation prompt",
    "validated before": "close to a prompt that an earlier run trained on",
    "kept away": "close to a prompt of keep_away",
}


@dataclass
class Table:
    """What the sources hold, before any prompt is embedded."""

    weights: dict[str, float]  # of the sources of a mixture, by name
    count: int  # pairs that the sources hold
    samples: list[Sample]
    left_out: list[tuple[str, str]]  # (id or path, reason)
    held: dict[str, int] = field(default_factory=dict)  # pairs that each source holds, by its name
    validation: list[Sample] = field(default_factory=list)  # of a source of its own; else the samples are split
    lineage: Lineage = field(default_factory=Lineage)

    @property
    def used(self) -> int:
        return len(self.samples) + len(self.validation)

    def by_source(self) -> dict[str, tuple[int, int]]:
        """For each source of several: how many pairs it holds, and how many are left."""
        used = Counter(sample.source.name for sample in self.samples + self.validation)
        return {name: (held, used[name]) for name, held in self.held.items()} if len(self.held) > 1 else {}


def find_table(data: dict[str, Any], made: Source | None = None) -> Table:
    """Asks the sources, `made` among them, and leaves out what can be judged by the text of a prompt; ValueError when
    nothing is left.
    """
    table = by_text(data, find(data, made))
    table.samples = select(table.samples, table.left_out, data["count"])
    if len(table.samples) < table.lineage.rows[-1]["pairs_out"]:
        table.lineage.add("data.count", table.samples)
    if isinstance(data["val"], dict):
        source, name = item_source(data["val"], data, "data.val")
        given = source.find()
        samples, broken = well_formed(given.samples)
        samples, empty = cleaned(samples) if data["clean"] else (samples, [])
        skipped = [(f"val-{name}/{one}", reason) for one, reason in given.skipped + broken + empty]
        table.validation = select(named(samples, f"val-{name}"), skipped, None, least=1)
        table.left_out += skipped
        table.held[f"val-{name}"] = len(given.samples) + len(given.skipped)
        table.count += table.held[f"val-{name}"]
    return table


def by_text(data: dict[str, Any], found: Found) -> Table:
    """What is left of the samples by the text of their prompts alone."""
    table = Table(found.weights, len(found.samples) + len(found.skipped), found.samples, found.skipped)
    table.held = _held(found.samples, found.skipped)
    table.lineage.add("found", found.samples, found.skipped)
    whole, broken = well_formed(found.samples)
    if broken:
        table.samples = whole
        table.left_out += broken
        table.lineage.add("Unicode", whole, broken)
    steps: list[tuple[str, Callable[[list[Sample]], tuple[list[Sample], Dropped]]]] = []
    if data["clean"]:
        steps.append(("cleaned", cleaned))
    if data["max_clip_tokens"] is not None:
        steps.append(("CLIP tokens", lambda samples: too_long_for_clip(samples, data["max_clip_tokens"])))
    if data["min_words"] is not None or data["max_words"] is not None:
        steps.append(("words", lambda samples: of_length(samples, data["min_words"], data["max_words"])))
    if data["languages"] is not None:
        steps.append(("languages", lambda samples: in_languages(samples, data["languages"])))
    for name, step in steps:
        table.samples, dropped = step(table.samples)
        changed = sum(sample.raw_prompt != "" for sample in table.samples) if step is cleaned else 0
        table.lineage.add(name, table.samples, dropped, changed)
        table.left_out += dropped
    return table


def _held(samples: list[Sample], skipped: list[tuple[str, str]]) -> dict[str, int]:
    names = Counter(sample.source.name for sample in samples)
    if len(names) > 1:
        # In a mixture, ids begin with the name of their source.
        names.update(name for one, _ in skipped for name in list(names) if one.startswith(f"{name}/"))
    return dict(names)


def settle(
    data: dict[str, Any],
    table: Table,
    embed: Callable[[list[str]], np.ndarray],
    device: str,
    earlier: Earlier | None,
) -> Rows:
    """Embeds the prompts, drops near duplicates, and splits; ValueError when that leaves a side empty."""
    samples = table.samples
    targets = torch.from_numpy(embed([sample.prompt for sample in samples])).to(device)
    samples, targets = without_duplicates(data, table, samples, targets)
    threshold = data["group_threshold"]
    if not table.validation:
        sides = split(samples, targets, data["val"], data["seed"], threshold, data["max_group_fraction"], earlier)
    else:
        held = torch.from_numpy(embed([sample.prompt for sample in table.validation])).to(device)
        validation = table.validation
        if earlier is not None:
            trained = [prompt_key(prompt) for prompt in earlier.train_prompts]
            validation, held = apart(
                table, "validated before", validation, held, trained, earlier.train_embeddings.to(device), threshold
            )
        keys = [prompt_key(sample.prompt) for sample in validation] + [image_key(sample) for sample in validation]
        samples, targets = apart(table, "near validation", samples, targets, keys, held, threshold)
        samples, targets = [*samples, *validation], torch.cat([targets, held])
        sides = Sides(np.arange(len(samples)) >= len(samples) - len(validation))
    train, val = (torch.from_numpy(np.flatnonzero(mask)).to(device) for mask in (~sides.validates, sides.validates))
    cosine, i, j = largest_cosine(targets[val], targets[train])
    leak = {
        "largest_train_val_cosine": cosine,
        "val_prompt": samples[int(val[i])].prompt,
        "train_prompt": samples[int(train[j])].prompt,
    }
    return Rows(samples, targets.cpu(), table.weights, sides, table.lineage, leak)


def without_duplicates(
    data: dict[str, Any], table: Table, samples: list[Sample], targets: torch.Tensor, numbers: np.ndarray | None = None
) -> tuple[list[Sample], torch.Tensor]:
    """Drops prompts that say nearly what another says, with their images; counts what other thresholds would leave.

    `numbers` says which prompts are one, from 0: of several the lowest is kept.
    """
    threshold, asked = data["duplicate_threshold"], data["report_thresholds"]
    thresholds = [*asked, *([] if threshold is None else [threshold])]
    if not thresholds:
        return samples, targets
    numbers = prompt_numbers([sample.prompt for sample in samples]) if numbers is None else numbers
    _, first = np.unique(numbers, return_index=True)
    kept = survivors(targets[torch.from_numpy(first).to(targets.device)], thresholds)
    table.lineage.survivors = {value: int(one.sum()) for value, one in zip(asked, kept, strict=False)}
    if threshold is None:
        return samples, targets
    rows = np.flatnonzero(kept[-1][numbers])
    reason = f"near duplicates (cosine of {threshold} and more)"
    left = [samples[row] for row in rows]
    gone = np.setdiff1d(np.arange(len(samples)), rows)
    dropped = [(samples[row].id, reason) for row in gone]
    table.lineage.add("near duplicates", left, dropped)
    table.left_out += dropped
    return left, targets[torch.from_numpy(rows).to(targets.device)]


def apart(
    table: Table,
    step: str,
    samples: list[Sample],
    targets: torch.Tensor,
    keys: list[str],
    others: torch.Tensor,
    threshold: float | None,
) -> tuple[list[Sample], torch.Tensor]:
    """Drops samples whose prompt or image is one of `keys`, or whose prompt is close to one of `others`.

    ValueError when none is left.
    """
    close = near(targets, others, threshold) if threshold is not None else np.zeros(len(samples), dtype=bool)
    equal = set(keys)
    gone = [
        bool(touched) or prompt_key(sample.prompt) in equal or image_key(sample) in equal
        for sample, touched in zip(samples, close, strict=True)
    ]
    left = [sample for sample, is_gone in zip(samples, gone, strict=True) if not is_gone]
    reason = _REASONS[step]
    dropped = [(sample.id, reason) for sample, is_gone in zip(samples, gone, strict=True) if is_gone]
    table.lineage.add_apart(step, samples, left, dropped)
    if not left:
        raise ValueError(f"nothing is left, all {len(samples)} pairs are {reason}; raise the threshold")
    return left, targets[~torch.tensor(gone, device=targets.device)]


def embedder(settings: Mapping[str, Any], text_model: TextModel, device: str) -> Callable[[list[str]], np.ndarray]:
    """What makes embeddings [N, D] of N prompts, or finds them where they are kept."""
    cache, precision = cache_folder(settings["cache_dir"]), settings["target"]["precision"]

    def embed(prompts: list[str]) -> np.ndarray:
        with progress(len(set(prompts)), "prompts", "prompts") as bar:
            return embeddings_of(prompts, text_model, precision, device, cache, bar.update)

    return embed


def progress(total: int, what: str, unit: str) -> Any:
    return tqdm(total=total, desc=what, unit=f" {unit}", disable=not sys.stderr.isatty())
