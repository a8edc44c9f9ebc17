"""The door of every command: help without torch, a composed configuration, and one sentence for what went wrong."""

import difflib
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from img2prompt.commands.arguments import quoted_paths

COMMANDS = ("train", "predict")
_TRACEBACK = "IMG2PROMPT_TRACEBACK"
_WORDS: dict[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    type(None): "null",
}
# What keys take whose defaults do not show it; others take what their default is, if that is a number or a truth.
_TAKES: dict[str, tuple[type, ...]] = {
    "count": (int, type(None)),
    "epochs": (int, type(None)),
    "gradient_clip_norm": (float, type(None)),
    "image_size_px": (int, type(None)),
    "lr": (float, type(None)),
    "max_epochs": (int, type(None)),
    "max_time": (str, type(None)),
    "model": (str,),
    "name": (str,),
    "pretrained": (bool, str),
    "root": (str, type(None)),
}


def conf_folder() -> Path:
    """Where the configuration lies: in the installed package or, in a checkout, beside it."""
    package = Path(__file__).parent.parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def main(command: str, arguments: list[str] | None = None) -> None:
    """Runs one command with `arguments` (sys.argv by default) and exits: 0, 1 with one sentence, 130 on Ctrl-C, or 143
    on SIGTERM.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if any(argument in ("-h", "--help") for argument in arguments):
        print(_help(command))
        return
    # Lightning would end the run on SIGTERM as if it had succeeded; it leaves a handler that is there alone.
    signal.signal(signal.SIGTERM, _terminated)
    try:
        quoted = quoted_paths(arguments)
        if not any(argument.startswith("-") for argument in arguments):
            # What is wrong with a key is said before seconds of imports; a sweep has its values checked job by job.
            compose(command, quoted)
        run: Callable[[list[str]], Any] = import_module(f"img2prompt.commands.{command}").main
        run(quoted)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        sentence = _sentence(command, arguments, error)
        if sentence is None or os.environ.get(_TRACEBACK):
            raise
        print(f"{command}: {sentence}\n({_TRACEBACK}=1 shows where)", file=sys.stderr)
        sys.exit(1)


def _terminated(number: int, frame: Any) -> None:
    print("terminated", file=sys.stderr)
    sys.exit(128 + number)


def compose(command: str, arguments: list[str]) -> dict[str, Any]:
    """The configuration of `command` with overrides, resolved to plain data."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        config = hydra_compose(command, overrides=arguments)
    return checked(command, OmegaConf.to_container(config, resolve=True, throw_on_missing=True))


def checked(command: str, config: Any) -> dict[str, Any]:
    """The same configuration; ValueError for a key that no command reads (`+foo=1` is silently added by Hydra)."""
    known = _root_keys(command)
    for key in config:
        if key not in known:
            raise ValueError(f"{key}: no such key{_did_you_mean(key, known)}")
    _check_values(config, _defaults(command, config), "")
    return config


def _check_values(given: Mapping[str, Any], default: Mapping[str, Any], prefix: str) -> None:
    """ValueError for a value of another kind than its default, and for keys of nobody where no class would refuse."""
    for key, value in given.items():
        full = f"{prefix}{key}"
        if prefix in ("data.", "target.", "trainer.") and key not in default:
            raise ValueError(f"{full}: no such key{_did_you_mean(key, list(default))}")
        usual = default.get(key)
        if isinstance(usual, Mapping) and isinstance(value, Mapping):
            _check_values(value, usual, f"{full}.")
            continue
        kinds = _TAKES.get(key) or tuple(kind for kind in (bool, int, float) if type(usual) is kind)
        if kinds and not any(_is(value, kind) for kind in kinds):
            raise ValueError(f"{full}={value}: must be {' or '.join(_WORDS[kind] for kind in kinds)}")


