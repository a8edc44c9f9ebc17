"""What `evaluate` writes and prints: tables of predictors, floors, lengths and sources; best and worst images."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from img2prompt.commands.answers import Answer
from img2prompt.data.prompts import prompt_numbers
from img2prompt.data.sample import Sample
from img2prompt.evaluation import Score, by_label, floors, in_order_of_length, length_of, nearest_other, recall, score
from img2prompt.files import as_cell, write_json, write_table, write_text
from img2prompt.metrics import cosines
from img2prompt.refine.confidence import reliability
from img2prompt.report.evaluation import write_evaluation_report, write_pictures
from img2prompt.search import nearest

_SHOWN = 5
_MOST_IN_MATRIX = 64


def write_evaluation(
    goal: Path,
    samples: Sequence[Sample],
    targets: Float[Tensor, "N D"],
    answers: Sequence[Answer],
    skipped: Sequence[tuple[str, str, str]],
    model: str,
    made_by: Mapping[str, Any] | None,
) -> None:
    """`skipped` is what was left out (see `write_skipped`); `made_by` joins the JSON."""
    prompts = [sample.prompt for sample in samples]
    groups = prompt_numbers(prompts)
    values = {one.name: cosines(one.embeddings, targets) for one in answers}
    first = answers[0].name
    found: list[dict[str, Any]] = []
    for one in answers:
        row: dict[str, Any] = {"predictor": one.name, **asdict(score(values[one.name], groups))}
        if one.name != first:
            row["against_the_first"] = asdict(score(values[one.name] - values[first], groups))
        row["prompts_of_its_bank"] = one.seen
        row |= {"recall": recall(one.embeddings, targets, groups)}
        row |= {"seconds_per_image": one.seconds_per_image, "peak_memory_gib": one.memory_gib}
        row["by_length"] = _asdicts(in_order_of_length(by_label(values[one.name], [*map(length_of, prompts)], groups)))
        row["by_source"] = _asdicts(by_label(values[one.name], [one.source.name for one in samples], groups))
        row["robustness"] = _robustness(values[one.name], one, targets, groups)
        if one.confidence is not None:
            row["confidence"] = asdict(reliability(one.confidence.double().numpy(), values[one.name].double().numpy()))
        row |= _extremes(values[one.name], samples)
        found.append(row)
    beside = dict(floors(targets, groups))
    for one in answers:
        if one.constant is not None:
            beside[f"{one.name}: its constant mean"] = cosines(one.constant.expand_as(targets), targets)
        snapped, bank = one.snapped, one.snapped_to
        if snapped is None:
            snapped, bank = nearest_other(one.embeddings, targets, groups), "the other images"
        beside[f"{one.name}: the nearest prompt of {bank}"] = cosines(snapped, targets)
    floor_scores = {name: asdict(score(some, groups)) for name, some in beside.items() if some.isfinite().all()}
    lines = _lines(found, floor_scores, len(samples), int(groups.max()) + 1, model)
    goal.mkdir(parents=True, exist_ok=True)
    report = {"images": len(samples), "target": model, "predictors": found, "floors": floor_scores}
    write_json(goal / "evaluation.json", report | dict(made_by or {}))
    write_skipped(goal / "skipped.csv", skipped)
    write_table(goal / "evaluation.csv", _table(samples, values, answers, targets))
    write_text(goal / "evaluation.md", "\n".join(lines) + "\n")
    matrix = goal / "similarity.csv"
    if len(samples) <= _MOST_IN_MATRIX:
        write_table(matrix, _matrix(samples, answers, targets))
    else:
        # Of an earlier evaluation of fewer.
        matrix.unlink(missing_ok=True)
    print("\n".join(lines))
    write_pictures(goal, samples)
    print(f"report: {write_evaluation_report(goal)}")
    print(f"evaluated on {len(samples)} images: {goal / 'evaluation.json'}")


def write_skipped(file: Path, skipped: Sequence[tuple[str, str, str]]) -> None:
    """What was left out, each by which predictor (none: of the data), which image, and why."""
    if not skipped:
        # Of an earlier evaluation.
        file.unlink(missing_ok=True)
        return
    names = ("predictor", "image", "reason")
    write_table(file, [dict(zip(names, map(as_cell, one), strict=True)) for one in skipped])


def _lines(
    found: Sequence[Mapping[str, Any]], beside: Mapping[str, Mapping[str, Any]], images: int, prompts: int, model: str
) -> list[str]:
    lines = [f"{images} images of {prompts} prompts, target {model}", ""]
    lines += [
        "| predictor | mean cosine | 95 % interval | against the first | R@1 | R@5 | R@10 | s an image | peak GiB |"
    ]
    lines += ["|" + "---|" * 9]
    for row in found:
        other = row.get("against_the_first")
        against = "" if other is None else f"{other['mean']:+.4f} ({other['low']:+.4f} to {other['high']:+.4f})"
        recalls = " | ".join(f"{row['recall'][f'image to text R@{k}']:.3f}" for k in (1, 5, 10))
        cost = [row["seconds_per_image"], row["peak_memory_gib"]]
        told = " | ".join("" if one is None else f"{one:.3f}" for one in cost)
        interval = f"{row['low']:.4f} to {row['high']:.4f}"
        lines.append(f"| {row['predictor']} | {row['mean']:.4f} | {interval} | {against} | {recalls} | {told} |")
    for name, one in beside.items():
        lines.append(f"| *{name}* | {one['mean']:.4f} | {one['low']:.4f} to {one['high']:.4f} | | | | | | |")
    for title in ("by_length", "by_source"):
        names = list(found[0][title])
        if len(names) > 1:
            lines += ["", f"| {title.replace('_', ' ')} | images | {' | '.join(row['predictor'] for row in found)} |"]
            lines += ["|" + "---|" * (2 + len(found))]
            for name in names:
                means = " | ".join(f"{row[title][name]['mean']:.4f}" for row in found)
                lines.append(f"| {name} | {found[0][title][name]['images']} | {means} |")
    lines += _confidence_lines(found)
    hardened = [row for row in found if row["robustness"]]
    if hardened:
        lines += ["", f"| robustness | {' | '.join(row['predictor'] for row in hardened)} |"]
        lines += ["|" + "---|" * (1 + len(hardened))]
        for name in hardened[0]["robustness"]:
            changes = [row["robustness"][name]["change"] for row in hardened]
            told = " | ".join(f"{one['mean']:+.4f} ({one['low']:+.4f} to {one['high']:+.4f})" for one in changes)
            lines.append(f"| {name} | {told} |")
    return lines


def _confidence_lines(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """How far confidences can be relied upon; least and most sure are the first and the last of ten parts, or fewer."""
    sure = [row for row in found if "confidence" in row]
    if not sure:
        return []
    lines = ["", "| confidence | Spearman | calibration error | least sure: expected, true | most sure |"]
    lines += ["|" + "---|" * 5]
    for row in sure:
        told, bins = row["confidence"], row["confidence"]["bins"]
        rank = "" if told["spearman"] is None else f"{told['spearman']:.3f}"
        error = "" if told["calibration_error"] is None else f"{told['calibration_error']:.4f}"
        ends = " | ".join(f"{one['confidence']:.3f}, {one['cosine']:.3f}" for one in (bins[0], bins[-1]))
        lines.append(f"| {row['predictor']} | {rank} | {error} | {ends} |")
    return lines


def _robustness(
    values: Float[Tensor, " N"], answer: Answer, targets: Float[Tensor, "N D"], groups: Int[np.ndarray, " N"]
) -> dict[str, dict[str, Any]]:
    """For each corruption the score, and its paired change."""
    found = {}
    for name, embeddings in answer.corrupted.items():
        changed = cosines(embeddings, targets)
        found[name] = {**asdict(score(changed, groups)), "change": asdict(score(changed - values, groups))}
    return found


def _extremes(values: Float[Tensor, " N"], samples: Sequence[Sample]) -> dict[str, list[dict[str, Any]]]:
    order = values.argsort(descending=True, stable=True).tolist()

    def told(rows: Sequence[int]) -> list[dict[str, Any]]:
        return [{"id": samples[row].id, "cosine": float(values[row]), "prompt": samples[row].prompt} for row in rows]

    return {"best": told(order[:_SHOWN]), "worst": told(order[::-1][:_SHOWN])}


def _table(
    samples: Sequence[Sample], values: Mapping[str, Tensor], answers: Sequence[Answer], targets: Float[Tensor, "N D"]
) -> list[dict[str, Any]]:
    numbers = {one.name: _closest(one.embeddings, targets) for one in answers}
    sure = {one.name: one.confidence for one in answers if one.confidence is not None}
    return [
        {
            "id": as_cell(sample.id),
            "source": as_cell(sample.source.name),
            **{f"cosine {name}": f"{float(some[row]):.6f}" for name, some in values.items()},
            **{f"confidence {name}": f"{float(some[row]):.6f}" for name, some in sure.items()},
            **{f"closest {name}": as_cell(samples[int(some[row])].id) for name, some in numbers.items()},
            "prompt": as_cell(sample.prompt),
        }
        for row, sample in enumerate(samples)
    ]


def _closest(embeddings: Float[Tensor, "N D"], targets: Float[Tensor, "N D"]) -> Int[Tensor, " N"]:
    """Of each prediction, the image whose prompt it is closest to."""
    said, true = (functional.normalize(one.float(), dim=-1) for one in (embeddings, targets))
    return nearest(said, true, 1)[1][:, 0]


def _matrix(
    samples: Sequence[Sample], answers: Sequence[Answer], targets: Float[Tensor, "N D"]
) -> list[dict[str, Any]]:
    """The cosine of each prediction with each reference."""
    rows = []
    for one in answers:
        for sample, embedding in zip(samples, one.embeddings, strict=True):
            with_each = cosines(embedding.expand_as(targets), targets).tolist()
            named = {f"to {other.id}": f"{value:.4f}" for other, value in zip(samples, with_each, strict=True)}
            rows.append({"predictor": as_cell(one.name), "prediction": as_cell(sample.id), **named})
    return rows


def _asdicts(scores: Mapping[str, Score]) -> dict[str, dict[str, Any]]:
    return {name: asdict(one) for name, one in scores.items()}
