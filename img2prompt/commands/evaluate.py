"""`evaluate`: predictors on data whose prompts are known, beside floors and beside each other."""

import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from img2prompt.bank import Bank
from img2prompt.commands.answers import answers_of, asked
from img2prompt.commands.arguments import typed
from img2prompt.commands.evaluation_report import write_evaluation
from img2prompt.commands.settings import chosen_config, compose
from img2prompt.commands.sources import find
from img2prompt.data.cleaning import cleaned
from img2prompt.data.corruptions import CORRUPTIONS
from img2prompt.data.prompt_files import read_bank_prompts
from img2prompt.data.sample import Sample
from img2prompt.predictors.predictor import Item
from img2prompt.predictors.retrieval import target_rows
from img2prompt.training.pairs import select
from img2prompt.training.run_folder import versions


def main(arguments: list[str]) -> None:
    chosen = chosen_config("evaluate", arguments)
    settings = compose(chosen, arguments)
    if chosen == "evaluate_classes":
        from img2prompt.commands.evaluate_classes import evaluate_classes

        evaluate_classes(**settings)
        return
    if chosen != "evaluate":
        from img2prompt.commands.evaluate_variations import evaluate_variations

        evaluate_variations(**settings)
        return
    made_by = {"overrides": [*map(typed, arguments)], "settings": settings, "versions": versions()}
    evaluate(**settings, made_by=made_by)


def evaluate(
    predictors: list[Any],
    out: str,
    data: dict[str, Any],
    text_model: str | None,
    device: str,
    batch_size: int,
    precision: str,
    threads: int,
    cache_dir: str | None,
    robustness: bool = False,
    bank: str | list[str] | None = None,
    made_by: Mapping[str, Any] | None = None,
) -> None:
    """Scores the predictors on the data, prints the tables and writes them to `out`, with what they are `made_by`: the
    arguments, settings and versions, where these are known. ValueError says what is wrong.
    """
    questions = asked(predictors, out, text_model, device, batch_size, precision, threads, cache_dir)
    texts = None if bank is None else read_bank_prompts(bank, "bank")
    samples, left_out = _samples(data)
    prompts = [sample.prompt for sample in samples]
    targets = questions.embeddings(prompts)
    items = [Item(one.id, one.id, partial(one.source.read, one.location)) for one in samples]
    rows, answers = answers_of(questions, items, targets.shape[1], CORRUPTIONS if robustness else (), prompts)
    if texts is not None:
        floor = Bank(texts, target_rows(texts, questions.setting()))
        for one in answers:
            one.snapped, one.snapped_to = floor.rows_of(one.embeddings), "the bank"
    kept = [samples[row] for row in rows]
    skipped = [("", *one) for one in left_out] + [(one.name, *bad) for one in answers for bad in one.skipped]
    write_evaluation(Path(out), kept, targets[rows], answers, skipped, questions.model.name, made_by)


def _samples(data: dict[str, Any]) -> tuple[list[Sample], list[tuple[str, str]]]:
    """What is evaluated, and what is left out, with the reasons."""
    if data.get("root") is None and "sources" not in data and data["name"] != "demo":
        raise ValueError("data.root must be given: the images and their prompts")
    found = find(data)
    samples, empty = cleaned(found.samples) if data["clean"] else (found.samples, [])
    left_out = [*found.skipped, *empty]
    samples = select(samples, left_out, data["count"], least=0)
    if left_out:
        print(f"{len(left_out)} are left out (first: {left_out[0][0]}: {left_out[0][1]})", file=sys.stderr)
    if not samples:
        raise ValueError(f"data.root={data.get('root')}: no image with a prompt there")
    return samples, left_out