def _is(value: Any, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    if isinstance(value, float) and not math.isfinite(value):
        return False
    return isinstance(value, int | float) if kind is float else isinstance(value, kind)


def _defaults(command: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """What the root file and the chosen files of the groups say; all files of a group where the choice is not known."""
    import yaml

    folder = conf_folder()
    values = yaml.safe_load((folder / f"{command}.yaml").read_text())
    for group in _root_keys(command):
        choices = [yaml.safe_load(path.read_text()) or {} for path in sorted((folder / group).glob("*.yaml"))]
        given = config.get(group)
        if isinstance(given, Mapping):
            chosen = [choice for choice in choices if _target(choice) is not None and _target(choice) == _target(given)]
            for choice in chosen or choices:
                values[group] = {**values.get(group, {}), **choice}
    return {key: value for key, value in values.items() if key not in ("defaults", "hydra")}


def _target(node: Mapping[str, Any]) -> Any:
    source = node.get("source")
    return source.get("_target_") if isinstance(source, Mapping) else node.get("_target_")


def _help(command: str) -> str:
    folder = conf_folder()
    root = (folder / f"{command}.yaml").read_text().rstrip()
    lines = [root.partition("\nhydra:")[0].rstrip()]
    if command != "train":
        return lines[0]
    groups = _groups(folder)
    for group, choice in re.findall(r"^  - (\w+): (\w+)$", root, re.MULTILINE):
        lines += ["", f"{group}={choice}    choices: {', '.join(groups[group])}"]
        lines += [f"  {line}" for line in (folder / group / f"{choice}.yaml").read_text().rstrip().splitlines()]
    lines += ["", f"+experiment=    choices: {', '.join(groups['experiment'])}"]
    lines.append("Options of Hydra: -m (sweep over a,b), --cfg job (show the configuration), --info")
    return "\n".join(lines)


def _groups(folder: Path) -> dict[str, list[str]]:
    return {
        group.name: sorted(choice.stem for choice in group.glob("*.yaml"))
        for group in sorted(folder.iterdir())
        if group.is_dir()
    }


def _root_keys(command: str) -> list[str]:
    import yaml

    text = yaml.safe_load((conf_folder() / f"{command}.yaml").read_text())
    groups = [next(iter(item)) for item in text.get("defaults", []) if isinstance(item, Mapping)]
    keys = [key for key in text if key not in ("defaults", "hydra")]
    return list(dict.fromkeys(keys + [group for group in groups if not group.startswith("override")]))


def _sentence(command: str, arguments: list[str], error: Exception) -> str | None:
    """What to tell a user about `error`; None when it is a fault of ours, which deserves its traceback."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    # A class that raised while it was built is wrapped; what it said is what the user needs.
    inner: BaseException | None = error
    while isinstance(inner, HydraException):
        inner = inner.__cause__
    if isinstance(inner, ValueError | OSError | ImportError) and not isinstance(inner, OmegaConfBaseException):
        error = inner
    if isinstance(error, ModuleNotFoundError):
        extra = next((name for name in ("wandb", "tensorboard") if name in str(error).lower()), None)
        return f"{extra} is not installed; pip install 'img2prompt[{extra}]'" if extra else None
    if isinstance(error, HydraException | OmegaConfBaseException):
        return _configuration_sentence(command, str(error))
    if type(error).__name__ == "OutOfMemoryError":
        key = "data.batch_size" if command == "train" else "batch_size"
        return f"the GPU's memory is not enough; lower {key} ({' '.join(str(error).split())[:160]})"
    if isinstance(error, ValueError | OSError):
        return " ".join(str(error).split("\n"))
    return None


def _configuration_sentence(command: str, text: str) -> str:
    override = re.search(r"Could not override '([^']+)'", text) or re.search(r"Key '([^']+)' is not in struct", text)
    missing = re.search(r"(?:In '[^']*': )?Could not find '([^']+)'", text)
    if override:
        key = override[1]
        full = re.search(r"full_key: (\S+)", text)
        key = full[1] if full and "." in full[1] else key
        if key == "experiment":
            return "experiment is added to the defaults: write +experiment=NAME"
        return f"{key}: no such key{_did_you_mean(key, list(_known_keys(command)))}"
    if missing:
        group, _, choice = missing[1].rpartition("/")
        choices = _groups(conf_folder()).get(group, [])
        return f"{group}={choice}: no such choice{_did_you_mean(choice, choices)}; choices: {', '.join(choices)}"
    if "Missing mandatory value" in text:
        key = re.search(r"Missing mandatory value: (\S+)", text)
        return f"{key[1] if key else 'a key'} must be given"
    return " ".join(text.split())


def _known_keys(command: str) -> Iterator[str]:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        yield from _flattened(OmegaConf.to_container(hydra_compose(command)), "")


def _flattened(config: Any, prefix: str) -> Iterator[str]:
    for key, value in config.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flattened(value, f"{prefix}{key}.")


def _did_you_mean(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    # A key without its group (batch_size for data.batch_size) is a common slip.
    inside = [key for key in known if key.endswith(f".{word}")]
    found = inside or close
    return f"; did you mean {found[0]}?" if found else ""
