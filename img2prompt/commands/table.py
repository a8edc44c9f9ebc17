"""From the data settings to the table of rows: found, cleaned, filtered, embedded, without duplicates, split."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from img2prompt.bank import read_bank
from img2prompt.commands.sources import item_source, source_of
from img2prompt.data.cleaning import cleaned
from img2prompt.data.duplicates import largest_cosine, near, survivors
from img2prompt.data.filters import Dropped, in_languages, of_length, too_long_for_clip
from img2prompt.data.lineage import Lineage
from img2prompt.data.mixture import named
from img2prompt.data.prompts import prompt_key, prompt_numbers
from img2prompt.data.sample import Sample
from img2prompt.data.split import Earlier, Sides, split
from img2prompt.predictors.trained import bank_of, checkpoint_of
from img2prompt.training.pairs import Rows, select


@dataclass
class Table:
    """What the sources hold, before any prompt is embedded."""

    weights: dict[str, float]  # of the sources of a mixture, by name
    count: int  # pairs that the sources hold
    samples: list[Sample]
    left_out: list[tuple[str, str]]  # (id or path, reason)
    validation: list[Sample] = field(default_factory=list)  # of a source of its own; else the samples are split
    lineage: Lineage = field(default_factory=Lineage)

    @property
    def used(self) -> int:
        return len(self.samples) + len(self.validation)


def find_table(data: dict[str, Any]) -> Table:
    """Asks the sources and leaves out what can be judged by the text of a prompt; ValueError when nothing is left."""
    found = source_of(data).find()
    table = Table(found.weights, len(found.samples) + len(found.skipped), found.samples, found.skipped)
    table.lineage.add("found", found.samples, found.skipped)
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
    table.samples = select(table.samples, table.left_out, data["count"])
    if len(table.samples) < table.lineage.rows[-1]["pairs_out"]:
        table.lineage.add("data.count", table.samples)
    if isinstance(data["val"], dict):
        source, name = item_source(data["val"], data, "data.val")
        given = source.find()
        samples, empty = cleaned(given.samples) if data["clean"] else (given.samples, [])
        skipped = [(f"val-{name}/{one}", reason) for one, reason in given.skipped + empty]
        table.validation = select(named(samples, f"val-{name}"), skipped, None)
        table.left_out += skipped
        table.count += len(given.samples) + len(given.skipped)
    return table


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
    samples, targets = _without_duplicates(data, table, samples, targets)
    threshold = data["group_threshold"]
    if not table.validation:
        sides = split(samples, targets, data["val"], data["seed"], threshold, data["max_group_fraction"], earlier)
    else:
        held = torch.from_numpy(embed([sample.prompt for sample in table.validation])).to(device)
        samples, targets = _apart(table, samples, targets, held, threshold)
        samples, targets = [*samples, *table.validation], torch.cat([targets, held])
        sides = Sides(np.arange(len(samples)) >= len(samples) - len(table.validation))
    train, val = (torch.from_numpy(np.flatnonzero(mask)).to(device) for mask in (~sides.validates, sides.validates))
    cosine, i, j = largest_cosine(targets[val], targets[train])
    leak = {
        "largest_train_val_cosine": cosine,
        "val_prompt": samples[int(val[i])].prompt,
        "train_prompt": samples[int(train[j])].prompt,
    }
    return Rows(samples, targets.cpu(), table.weights, sides, table.lineage, leak)


def earlier_run(
    data: dict[str, Any], init_from: str | None, embed: Callable[[list[str]], np.ndarray]
) -> Earlier | None:
    """What the run that this one begins from, or whose split it keeps, has trained on; None when there is none."""
    given = data["keep_split"] or init_from
    if given is None:
        return None
    bank = bank_of(checkpoint_of(Path(given)))
    if not bank.is_file():
        if data["keep_split"]:
            raise ValueError(f"data.keep_split={given}: no run folder, it has no bank.parquet")
        print(f"init_from={given}: no bank.parquet, so what it trained on may validate here", file=sys.stderr)
        return None
    train = read_bank(bank).prompts
    held = bank.with_name("validation.parquet")
    return Earlier(train, torch.from_numpy(embed(train)), read_bank(held).prompts if held.is_file() else [])


def _without_duplicates(
    data: dict[str, Any], table: Table, samples: list[Sample], targets: torch.Tensor
) -> tuple[list[Sample], torch.Tensor]:
    """Drops prompts that say nearly what another says, with their images; counts what other thresholds would leave."""
    threshold, asked = data["duplicate_threshold"], data["report_thresholds"]
    for value in [*asked, *([] if threshold is None else [threshold])]:
        if not isinstance(value, int | float) or not 0 < value <= 1:
            raise ValueError(
                f"data.duplicate_threshold and report_thresholds must be above 0 and at most 1, got {value}"
            )
    thresholds = [*asked, *([] if threshold is None else [threshold])]
    if not thresholds:
        return samples, targets
    numbers = prompt_numbers([sample.prompt for sample in samples])
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


def _apart(
    table: Table, samples: list[Sample], targets: torch.Tensor, held: torch.Tensor, threshold: float | None
) -> tuple[list[Sample], torch.Tensor]:
    """Drops training rows whose prompt a validation prompt of another source equals or comes close to."""
    equal = {prompt_key(sample.prompt) for sample in table.validation}
    touched = near(targets, held, threshold if threshold is not None else 1.0 - 1e-4)
    rows = [row for row, sample in enumerate(samples) if prompt_key(sample.prompt) not in equal and not touched[row]]
    left = [samples[row] for row in rows]
    gone = sorted(set(range(len(samples))) - set(rows))
    table.lineage.add("near validation", left, [(samples[row].id, "close to a validation prompt") for row in gone])
    if not left:
        raise ValueError("data.val: every training prompt is close to a validation prompt; raise data.group_threshold")
    return left, targets[torch.tensor(rows, device=targets.device)]


def progress(total: int, what: str, unit: str) -> Any:
    return tqdm(total=total, desc=what, unit=f" {unit}", disable=not sys.stderr.isatty())
