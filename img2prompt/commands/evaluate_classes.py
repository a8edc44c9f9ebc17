"""`evaluate classes=DIR`: zero-shot classification of a folder of classes by the names of its folders."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from img2prompt.classification import class_embeddings, mean_per_class, ranked, texts_of
from img2prompt.commands.answers import Answer, answers_of, asked
from img2prompt.commands.evaluation_report import write_skipped
from img2prompt.data.listing import ImageFile, list_images, printable
from img2prompt.evaluation import score
from img2prompt.files import as_cell, write_json, write_table, write_text
from img2prompt.predictors.predictor import items_of

_AT = 5


def evaluate_classes(
    predictors: list[Any],
    classes: str,
    templates: list[str],
    out: str,
    text_model: str | None,
    device: str,
    batch_size: int,
    precision: str,
    threads: int,
    cache_dir: str | None,
) -> None:
    """Scores the predictors, prints the table and writes it to `out`. ValueError says what is wrong."""
    questions = asked(predictors, out, text_model, device, batch_size, precision, threads, cache_dir)
    names, files, labels, left_out = _labelled(Path(classes))
    texts = texts_of([_spoken(name) for name in names], templates)
    embeddings = class_embeddings(questions.embeddings(texts), len(templates))
    _tell_equal(names, embeddings)
    rows, answers = answers_of(questions, items_of(files), embeddings.shape[1])
    own = torch.tensor([names.index(labels[row]) for row in rows])
    ids = [files[row].id for row in rows]
    ranks = {one.name: ranked(one.embeddings, embeddings, own) for one in answers}
    found = _scores(ranks, answers, own, names)
    most = int(torch.bincount(own).max()) / len(own)
    floors = {"the most frequent class": most, "chance": 1 / len(names)}
    lines = _lines(found, floors, len(ids), len(names), templates)
    goal = Path(out)
    goal.mkdir(parents=True, exist_ok=True)
    report = {"images": len(ids), "classes": len(names), "templates": list(templates), "target": questions.model.name}
    write_json(goal / "classification.json", report | {"predictors": found, "floors": floors})
    by_whom = [(one.name, *bad) for one in answers for bad in one.skipped]
    write_skipped(goal / "classification.skipped.csv", [*(("", *one) for one in left_out), *by_whom])
    write_table(goal / "classification.csv", _table(ids, own, names, ranks))
    write_text(goal / "classification.md", "\n".join(lines) + "\n")
    print("\n".join(lines))
    print(f"classified {len(ids)} images: {goal / 'classification.json'}")


def _labelled(folder: Path) -> tuple[list[str], list[ImageFile], list[str], list[tuple[str, str]]]:
    """The classes, the images below their folders, which class each is of, and what is left out, and why."""
    if not folder.is_dir():
        raise ValueError(f"classes={folder}: no such folder; it holds a folder of images for each class")
    places: dict[Path, str] = {}
    for one in sorted(folder.iterdir()):
        if one.is_dir() and not one.name.startswith("."):
            other = places.setdefault(one.resolve(), one.name)
            if other != one.name:
                raise ValueError(f"classes={folder}: {other} and {one.name} are the same folder")
    listing = list_images(folder)
    inside = [(file, file.path.relative_to(folder).parts) for file in listing.files]
    found = [(file, parts[0]) for file, parts in inside if len(parts) > 1]
    if len(places) < 2 or not found:
        raise ValueError(
            f"classes={folder}: expected a folder of images for each class, at least two; found {len(places)} folders "
            f"with {len(found)} images"
        )
    strays = [(printable(file.path), "in no folder of a class") for file, parts in inside if len(parts) < 2]
    left_out = [*listing.skipped, *strays]
    if left_out:
        print(f"{len(left_out)} images are left out (first: {left_out[0][0]}: {left_out[0][1]})", file=sys.stderr)
    names = [printable(Path(name)) for name in places.values()]
    labels = [printable(Path(name)) for _, name in found]
    empty = sorted(set(names) - set(labels))
    if empty:
        print(
            f"{len(empty)} classes have no image (first: {empty[0]}); they can be chosen all the same", file=sys.stderr
        )
    return names, [file for file, _ in found], labels, left_out


def _tell_equal(names: Sequence[str], embeddings: Float[Tensor, "C D"]) -> None:
    """ValueError for classes that are embedded equally: a text encoder may know neither capitals nor emoji."""
    alike = (embeddings @ embeddings.T).fill_diagonal_(-1)
    place = int(alike.argmax())
    if float(alike.flatten()[place]) > 1 - 1e-6:
        first, second = sorted((names[place // len(names)], names[place % len(names)]))
        raise ValueError(f"classes: {first} and {second} are embedded equally; nothing could tell them apart")


def _spoken(name: str) -> str:
    return " ".join(name.replace("_", " ").replace("-", " ").split()) or name


def _scores(
    ranks: Mapping[str, tuple[Int[Tensor, " N"], Int[Tensor, " N"]]],
    answers: Sequence[Answer],
    own: Int[Tensor, " N"],
    names: Sequence[str],
) -> list[dict[str, Any]]:
    images = np.arange(len(own))
    first = (ranks[answers[0].name][1] == 0).float()
    found: list[dict[str, Any]] = []
    for one in answers:
        others = ranks[one.name][1]
        correct = (others == 0).float()
        per_class = mean_per_class(correct, own, len(names))
        row: dict[str, Any] = {"predictor": one.name, "top 1": asdict(score(correct, images))}
        if len(names) > _AT:
            row[f"top {_AT}"] = float((others < _AT).float().mean())
        row["mean per class"] = float(per_class.nanmean())
        if one is not answers[0]:
            row["against_the_first"] = asdict(score(correct - first, images))
        row["per class"] = {
            name: value for name, value in zip(names, per_class.tolist(), strict=True) if value == value
        }
        found.append(row | {"seconds_per_image": one.seconds_per_image, "peak_memory_gib": one.memory_gib})
    return found


def _lines(
    found: Sequence[Mapping[str, Any]], floors: Mapping[str, float], images: int, classes: int, templates: Sequence[str]
) -> list[str]:
    lines = [f"{images} images of {classes} classes, read as {', '.join(templates)}", ""]
    lines += [
        f"| predictor | top 1 | 95 % interval | against the first | top {_AT} | mean per class |",
        "|" + "---|" * 6,
    ]
    for row in found:
        one, other = row["top 1"], row.get("against_the_first")
        against = "" if other is None else f"{other['mean']:+.4f} ({other['low']:+.4f} to {other['high']:+.4f})"
        five = f"{row[f'top {_AT}']:.4f}" if classes > _AT else ""
        lines.append(
            f"| {row['predictor']} | {one['mean']:.4f} | {one['low']:.4f} to {one['high']:.4f} | {against} | "
            f"{five} | {row['mean per class']:.4f} |"
        )
    return lines + [f"| *{name}* | {value:.4f} | | | | |" for name, value in floors.items()]


def _table(
    ids: Sequence[str],
    own: Int[Tensor, " N"],
    names: Sequence[str],
    ranks: Mapping[str, tuple[Int[Tensor, " N"], Int[Tensor, " N"]]],
) -> list[dict[str, Any]]:
    return [
        {
            "id": as_cell(one),
            "class": as_cell(names[int(own[row])]),
            **{f"guess {name}": as_cell(names[int(guess[row])]) for name, (guess, _) in ranks.items()},
            **{f"nearer classes {name}": int(others[row]) for name, (_, others) in ranks.items()},
        }
        for row, one in enumerate(ids)
    ]
