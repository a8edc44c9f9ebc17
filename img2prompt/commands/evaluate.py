"""`evaluate`: predictors on data whose prompts are known, beside floors and beside each other."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

from img2prompt.bank import Bank
from img2prompt.commands.answers import Questions, answers_of, asked
from img2prompt.commands.arguments import typed
from img2prompt.commands.evaluation_report import write_evaluation
from img2prompt.commands.settings import chosen_config, compose
from img2prompt.commands.sources import find
from img2prompt.data.cleaning import cleaned
from img2prompt.data.corruptions import CORRUPTIONS
from img2prompt.data.prompt_files import read_bank_prompts
from img2prompt.data.sample import Sample
from img2prompt.predictors.predictor import Item
from img2prompt.training.pairs import select


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
    evaluate(**settings, overrides=[*map(typed, arguments)])


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
    overrides: list[str] | None = None,
) -> None:
    """Scores the predictors on the data, prints the tables and writes them to `out`, with the `overrides` that gave the
    settings, where they are known. ValueError says what is wrong.
    """
    questions = asked(predictors, out, text_model, device, batch_size, precision, threads, cache_dir)
    floor = None if bank is None else _embedded_bank(bank, questions)
    samples = _samples(data)
    targets = questions.embeddings([sample.prompt for sample in samples])
    items = [Item(one.id, one.id, partial(one.source.read, one.location)) for one in samples]
    rows, answers = answers_of(questions, items, targets.shape[1], CORRUPTIONS if robustness else ())
    if floor is not None:
        for one in answers:
            one.snapped, one.snapped_to = floor.rows_of(one.embeddings), "the bank"
    kept = [samples[row] for row in rows]
    write_evaluation(Path(out), kept, targets[rows], answers, questions.model.name, overrides)


def _embedded_bank(given: str | list[str], questions: Questions) -> Bank:
    prompts = read_bank_prompts(given, "bank")
    return Bank(prompts, questions.embeddings(prompts))


def _samples(data: dict[str, Any]) -> list[Sample]:
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
    return samples
