"""The report of a run, made from the files of its folder alone."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from img2prompt.data.sample import Sample
from img2prompt.files import from_cell, read_table, write_text
from img2prompt.regressor import read_header
from img2prompt.report import charts
from img2prompt.report.gallery import Card, ScoreRow, drawn, extremes, gallery
from img2prompt.report.page import Html, Section, code, element, facts, folded, joined, page, phrase, table
from img2prompt.report.reliability import reliability
from img2prompt.report.reproduction import reproduction
from img2prompt.report.thumbnails import FILE, Thumbnail, read_thumbnails, write_thumbnails
from img2prompt.report.words import Prompts, cloud

_NO_PICTURE = "no picture of it was kept"
_MOST_CURVES = 12
_TITLES = {"lr": "Learning rate", "val/cosine": "Validation cosine"}
_KINDS = {"best": "Best", "worst": "Worst", "random": "At random"}


def write_pictures(folder: Path, train: Sequence[Sample], validation: Sequence[Sample]) -> None:
    """thumbnails.parquet: small pictures of the pairs that the report shows; `validation` are those of scores.csv."""
    samples = {sample.id: sample for sample in validation}
    shown = extremes(_scores(folder))
    wanted = dict.fromkeys(one.id for some in shown.values() for one in some)
    examples = drawn(train, lambda sample: sample.id)
    write_thumbnails(folder / FILE, [*(samples[one] for one in wanted), *examples])


def write_run_report(folder: Path, out: Path | None = None) -> Path:
    """Writes the report of the run in `folder` to `out`, else beside its files; ValueError when it is no run."""
    goal = out or folder / "report.html"
    write_text(goal, run_report(folder))
    return goal


def run_report(folder: Path) -> str:
    try:
        return _run_report(folder)
    except (KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"{folder}: damaged ({type(error).__name__}: {str(error)[:120]})") from None


def _run_report(folder: Path) -> str:
    config = _config(folder)
    summary = _json(folder / "summary.json")
    scores, thumbnails = _scores(folder), read_thumbnails(folder / FILE)
    sides = {"training": folder / "bank.parquet", "validation": folder / "validation.parquet"}
    prompts = {name: Prompts().add(_prompts(path)) for name, path in sides.items() if path.is_file()}
    sections = [
        Section("Summary", _summary(summary)),
        Section(
            "Ladder", _ladder(folder), "What each further rung bought; the best one is what predictions are made with."
        ),
        Section("Curves", _curves(folder)),
        Section("Validation cosines", _cosines(scores, summary)),
        Section("Confidence", _confidence(folder), "Of validation images whose prompts it was not fitted to."),
        Section(
            "Predictions",
            _predictions(scores, thumbnails),
            "Images that were held out, with the training prompt that is nearest to what the best rung says of them.",
        ),
        Section("Prompts", prompts_section(prompts)),
        Section("Training pairs", _examples(scores, thumbnails), "Some of them, at random."),
        Section("Data", _data(folder)),
        Section("Configuration", configuration("train", config)),
    ]
    name = config["name"] if isinstance(config.get("name"), str) else "run"
    told = "finished" if summary and not summary.get("unfinished") else "not finished"
    return page(f"Run {name}", f"{folder.resolve().name}, {told}", sections)


def prompts_section(prompts: Mapping[str, Prompts]) -> Html:
    """Lengths of the prompts of one or two kinds, and the words of all of them."""
    lengths = charts.shares({name: one.lengths for name, one in prompts.items()}, "Words of a prompt", "words")
    together = Prompts()
    for one in prompts.values():
        together.count += one.count
        together.words.update(one.words)
    words = cloud(together)
    if words:
        words = element("figure", element("figcaption", element("strong", "Words of the prompts")), words)
    return element("div", lengths, words, class_="charts") if lengths else Html("")


def pairs_gallery(pairs: Sequence[Thumbnail]) -> Html:
    return gallery([Card(one.id, one.prompt) for one in pairs], {one.id: one for one in pairs}, _NO_PICTURE)


def _summary(summary: Mapping[str, Any]) -> Html:
    if not summary:
        return element("p", "The run has no summary.json: it is not finished.")
    ends = summary.get("val_interval")
    interval = " to ".join(f"{number(end):.4f}" for end in ends) if isinstance(ends, list) else None
    told = {
        "validation cosine": summary.get("val_cosine"),
        "95 % interval": interval,
        "best rung": summary.get("best_rung"),
        "mean baseline": summary.get("mean_baseline"),
        "nearest training prompt": summary.get("nearest_prompt_baseline"),
        "training pairs": summary.get("train_pairs"),
        "validation pairs": summary.get("val_pairs"),
        "words: mean average precision": summary.get("val_word_map"),
        "words: F1": summary.get("val_word_f1"),
        "seconds": _rounded(summary.get("seconds")),
        "training images per second": _rounded(summary.get("images_per_second")),
        "seed": summary.get("seed"),
    }
    stopped = summary.get("unfinished")
    note = [element("p", f"{stopped}: resume= goes on with it.", class_="note")] if stopped else []
    return joined([facts(told), *note])


def _ladder(folder: Path) -> Html:
    rows = read_table(folder / "ladder.csv")
    climbed = [
        (row["rung"], number(row["val_cosine"]), number(row.get("low")), number(row.get("high")), row["rung"] == "mean")
        for row in rows
        if row.get("rung") and row.get("val_cosine")
    ]
    told = [
        {
            "rung": row.get("rung", ""),
            "validation cosine": _digits(row.get("val_cosine"), 4),
            "95 % interval": f"{_digits(row['low'], 4)} to {_digits(row['high'], 4)}" if row.get("low") else "",
            "seconds": _digits(row.get("seconds"), 1),
            "peak GiB": _digits(row.get("memory_gib"), 2),
            "note": row.get("note", ""),
        }
        for row in rows
    ]
    return joined(
        [charts.intervals(climbed, "Rungs"), table(told, "The rungs in the order in which they were climbed")]
    )


def _curves(folder: Path) -> Html:
    rows = read_table(folder / "metrics.csv")
    names = [name for name in (rows[0] if rows else ()) if name not in ("step", "rung", None)]
    drawings = []
    for name in names[:_MOST_CURVES]:
        points = [(number(row.get("step")), number(row.get(name))) for row in rows if row.get(name)]
        kind, _, what = name.partition("/")
        title = _TITLES.get(name) or (f"Training loss: {what}" if kind == "train" else name)
        drawings.append(charts.curve([point for point in points if math.isfinite(point[0])], title, "step"))
    drawings = [one for one in drawings if one]
    return element("div", *drawings, class_="charts") if drawings else Html("")


def _cosines(scores: Sequence[ScoreRow], summary: Mapping[str, Any]) -> Html:
    marks = {
        name: value
        for name, key in (("mean baseline", "mean_baseline"), ("mean", "val_cosine"))
        if isinstance(value := summary.get(key), float)
    }
    drawing = charts.histogram([one.cosine for one in scores], "Cosine of prediction and prompt", marks)
    by_source: dict[str, list[float]] = {}
    for one in scores:
        if math.isfinite(one.cosine):
            by_source.setdefault(one.source, []).append(one.cosine)
    rows = [
        {"source": name, "images": len(some), "mean cosine": sum(some) / len(some)} for name, some in by_source.items()
    ]
    return joined([drawing, table(rows, "By source") if len(rows) > 1 else Html("")])


def _confidence(folder: Path) -> Html:
    found = _json(folder / "confidence.json")
    checked, best = found.get("checked"), folder / "checkpoints" / "best.safetensors"
    if not isinstance(checked, dict) or not best.is_file():
        return Html("")
    if found.get("of") != read_header(best).scores:
        return element("p", "confidence.json is of another checkpoint.", class_="note")
    drawing = reliability(checked, "Expected and true cosine")
    return element("div", drawing, class_="charts") if drawing else Html("")


def _predictions(scores: Sequence[ScoreRow], thumbnails: Mapping[str, Thumbnail]) -> Html:
    parts: list[Html] = []
    for kind, some in extremes(scores).items():
        cards = [
            Card(
                one.id,
                one.prompt,
                one.cosine,
                {f"nearest training prompt ({one.nearest_cosine:.3f})": one.nearest_prompt},
            )
            for one in some
        ]
        if cards:
            parts += [element("h3", _KINDS[kind]), gallery(cards, thumbnails, _NO_PICTURE)]
    return joined(parts)


def _examples(scores: Sequence[ScoreRow], thumbnails: Mapping[str, Thumbnail]) -> Html:
    validates = {one.id for one in scores}
    pairs = [one for name, one in thumbnails.items() if name not in validates]
    return pairs_gallery(pairs) if pairs else Html("")


def _data(folder: Path) -> Html:
    split = _json(folder / "split.json")
    told = {name.replace("_", " "): value for name, value in split.items() if isinstance(value, int | float)}
    leak = [
        element("p", element("strong", f"{side}: "), phrase(str(split[key])))
        for key, side in (("val_prompt", "Validation"), ("train_prompt", "Training"))
        if key in split
    ]
    if leak:
        leak.insert(0, element("h3", "The training and validation prompts that are closest to each other"))
    bad = read_table(folder / "bad_images.csv")
    return joined(
        [
            table(_spaced(read_table(folder / "lineage.csv")), "What each step of the data left"),
            facts(told),
            *leak,
            table(bad, f"{len(bad):,} images that could not be decoded") if bad else Html(""),
        ]
    )


def configuration(verb: str, config: dict[str, Any]) -> Html:
    """The command to reproduce it, versions, and all settings."""
    settings = {key: value for key, value in config.items() if key not in ("versions", "overrides")}
    versions = config.get("versions")
    versions = dict(versions) if isinstance(versions, dict) else {}
    rows = [{"part": str(name), "version": "" if value is None else str(value)} for name, value in versions.items()]
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=110)
    command = reproduction(verb, config.get("overrides"))
    shown = folded("All settings", code(text)) if settings else Html("")
    return joined([command, table(rows, "Versions") if rows else Html(""), shown])


def number(text: Any) -> float:
    """NaN for what is none."""
    try:
        return float(text)
    except (TypeError, ValueError):
        return math.nan


def _scores(folder: Path) -> list[ScoreRow]:
    return [
        ScoreRow(
            from_cell(row.get("id") or ""),
            row.get("source") or "",
            number(row.get("cosine")),
            from_cell(row.get("prompt") or ""),
            from_cell(row.get("nearest_prompt") or ""),
            number(row.get("nearest_cosine")),
        )
        for row in read_table(folder / "scores.csv")
    ]


def _prompts(path: Path) -> Iterator[str]:
    """The prompts of a bank, a block at a time."""
    try:
        for batch in pq.ParquetFile(path).iter_batches(columns=["prompt"]):
            yield from batch.column(0).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a bank of prompts ({error})") from None


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.yaml"
    if not path.is_file():
        raise ValueError(f"run={folder}: not a run folder, it has no config.yaml")
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        config = None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: damaged, it holds no settings")
    return config


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: damaged")
    return found


def _spaced(rows: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    return [{key.replace("_", " "): value for key, value in row.items()} for row in rows]


def _digits(text: str | None, digits: int) -> str:
    value = number(text)
    return f"{value:.{digits}f}" if math.isfinite(value) else ""


def _rounded(value: Any) -> str | None:
    return f"{value:,.1f}" if isinstance(value, int | float) else None
