"""The prompt that made an image, from the text inside its file: one reader per generator's way of writing it.

A reader that finds text it does not understand raises; only where no field is a generator's is there no label.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from img2prompt.data.comfyui import prompts_of_drawing, prompts_of_run
from img2prompt.data.embedded import MetadataError, embedded_text


@dataclass(frozen=True)
class Label:
    """What an image's file says of its prompt."""

    prompt: str
    negative_prompt: str = ""
    tool: str = ""


_STEPS = re.compile(r"\s*Steps: \d+(,|$)")


def read_label(data: bytes) -> Label | None:
    """The label inside an encoded image; None where no generator left one. MetadataError when it cannot be trusted."""
    return label_of(embedded_text(data))


def caption_file(text: str) -> list[Label]:
    """The labels in a text file beside an image: A1111's parameters, or else each line a caption."""
    # Other breaks, such as U+2028, may stand inside of a caption.
    lines = [line.strip() for line in re.split(r"\r\n|\r|\n", text) if line.strip()]
    if any(_STEPS.match(line) or line.startswith("Negative prompt:") for line in lines):
        label = _parameters(text)
        return [] if label is None else [label]
    return [Label(line, "", "text") for line in lines]


def label_of(fields: dict[str, str]) -> Label | None:
    """The label in an image's text fields, by name."""
    for name, reader in READERS:
        if name == "Description" and not any(
            "NovelAI" in fields.get(key, "") for key in ("Software", "Title", "Source")
        ):
            # Anybody may describe a picture.
            continue
        if name in fields:
            try:
                label = reader(fields[name])
            except (AttributeError, IndexError, KeyError, RecursionError, TypeError) as error:
                raise MetadataError(f"{name} is not as its generator writes it ({type(error).__name__})") from None
            if label is not None:
                if not label.prompt.strip():
                    raise MetadataError(f"{label.tool}: empty prompt")
                return label
    return None


def _parameters(text: str) -> Label | None:
    """A1111 and Forge: the prompt, `Negative prompt:` and its lines, then a line of settings; or JSON of others."""
    if text.lstrip().startswith("{"):
        return _parameters_json(_json(text))
    lines = text.replace("\r\n", "\n").split("\n")
    settings = [number for number, line in enumerate(lines) if _STEPS.match(line)]
    settings = settings or [number for number, line in enumerate(lines) if _is_settings(line)]
    if settings:
        lines = lines[: settings[-1]]
    negative = [number for number, line in enumerate(lines) if line.startswith("Negative prompt:")]
    if not settings and not negative:
        raise MetadataError("parameters without settings: it may be no prompt")
    if len(negative) > 1:
        raise MetadataError("parameters with two negative prompts: it cannot be told where the prompt ends")
    end = negative[0] if negative else len(lines)
    return Label(
        "\n".join(lines[:end]).strip(),
        "\n".join(lines[end:]).removeprefix("Negative prompt:").strip(),
        "A1111",
    )


def _is_settings(line: str) -> bool:
    # Steps come first in A1111; forks put others first, always several and comma-separated.
    return bool(_STEPS.match(line)) or len(re.findall(r"(?:^|, )[A-Z][A-Za-z ]{2,20}: [^,]+", line)) >= 4


def _parameters_json(values: Any) -> Label:
    if isinstance(values.get("sui_image_params"), dict):
        values = values["sui_image_params"]
        return Label(_text(values["prompt"]), _text(values.get("negativeprompt", "")), "SwarmUI")
    if "prompt" in values:
        return Label(_text(values["prompt"]), _text(values.get("negative_prompt", "")), "Fooocus")
    return Label(_text(values["Prompt"]), _text(values.get("Negative Prompt", "")), "Fooocus")


def _comment(text: str) -> Label | None:
    """NovelAI's settings, or old Fooocus'; a comment of anybody else is none of ours."""
    if not text.lstrip().startswith("{"):
        return None
    values = _json(text)
    if "Prompt" in values:
        return _parameters_json(values)
    if "prompt" not in values:
        return None
    caption = values["v4_prompt"]["caption"] if isinstance(values.get("v4_prompt"), dict) else {}
    characters = [_text(one["char_caption"]) for one in caption.get("char_captions") or []]
    negative = values.get("uc") or values.get("negative_prompt") or ""
    return Label(", ".join([_text(values["prompt"]), *characters]), _text(negative), "NovelAI")


def _user_comment(text: str) -> Label | None:
    if text.lstrip().startswith("{"):
        values = _json(text)
        # Of JSON in a comment only these are known; cameras and editors write theirs.
        known = "sui_image_params" in values or "prompt" in values or "Prompt" in values
        return _parameters_json(values) if known else None
    has_settings = any(_is_settings(line) for line in text.splitlines())
    return _parameters(text) if has_settings or "Negative prompt:" in text else None


def _invokeai(text: str) -> Label:
    values = _json(text)
    return Label(_text(values["positive_prompt"]), _text(values.get("negative_prompt") or ""), "InvokeAI")


def _invokeai_image(text: str) -> Label:
    prompt = _json(text)["image"]["prompt"]
    if isinstance(prompt, list):
        if len(prompt) != 1:
            raise MetadataError(f"InvokeAI: {len(prompt)} weighted prompts")
        prompt = prompt[0]["prompt"]
    return _bracketed(_text(prompt))


def _dream(text: str) -> Label:
    """InvokeAI's command line: the prompt in quotes, then switches."""
    match = re.match(r'\s*"((?:[^"\\]|\\.)*)"\s*(-|$)', text, re.DOTALL)
    if match is None:
        raise MetadataError("InvokeAI: a command without a quoted prompt")
    return _bracketed(match[1].replace('\\"', '"'))


def _bracketed(text: str) -> Label:
    # Old InvokeAI has the negative prompt in brackets inside of the prompt.
    negative = re.findall(r"\[([^\[\]]*)\]", text)
    prompt = re.sub(r"\s*\[[^\[\]]*\]", "", text).strip()
    return Label(prompt, ", ".join(negative), "InvokeAI")


def _run_graph(text: str) -> Label:
    if not text.lstrip().startswith("{"):
        # Easy Diffusion and others: the plain prompt in a field of this name.
        return Label(text.strip(), "", "text")
    return Label(*prompts_of_run(_json(text)), "ComfyUI")


def _drawn_graph(text: str) -> Label:
    return Label(*prompts_of_drawing(_json(text)), "ComfyUI")


def _description(text: str) -> Label:
    return Label(text.strip(), "", "NovelAI")


def _json(text: str) -> Any:
    try:
        # ComfyUI writes NaN, which Python reads.
        values = json.loads(text)
    except (ValueError, RecursionError):
        raise MetadataError("damaged JSON") from None
    if not isinstance(values, dict):
        raise MetadataError("JSON that is no table")
    return values


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise MetadataError(f"a prompt that is no text but {type(value).__name__}")
    return value


# By the field's name, the most telling first: a file may carry several (ComfyUI nodes that also write A1111's).
READERS: tuple[tuple[str, Callable[[str], Label | None]], ...] = (
    ("invokeai_metadata", _invokeai),
    ("sd-metadata", _invokeai_image),
    ("Dream", _dream),
    ("parameters", _parameters),
    ("UserComment", _user_comment),
    ("Comment", _comment),
    ("prompt", _run_graph),
    ("workflow", _drawn_graph),
    ("Description", _description),
)
