"""The report of an evaluation, made from the files of its folder alone."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from img2prompt.data.sample import Sample
from img2prompt.files import from_cell, read_table, write_text
from img2prompt.report import charts
from img2prompt.report.gallery import Card, drawn, gallery
from img2prompt.report.page import MOST_ROWS, Html, Section, element, joined, page, table
from img2prompt.report.reliability import reliability
from img2prompt.report.run import configuration, number, prompts_section
from img2prompt.report.thumbnails import FILE, Thumbnail, read_thumbnails, write_thumbnails
from img2prompt.report.words import Prompts

_NO_PICTURE = "no picture of it was kept"
# Pictures of so many predictors; the tables have all.
_MOST_PREDICTORS = 8


def write_pictures(folder: Path, samples: Sequence[Sample]) -> None:
    """thumbnails.parquet: small pictures of the images that the report shows."""
    by_id = {sample.id: sample for sample in samples}
    extremes = [
        one["id"] for row in _evaluation(folder)["predictors"][:_MOST_PREDICTORS] for one in row["best"] + row["worst"]
    ]
    random = [sample.id for sample in drawn(samples, lambda sample: sample.id)]
    write_thumbnails(folder / FILE, [by_id[one] for one in dict.fromkeys([*extremes, *random])])


def write_evaluation_report(folder: Path, out: Path | None = None) -> Path:
    """Writes the report of the evaluation in `folder` to `out`, else beside its files; ValueError when it is none."""
    goal = out or folder / "report.html"
    write_text(goal, evaluation_report(folder))
    return goal


def evaluation_report(folder: Path) -> str:
    found = _evaluation(folder)
    rows = found["predictors"]
    try:
        told = f"{folder.resolve().name}: {found['images']:,} images, target {found['target']}"
        sections = _sections(found, rows, folder)
    except (KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"{folder / 'evaluation.json'}: damaged ({type(error).__name__}: {error})") from None
    return page("Evaluation", told, sections)


def _sections(found: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], folder: Path) -> list[Section]:
    images = [{name: from_cell(text) for name, text in row.items()} for row in read_table(folder / "evaluation.csv")]
    if len(images) != found["images"] or not all(f"cosine {row['predictor']}" in one for row in rows for one in images):
        raise ValueError(
            f"{folder / 'evaluation.csv'}: not the table of these {found['images']} images and {len(rows)} predictors"
        )
    thumbnails, skipped = read_thumbnails(folder / FILE), read_table(folder / "skipped.csv")
    return [
        Section(
            "Predictors",
            _predictors(rows, found["floors"]),
            "Intervals are drawn by prompt, because images share them.",
        ),
        Section("Cosines", _cosines(rows, images)),
        Section("By length and source", joined([_by(rows, "by_length", "Length"), _by(rows, "by_source", "Source")])),
        Section("Robustness", _robustness(rows), "How the score changes when something happens to the images."),
        Section("Confidence", _confidence(rows), "What predictors expect of themselves, and what is found."),
        Section("Images", _images(rows, images, thumbnails)),
        Section("Similarity", _similarity(folder)),
        Section("Prompts", prompts_section({"prompts": Prompts().add(row["prompt"] for row in images)})),
        Section("Left out", table(skipped[:MOST_ROWS], f"{len(skipped):,} images or more: skipped.csv has all")),
        Section("Configuration", configuration("evaluate", _settings(found))),
    ]


def _predictors(rows: Sequence[Mapping[str, Any]], floors: Mapping[str, Any]) -> Html:
    drawn_rows = [(row["predictor"], row["mean"], row["low"], row["high"], False) for row in rows]
    drawn_rows += [(name, one["mean"], one["low"], one["high"], True) for name, one in floors.items()]
    told = []
    for row in rows:
        against = row.get("against_the_first")
        told.append(
            {
                "predictor": row["predictor"],
                "mean cosine": row["mean"],
                "95 % interval": _interval(row),
                "against the first": f"{against['mean']:+.4f} ({_interval(against, '+.4f')})" if against else "",
                "s an image": _three(row["seconds_per_image"]),
                "peak GiB": _three(row["peak_memory_gib"]),
            }
        )
    beside = [
        {"floor": name, "mean cosine": one["mean"], "95 % interval": _interval(one)} for name, one in floors.items()
    ]
    recalls = [{"predictor": row["predictor"], **row["recall"]} for row in rows]
    chart = charts.intervals(drawn_rows, "Predictors and floors")
    return joined(
        [
            chart,
            table(told, "Predictors"),
            table(beside, "Floors: constants, another prompt, and the prompt nearest to each prediction"),
            table(recalls, "Recall: how often the own prompt, or an own image, is among the nearest"),
        ]
    )


def _cosines(rows: Sequence[Mapping[str, Any]], images: Sequence[Mapping[str, str]]) -> Html:
    values = {row["predictor"]: [number(one.get(f"cosine {row['predictor']}")) for one in images] for row in rows}
    known = [value for some in values.values() for value in some if value == value]
    span = (min(known), max(known)) if known else None
    drawings = [
        charts.histogram(some, name, {"mean": row["mean"]}, span)
        for (name, some), row in zip(values.items(), rows, strict=True)
    ]
    return element("div", *drawings, class_="charts") if known else Html("")


def _by(rows: Sequence[Mapping[str, Any]], key: str, title: str) -> Html:
    names = list(rows[0][key])
    if len(names) < 2:
        return Html("")
    told = [
        {
            title: name,
            "images": rows[0][key][name]["images"],
            **{row["predictor"]: row[key][name]["mean"] for row in rows},
        }
        for name in names
    ]
    return table(told, f"Mean cosine by {title.lower()}")


def _robustness(rows: Sequence[Mapping[str, Any]]) -> Html:
    hardened = [row for row in rows if row.get("robustness")]
    if not hardened:
        return Html("")
    told = [
        {"what happens": name, **{row["predictor"]: _change(row["robustness"][name]["change"]) for row in hardened}}
        for name in hardened[0]["robustness"]
    ]
    return table(told, "Paired changes of the mean cosine with their 95 % intervals")


def _confidence(rows: Sequence[Mapping[str, Any]]) -> Html:
    known = [(row["predictor"], row.get("confidence")) for row in rows]
    drawings = [drawing for name, said in known if isinstance(said, dict) and (drawing := reliability(said, name))]
    return element("div", *drawings, class_="charts") if drawings else Html("")


def _images(
    rows: Sequence[Mapping[str, Any]], images: Sequence[Mapping[str, str]], thumbnails: Mapping[str, Thumbnail]
) -> Html:
    prompts = {one["id"]: one["prompt"] for one in images}
    closest = {
        row["predictor"]: {one["id"]: one.get(f"closest {row['predictor']}", "") for one in images} for row in rows
    }
    parts = []
    for row in rows[:_MOST_PREDICTORS]:
        for kind in ("best", "worst"):
            cards = [
                Card(one["id"], one["prompt"], one["cosine"], _told(prompts, closest[row["predictor"]], one["id"]))
                for one in row[kind]
            ]
            title = f"{kind.capitalize()} of {row['predictor']}"
            parts += [element("h3", title), gallery(cards, thumbnails, _NO_PICTURE)]
    some = drawn(images, lambda one: one["id"])
    random = [
        Card(
            one["id"],
            prompts[one["id"]],
            None,
            {row["predictor"]: f"{number(one.get('cosine ' + row['predictor'])):.4f}" for row in rows},
        )
        for one in some
    ]
    return joined([*parts, element("h3", "At random"), gallery(random, thumbnails, _NO_PICTURE)])


def _told(prompts: Mapping[str, str], closest: Mapping[str, str], image: str) -> dict[str, str]:
    """The prompt that the prediction is closest to."""
    other = closest.get(image, "")
    if other not in prompts:
        return {}
    return {"closest prompt": "its own" if prompts[other] == prompts.get(image) else prompts[other]}


def _similarity(folder: Path) -> Html:
    rows = read_table(folder / "similarity.csv")
    by_predictor: dict[str, list[Mapping[str, str]]] = {}
    for row in rows:
        by_predictor.setdefault(row["predictor"], []).append(row)
    drawings = []
    for name, some in list(by_predictor.items())[:_MOST_PREDICTORS]:
        names = [from_cell(row["prediction"]) for row in some]
        drawings.append(charts.heat([[number(row.get(f"to {one}")) for one in names] for row in some], from_cell(name)))
    return element("div", *drawings, class_="charts") if drawings else Html("")


def _evaluation(folder: Path) -> dict[str, Any]:
    path = folder / "evaluation.json"
    if not path.is_file():
        raise ValueError(f"evaluation={folder}: not the folder of an evaluation, it has no evaluation.json")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict) or not found.get("predictors"):
        raise ValueError(f"{path}: damaged, it has no predictors")
    return found


def _settings(found: Mapping[str, Any]) -> dict[str, Any]:
    settings = found.get("settings")
    told = dict(settings) if isinstance(settings, dict) else {}
    return {**told, "versions": found.get("versions"), "overrides": found.get("overrides")}


def _interval(one: Mapping[str, Any], digits: str = ".4f") -> str:
    return f"{one['low']:{digits}} to {one['high']:{digits}}"


def _change(one: Mapping[str, Any]) -> str:
    return f"{one['mean']:+.4f} ({_interval(one, '+.4f')})"


def _three(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
