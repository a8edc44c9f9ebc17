"""Command-line values that are paths reach Hydra as they were typed.

Hydra's grammar gives a meaning to = ( ) , [ ] { } : # and quotes, and files made by Stable Diffusion tools are called
`out (1), seed=3.png`. So the values of the keys below are quoted before Hydra sees them.
"""

import os
import re
from collections.abc import Sequence

PATH_KEYS = (
    "apply_to",
    "bank",
    "cache_dir",
    "ckpt",
    "ckpts",
    "classes",
    "clip",
    "clip.pretrained",
    "confidence",
    "curriculum.predictions",
    "curriculum.records",
    "data.keep_split",
    "data.root",
    "dino.pretrained",
    "encoder.captioner",
    "encoder.name",
    "data.synthesis.out",
    "data.synthesis.prompts",
    "encoder.pretrained",
    "evaluation",
    "generator.model",
    "images",
    "inception",
    "init_from",
    "keep_away",
    "modifiers",
    "name",
    "norm_prompts",
    "out",
    "pipeline",
    "predictor.artists",
    "predictor.bank",
    "predictor.captioner",
    "predictor.clip",
    "predictor.flavors",
    "predictor.mediums",
    "predictor.model",
    "predictor.movements",
    "predictor.pretrained",
    "predictor.sites",
    "predictor.text",
    "prompts",
    "push",
    "python",
    "refiner.bank",
    "real",
    "resume",
    "run",
    "run_dir",
    "source",
    "space",
    "storage",
    "study",
    "sweep_dir",
    "target.model",
    "text",
    "text_model",
    "truth",
    "variations",
    "weights",
    "words",
)
# A path as `_quote` leaves it.
_QUOTED = r"'(?:[^'\\]|\\.)*'"
# What these keys take besides a path; a file of that name is ./true.
_WORDS = {
    f"{group}.{key}": ("true", "false")
    for group, keys in (
        ("clip", ["pretrained"]),
        ("dino", ["pretrained"]),
        ("encoder", ["pretrained"]),
        ("predictor", ["pretrained", "artists", "mediums", "movements", "flavors", "sites"]),
    )
    for key in keys
}


def quoted_paths(arguments: Sequence[str]) -> list[str]:
    """The arguments with the values of path keys quoted for Hydra.

    A value that exists is that path, whatever it looks like. `[a,b]` is a list; commas sweep only under -m; a leading
    `~/` is expanded; `$` never is.
    """
    sweeps = any(argument in ("-m", "--multirun") for argument in arguments)
    return [_quoted_argument(argument, sweeps) for argument in arguments]


def typed(argument: str) -> str:
    """One argument as it is typed, if `quoted_paths` gave this; any other as it is."""
    key, _, value = argument.partition("=")
    if key.lstrip("+") in PATH_KEYS and re.fullmatch(r"'.*'|\[.*\]", value, re.DOTALL):
        is_list = value.startswith("[")
        items = [_plain(item) for item in re.findall(_QUOTED, value, re.DOTALL)]
        found = f"[{','.join(map(_in_quotes, items))}]" if is_list else _plain(value)
        if quoted_paths([f"{key}={found}"]) == [argument]:
            return f"{key}={found}"
    return argument


def _quoted_argument(argument: str, sweeps: bool) -> str:
    key, equals, value = argument.partition("=")
    name = key.lstrip("+")
    if not equals or name not in PATH_KEYS or value == "":
        return argument
    words = _WORDS.get(name, ())
    if value.lower() in words or os.path.lexists(os.path.expanduser(value)):
        return f"{key}={_quote(value, words)}"
    if value.startswith("[") and value.endswith("]"):
        return f"{key}=[{','.join(_quote(item, words) for item in _split(value[1:-1]))}]"
    if sweeps and "," in value:
        return f"{key}={','.join(_quote(item, words) for item in _split(value))}"
    return f"{key}={_quote(_unquoted(value), words)}"


def _quote(path: str, words: Sequence[str] = ()) -> str:
    if path.lower() in words or path.lower() == "null" and not os.path.lexists(path):
        return path
    if path == "~" or path.startswith("~/"):
        path = os.path.expanduser(path)
    # OmegaConf reads ${…} as an interpolation and Hydra a quote as the end; backslashes before them count double.
    path = re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", path)
    path = re.sub(r"(\\*)'", lambda match: match[1] * 2 + r"\'", path)
    path = re.sub(r"\\+$", lambda match: match[0] * 2, path)
    return f"'{path}'"


def _split(text: str) -> list[str]:
    """Splits at commas outside of quotes and drops the quotes; an item that exists as typed is left alone."""
    items = re.findall(r"""\s*("(?:[^"]*)"|'(?:[^']*)'|[^,]*)\s*(?:,|$)""", text)
    return [item if os.path.lexists(item) else _unquoted(item.strip()) for item in items if item.strip()]


def _plain(quoted: str) -> str:
    """The inverse of `_quote`."""
    inner = _unquoted(quoted)
    return re.sub(r"(\\+)(\$\{|'|\Z)", lambda match: "\\" * (len(match[1]) // 2) + match[2], inner)


def _in_quotes(item: str) -> str:
    return f'"{item}"' if "'" in item else f"'{item}'"


def _unquoted(value: str) -> str:
    if len(value) >= 2 and value[0] == value[-1] and value[0] in "'\"":
        return value[1:-1]
    return value
