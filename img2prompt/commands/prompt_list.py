"""From settings to the prompts to make images of: read or composed, cleaned, filtered, each once."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from img2prompt.bank import read_bank
from img2prompt.commands.table import Table, apart, by_text, embedder, without_duplicates
from img2prompt.data.cleaning import clean
from img2prompt.data.filters import well_formed
from img2prompt.data.lineage import Lineage
from img2prompt.data.prompt_files import PromptSource, read_prompt_files
from img2prompt.data.prompts import prompt_key
from img2prompt.data.sample import Sample
from img2prompt.data.targets import locate
from img2prompt.hub import describe
from img2prompt.synthesis.grammar import SLOTS, grammar, mixed, most_of, phrases

GRAMMAR = "grammar"
# Where filters leave little of what grammar says: at once, and for each prompt that is wanted.
_MORE_AT_ONCE, _MOST_DRAWN = 20, 1000


def prompt_list(settings: Mapping[str, Any]) -> tuple[list[str], Lineage]:
    """The prompts, and how they came to be; ValueError when none is left."""
    given, count = settings["prompts"], settings["count"]
    if given != GRAMMAR:
        paths = [Path(str(one)) for one in (given if isinstance(given, list) else [given])]
        table = _filtered(settings, read_prompt_files(paths, settings["prompt_column"]))
        used = table.samples if count is None else table.samples[: -(-count // settings["replicas"])]
    else:
        wanted = drawn = -(-count // settings["replicas"])
        words = Path(settings["words"]) if settings["words"] is not None else None
        table = _filtered(settings, list(grammar(drawn, settings["seed"], words)))
        most = most_of({slot: phrases(slot, words) for slot in SLOTS})
        while len(table.samples) < wanted and drawn < min(most, _MOST_DRAWN * wanted):
            # The same ones, and more behind them.
            more = 1.05 * wanted / len(table.samples) if table.samples else _MORE_AT_ONCE
            drawn = min(most, int(drawn * min(_MORE_AT_ONCE, more)) + 1)
            table = _filtered(settings, list(grammar(drawn, settings["seed"], words, needed=wanted)))
        table.samples = used = table.samples[:wanted]
    if len(used) < table.lineage.rows[-1]["pairs_out"]:
        table.lineage.add("count", used)
    if not table.samples:
        told = f" (first: {table.left_out[0][1]})" if table.left_out else ""
        raise ValueError(f"prompts={given}: of {table.count} prompts none is left{told}")
    return [sample.prompt for sample in table.samples], table.lineage


def _filtered(settings: Mapping[str, Any], texts: Sequence[str]) -> Table:
    """What is left of the prompts, with modifiers behind them if there are to be any."""
    if settings["modifiers"] is not None:
        # Behind clean words: where nothing is left of them, there is no caption.
        captions = [clean(text) for text in texts] if settings["clean"] else texts
        own = None if settings["modifiers"] == "builtin" else Path(settings["modifiers"])
        lines = phrases("modifiers") if own is None else read_prompt_files([own], key="modifiers")
        styles = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
        least, most = settings["modifiers_per_prompt"]
        texts = list(mixed(captions, styles, least, most, settings["seed"]))
    table = by_text(dict(settings), PromptSource(texts).find())
    if settings["clean"]:
        # What was escaped may be a weight now, and training, which cleans what it finds, is to find nothing.
        table.samples = [replace(sample, prompt=_clean_for_good(sample.prompt)) for sample in table.samples]
    _distinct(table)
    by_meaning = settings["duplicate_threshold"], settings["keep_away"], settings["report_thresholds"] or None
    if table.samples and any(one is not None for one in by_meaning):
        _by_meaning(settings, table)
    return table


def _clean_for_good(prompt: str) -> str:
    while (again := clean(prompt)) not in ("", prompt):
        prompt = again
    return prompt


def _distinct(table: Table) -> None:
    """Keeps the first of equal prompts."""
    first: dict[str, Sample] = {}
    for sample in table.samples:
        first.setdefault(prompt_key(sample.prompt), sample)
    kept = {sample.id for sample in first.values()}
    dropped = [(sample.id, "comes twice") for sample in table.samples if sample.id not in kept]
    table.samples = list(first.values())
    table.lineage.add("distinct", table.samples, dropped)
    table.left_out += dropped


def _by_meaning(settings: Mapping[str, Any], table: Table) -> None:
    """Leaves out near duplicates, and what is close to the prompts to keep away from."""
    device = settings["device"] if settings["device"].startswith("cuda") else "cpu"
    if settings["device"] == "auto" and torch.cuda.is_available():
        device = "cuda"
    text_model = locate(settings["target"]["model"], settings["target"]["revision"])
    if text_model.download is not None:
        print(f"downloading {describe(text_model.download)}", file=sys.stderr)
    embed = embedder(dict(settings), text_model, device)

    def embedded(prompts: list[str]) -> torch.Tensor:
        return torch.from_numpy(np.asarray(embed(prompts))).to(device)

    samples, targets = table.samples, embedded([sample.prompt for sample in table.samples])
    # Of two the earlier is kept, so that more prompts at the end drop none that is made.
    order = np.arange(len(samples))
    samples, targets = without_duplicates(dict(settings), table, samples, targets, order)
    if settings["keep_away"] is not None:
        others = _kept_away(Path(settings["keep_away"]))
        keys = [prompt_key(prompt) for prompt in others]
        samples, _ = apart(
            table, "kept away", samples, targets, keys, embedded(others), settings["keep_away_threshold"]
        )
    table.samples = samples


def _kept_away(path: Path) -> list[str]:
    """The validation prompts of a run folder, or those of a file."""
    if not path.is_dir():
        found = PromptSource(read_prompt_files([path], key="keep_away")).find().samples
        return [sample.prompt for sample in well_formed(found)[0]]
    bank = path / "validation.parquet"
    if not bank.is_file():
        raise ValueError(f"keep_away={path}: no run folder, it has no {bank.name}")
    return read_bank(bank).prompts
