"""`evaluate variations=DIR`: how like their references, and their texts, the variations are that `vary` has made."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from img2prompt.build import build
from img2prompt.data.kaggle import read_prompts
from img2prompt.data.listing import readable, unique_ids
from img2prompt.encoders.encoder import Encoder, told_as
from img2prompt.files import write_json, write_table, write_text
from img2prompt.hub import describe
from img2prompt.metrics import bootstrap_interval
from img2prompt.predictors.trained import pick_device
from img2prompt.sdipc.likeness import clip_scores, embedded, frechet_distance, inception, likeness
from img2prompt.sdipc.variations import TABLE, digest_of, read_rows

_FEW_FOR_FID = 2048  # its covariances have so many rows


@dataclass
class Shown:
    """The variations of a folder, the references and texts that they have, and whose are whose."""

    variations: list[Path]
    references: list[Path]
    own_references: list[list[int]]  # of each variation
    texts: list[str]
    own_text: list[int | None]


@dataclass
class Measure:
    """One value for each of some variations, and what any other reference or text would have got."""

    name: str
    rows: list[int]
    values: Float[Tensor, " V"]
    floors: Float[Tensor, " V"]


def evaluate_variations(
    variations: str,
    prompts: str | None,
    out: str | None,
    fid: bool,
    real: Any,
    inception: str | None,
    clip: dict[str, Any],
    dino: dict[str, Any],
    batch_size: int,
    threads: int,
    device: str,
) -> None:
    """Measures the variations in the folder and writes what was found. ValueError says what is wrong."""
    if batch_size < 1 or threads < 1:
        raise ValueError(f"batch_size and threads must be at least 1, got {batch_size} and {threads}")
    if not fid and (real is not None or inception is not None):
        raise ValueError(f"{'real' if real is not None else 'inception'} is of fid=true")
    folder = Path(variations)
    shown = _shown(folder, prompts)
    goal = folder if out is None else Path(out)
    if goal.is_file():
        raise ValueError(f"out={out}: a file; give a folder")
    device = pick_device(device)
    judge = _judge(inception) if fid else None
    compared = shown.references if real is None else [file.path for file in readable(real, 1)[0]]
    if fid and min(len(compared), len(shown.variations)) < 2:
        raise ValueError(f"fid=true: {len(compared)} and {len(shown.variations)} images; two of each are the least")

    measures = []
    texts: list[str] = shown.texts
    for key, choice, name in (("clip", clip, "CLIP-I"), ("dino", dino, "DINO")):
        encoder = _encoder(key, choice).to(device)
        made, originals = (
            embedded(encoder, paths, batch_size, threads) for paths in (shown.variations, shown.references)
        )
        everyone = list(range(len(made)))
        measures.append(Measure(name, everyone, *likeness(made, originals, shown.own_references)))
        if key == "clip" and texts:
            told = _text_embeddings(encoder, choice, texts, device)
            rows = [row for row in everyone if shown.own_text[row] is not None]
            own = [[number] for number in shown.own_text if number is not None]
            values, floors = likeness(made[rows], told, own)
            measures.append(Measure("CLIP-T", rows, values, floors))
            measures.append(Measure("CLIP-Score", rows, clip_scores(values), clip_scores(floors)))
    distance = None
    if judge is not None:
        distance = frechet_distance(judge, compared, shown.variations, device, batch_size, threads)
    _tell(goal, shown, measures, distance, len(compared), {"clip": _named(clip), "dino": _named(dino)})


def _shown(folder: Path, prompts: str | None) -> Shown:
    if not folder.is_dir():
        raise ValueError(f"variations={folder}: no such folder; img2prompt vary out={folder} makes one")
    table = read_rows(folder)
    if not table:
        raise ValueError(f"variations={folder}: no variations there, with the {TABLE} that img2prompt vary writes")
    rows = [row for row in table.values() if all(map(_is_as_it_was, row["images"], row["digests"]))]
    if len(rows) < len(table):
        told = f"{len(table) - len(rows)} of {len(table)} variations are left out: their references are gone or changed"
        if not rows:
            raise ValueError(f"variations={folder}: {told}")
        print(told, file=sys.stderr)
    names = list(dict.fromkeys(name for row in rows for name in row["images"]))
    references = [Path(name) for name in names]
    place = {name: number for number, name in enumerate(names)}
    texts: dict[str, int] = {}
    known = _prompts_of(references, prompts) if prompts is not None else {}
    own_text = []
    for row in rows:
        # A blend has several references, and no prompt of its own.
        prompt = known.get(place[row["images"][0]]) if len(row["images"]) == 1 else None
        text = row["text"] or prompt
        own_text.append(None if text is None else texts.setdefault(text, len(texts)))
    return Shown(
        [folder / row["file"] for row in rows],
        references,
        [[place[name] for name in row["images"]] for row in rows],
        list(texts),
        own_text,
    )


def _is_as_it_was(image: str, digest: str) -> bool:
    path = Path(image)
    return path.is_file() and digest_of(path) == digest


def _prompts_of(references: Sequence[Path], path: str) -> dict[int, str]:
    """Prompts by the numbers of references; ValueError when none of them has one."""
    named = {image_id: prompt for image_id, prompt in read_prompts(path) if prompt.strip()}
    ids = unique_ids(references)
    known = {number: named[one] for number, one in enumerate(ids) if one in named}
    if not known:
        first = next(iter(named), None)
        raise ValueError(f"{path}: none of its imgIds (first: {first}) is one of the references (first: {ids[0]})")
    return known


def _judge(weights: str | None) -> Any:
    if weights is not None and not Path(weights).is_file():
        raise ValueError(f"inception={weights}: no such file")
    if weights is None:
        print("loading Inception v3 (95 MB, where it is not in torch's cache)", file=sys.stderr)
    return inception(weights)


def _encoder(key: str, choice: dict[str, Any]) -> Encoder:
    pretrained = choice["pretrained"]
    if pretrained is False:
        raise ValueError(f"{key}.pretrained must be true or a file: weights drawn at random measure nothing")
    with told_as({"encoder.": f"{key}.", "the encoder name": f"{key}.name"}):
        encoder = build({name: value for name, value in choice.items() if name != "pretrained"}, Encoder)
        if pretrained is True:
            print(f"loading {'; '.join(map(describe, encoder.downloads()))}", file=sys.stderr)
        encoder.load_pretrained(None if pretrained is True else pretrained)
    return encoder.eval()


def _text_embeddings(
    encoder: Encoder, choice: dict[str, Any], texts: Sequence[str], device: str
) -> Float[Tensor, "T E"]:
    file = choice["pretrained"] if isinstance(choice["pretrained"], str) else None
    refusal = encoder.text_refusal(file)
    if refusal is not None:
        raise ValueError(f"clip: no texts can be compared: {refusal}")
    return functional.normalize(encoder.text_features(list(texts), file, device, lambda count: None), dim=-1)


def _named(choice: dict[str, Any]) -> str:
    weights = f" of {choice['pretrained']}" if isinstance(choice["pretrained"], str) else ""
    return " ".join(str(choice[key]) for key in ("name", "tag") if choice.get(key)) + weights


def _tell(
    goal: Path,
    shown: Shown,
    measures: Sequence[Measure],
    distance: float | None,
    compared: int,
    judges: dict[str, str],
) -> None:
    """Prints the table and writes it, as JSON and as Markdown, and beside it the values of each variation."""
    groups = _groups(shown.own_references)
    found = [_summary(one, groups[one.rows]) for one in measures]
    lines = ["| measure | variations | mean x 100 | 95 % interval | of any other |", "|---|---|---|---|---|"]
    lines += [_line(one) for one in found]
    if distance is not None:
        lines.append(f"| FID (no factor) | {len(shown.variations)} | {distance:.2f} | | |")
    values: list[dict[str, Any]] = [
        {"file": path.name, "text": "" if own is None else shown.texts[own]}
        for path, own in zip(shown.variations, shown.own_text, strict=True)
    ]
    for one in measures:
        for row, value in zip(one.rows, one.values.tolist(), strict=True):
            values[row][one.name] = f"{100 * value:.3f}"
    goal.mkdir(parents=True, exist_ok=True)
    write_json(goal / "evaluation.json", {"measures": found, "fid": distance, "judges": judges})
    write_table(goal / "evaluation.csv", values)
    write_text(goal / "evaluation.md", "\n".join(lines) + "\n")
    print("\n".join(lines))
    few = min(compared, len(shown.variations))
    if distance is not None and few < _FEW_FOR_FID:
        print(f"FID of {few} images says little: it needs some thousands", file=sys.stderr)
    without = shown.own_text.count(None)
    if without:
        print(f"{without} of {len(shown.own_text)} variations have no text to be compared with", file=sys.stderr)
    print(f"{len(shown.variations)} variations of {len(shown.references)} images: {goal / 'evaluation.json'}")


def _summary(one: Measure, groups: np.ndarray) -> dict[str, Any]:
    low, high = bootstrap_interval(one.values, np.unique(groups, return_inverse=True)[1])
    floor = float(one.floors.mean())
    return {
        "measure": one.name,
        "variations": len(one.rows),
        "mean": 100 * float(one.values.mean()),
        "low": 100 * low,
        "high": 100 * high,
        "of_any_other": None if math.isnan(floor) else 100 * floor,
    }


def _line(found: dict[str, Any]) -> str:
    floor = "" if found["of_any_other"] is None else f"{found['of_any_other']:.2f}"
    interval = f"{found['low']:.2f} to {found['high']:.2f}"
    return f"| {found['measure']} | {found['variations']} | {found['mean']:.2f} | {interval} | {floor} |"


def _groups(own: Sequence[Sequence[int]]) -> np.ndarray:
    """Numbers of variations' references: those of one reference are not independent of each other."""
    numbers: dict[tuple[int, ...], int] = {}
    return np.array([numbers.setdefault(tuple(one), len(numbers)) for one in own])
