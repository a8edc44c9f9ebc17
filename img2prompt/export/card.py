"""The model card of an export, from what the run wrote of itself: data, cosine with its floors, licences, use."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from img2prompt.export.licences import UNKNOWN, encoder_licence, text_licence
from img2prompt.export.usage import snippets
from img2prompt.files import read_table
from img2prompt.predictors.exported import OWN_TRANSFORM
from img2prompt.provenance import Provenance

_LIBRARIES = {
    "sentence_transformers": "sentence-transformers",
    "timm": "timm",
    "onnx": "onnx",
    "diffusers": "diffusers",
}


_TEXTS = "{images} of them, cosine at least {least:.7f}."


def model_card(about: Provenance, name: str, repository: str | None, run: Path | None) -> str:
    """README.md of an exported folder: `repository` is where it will lie on the Hub, if it will, and `run` the run
    folder of its checkpoint, if that lies in one.
    """
    config, summary = ({}, {}) if run is None else (_yaml(run / "config.yaml"), _json(run / "summary.json"))
    encoder = about.header.encoder
    pretrained = config.get("encoder", {}).get("pretrained") if isinstance(config.get("encoder"), dict) else None
    licence = encoder_licence(encoder, pretrained)
    front = {
        "library_name": _LIBRARIES.get(about.format, "img2prompt"),
        "pipeline_tag": "image-feature-extraction",
        "tags": ["img2prompt", "image-to-prompt", "sentence-similarity"],
        "license": licence if licence not in (None, UNKNOWN) else "other",
    }
    if about.format == "diffusers":
        front["pipeline_tag"] = "text-to-image"
    sections = [f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# {_plain(name)}", _what(about)]
    sections.append("## How good it is\n\n" + "\n".join(_scores(about, summary, run)))
    sections.append("## What it was trained on\n\n" + "\n".join(_data(config, summary)))
    if about.format == "kaggle":
        sections.append(
            "## On Kaggle\n\nImport `submission.ipynb`, attach this folder as a dataset, and run all cells."
        )
    if about.format != "diffusers":
        sections.append("## How to use it\n\n" + "\n\n".join(_uses(about, repository)))
    sections.append("## Licences of the weights\n\n" + "\n".join(_licences(about, licence)))
    sections.append("## How it was checked\n\n" + _checked(about))
    return "\n\n".join(sections) + "\n"


def _what(about: Provenance) -> str:
    encoder, target = about.header.encoder, about.header.target
    if about.format == "diffusers":
        return "A pipeline of Stable Diffusion, half of whose U-Net has been trained to read images (img2prompt)."
    return (
        f"Says of an image where the sentence embedding of the prompt that made it lies: {target.dimension} numbers of "
        f"unit length in the space of {_plain(target.model)}. The encoder is {_plain(encoder.get('name'))}, images of "
        f"{encoder.get('image_size_px')} px. It has learnt from 8-bit RGB images, turned as their cameras say, with "
        "white where they are transparent; 16-bit ones must be scaled before.\n\n"
        f"Written by img2prompt {about.versions.get('img2prompt')}; `provenance.json` has all facts."
    )


def _scores(about: Provenance, summary: Mapping[str, Any], run: Path | None) -> list[str]:
    scores = about.header.scores
    rows = [(f"this model ({scores.get('rung', 'a checkpoint')})", scores.get("val_cosine"))]
    rungs = read_table(run / "ladder.csv") if run is not None else []
    own = next((number for number, row in enumerate(rungs) if row["rung"] == scores.get("rung")), 0)
    rows += [(f"floor: {row['rung']}", row.get("val_cosine")) for row in rungs[:own]]
    rows.append(("floor: the nearest training prompt to each prediction", summary.get("nearest_prompt_baseline")))
    lines = ["Mean cosine to the embeddings of the prompts of images that were held out:", ""]
    lines += ["| what | cosine |", "|---|---|"]
    lines += [f"| {_plain(told)} | {number:.4f} |" for told, value in rows if (number := _number(value)) is not None]
    interval = summary.get("val_interval")
    if isinstance(interval, list) and None not in interval:
        lines += ["", f"95 % bootstrap interval of the best rung: {interval[0]:.4f} to {interval[1]:.4f}."]
    if _number(scores.get("val_cosine")) is None:
        lines += ["", "Not known: the checkpoint does not say."]
    return lines


def _data(config: Mapping[str, Any], summary: Mapping[str, Any]) -> list[str]:
    data = config.get("data")
    if not isinstance(data, dict):
        return ["Not known: the checkpoint does not lie in the folder of its run."]
    # Not the root: a path of somebody's machine.
    facts = {
        "data": data.get("name"),
        "training pairs": summary.get("train_pairs"),
        "validation pairs": summary.get("val_pairs"),
        "prompts nearer than this cosine counted as one": data.get("duplicate_threshold"),
        "prompts nearer than this cosine stayed on one side of the split": data.get("group_threshold"),
        "seed": config.get("seed"),
    }
    return [f"* {told}: {_plain(value)}" for told, value in facts.items() if value is not None]


def _uses(about: Provenance, repository: str | None) -> list[str]:
    return [f"**{title}**\n\n```{language}\n{code}```" for title, language, code in snippets(about, repository)]


def _licences(about: Provenance, licence: str | None) -> list[str]:
    encoder, target = about.header.encoder, about.header.target
    tag = f" ({_plain(encoder['tag'])})" if encoder.get("tag") else ""
    told = {None: "trained from scratch", UNKNOWN: "not known to img2prompt: ask where they were published"}
    lines = [f"* encoder {_plain(encoder.get('name'))}{tag}: {told.get(licence, licence)}"]
    if about.format == "sentence_transformers":
        own = text_licence(target.model)
        lines.append(f"* text encoder {_plain(target.model)}: {told.get(own, own)}")
    return [
        *lines,
        "* what training added belongs to whoever trained it; images and prompts have licences of their own",
    ]


def _checked(about: Provenance) -> str:
    checked = about.checked
    if "least" not in checked:
        return "Each tensor was read back and compared."
    told = "{images} {of} through the checkpoint and through this folder: cosine at least {least:.7f}, mean {mean:.7f}."
    whole = told.format(**checked)
    if "int8" not in checked:
        lines = [whole]
    else:
        lines = [
            f"As it is, with 8-bit weights: {told.format(**checked['int8'])}",
            f"Before they were made so: {whole}",
        ]
    if checked.get("texts"):
        lines.append(
            "Texts: "
            + "{images} {of}, cosine at least {least:.7f} with the encoder that the prompts were embedded by.".format(
                **checked["texts"]
            )
        )
    if OWN_TRANSFORM in checked:
        lines.append(f"By timm's own transform: {told.format(**checked[OWN_TRANSFORM])}")
    return "\n\n".join(lines)


def _number(value: Any) -> float | None:
    try:
        found = float(value)
    except (TypeError, ValueError):
        return None
    return found if math.isfinite(found) else None


def _plain(value: Any) -> str:
    """One line of text that Markdown takes for nothing else."""
    text = " ".join(str(value).split())
    return "".join(f"\\{letter}" if letter in "\\`*_[]<>|#" else letter for letter in text)


def _yaml(path: Path) -> dict[str, Any]:
    found = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    return found if isinstance(found, dict) else {}


def _json(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    return found if isinstance(found, dict) else {}
