"""From overrides to the settings of a command: composed, resolved, and checked for keys and kinds of values."""

import difflib
import math
from collections.abc import Iterator, Mapping
from typing import Any

from img2prompt.commands.conf import conf_folder, root_keys

_WORDS: dict[type, str] = {
    bool: "true or false",
    int: "a whole number",
    dict: "a mapping {source: …, root: …}",
    float: "a number",
    list: "a [list]",
    str: "text",
    type(None): "null",
}
_BRIEF = 80  # characters
# What keys take whose defaults do not show it; others take what their default is, if that is a number or a truth.
_TAKES: dict[str, tuple[type, ...]] = {
    "alpha": (float, type(None)),
    "alphas": (list,),
    "apply_to": (str, list, type(None)),
    "artists": (bool, str),
    "bank": (str, list, type(None)),
    "betas": (list,),
    "cache_dir": (str, type(None)),
    "captioner": (str, type(None)),
    "checkpoint_every_minutes": (float, type(None)),
    "checkpoint_every_n_steps": (int, type(None)),
    "ckpt": (str, type(None)),
    "ckpts": (str, list),
    "classes": (str,),
    "clip": (str, dict, type(None)),
    "clip_revision": (str, type(None)),
    "compile": (bool, type(None)),
    "confidence": (str, type(None)),
    "count": (int, type(None)),
    "duplicate_threshold": (float, type(None)),
    "ema_decay": (float, type(None)),
    "epochs": (int, type(None)),
    "flavors": (bool, str),
    "evaluation": (str, type(None)),
    "floor": (float, type(None)),
    "format": (str,),
    "gpus": (str, list),
    "gradient_clip_norm": (float, type(None)),
    "group_threshold": (float, type(None)),
    "guidance": (float, list, type(None)),
    "hidden": (int, list),
    "image_size_px": (int, type(None)),
    "images": (str, list, type(None)),
    "inception": (str, type(None)),
    "iterations": (int, type(None)),
    "keep_split": (str, type(None)),
    "keep_away": (str, type(None)),
    "languages": (list, type(None)),
    "lora_rank": (int, type(None)),
    "lr": (float, type(None)),
    "max_clip_tokens": (int, type(None)),
    "max_epochs": (int, type(None)),
    "max_time": (str, type(None)),
    "max_words": (int, type(None)),
    "mediums": (bool, str),
    "min_confidence": (float, type(None)),
    "min_words": (int, type(None)),
    "model": (str,),
    "modifiers": (str, type(None)),
    "modifiers_per_prompt": (list,),
    "movements": (bool, str),
    "name": (str,),
    "norm": (float, type(None)),
    "norm_prompts": (str, type(None)),
    "options": (dict, type(None)),
    "out": (str, type(None)),
    "pretrained": (bool, str),
    "pipeline": (str, type(None)),
    "predictions": (list, type(None)),
    "predictors": (list,),
    "prompt_column": (str, type(None)),
    "prompts": (str, list, type(None)),
    "push": (str, type(None)),
    "python": (str, type(None)),
    "real": (str, list, type(None)),
    "records": (str, type(None)),
    "report_thresholds": (list,),
    "root": (str, type(None)),
    "revision": (str, type(None)),
    "run": (str, type(None)),
    "saved_px": (int, type(None)),
    "shard": (str, type(None)),
    "sites": (bool, str),
    "size_px": (int, type(None)),
    "source": (str, list),
    "sources": (list,),
    "space": (str, type(None)),
    "steps": (int, type(None)),
    "storage": (str, type(None)),
    "study": (str, type(None)),
    "sweep_dir": (str, type(None)),
    "templates": (list,),
    "text": (str, list, type(None)),
    "text_model": (str, type(None)),
    "truth": (str, type(None)),
    "unfrozen_blocks": (int, type(None)),
    "val": (float, dict),
    "variations": (str,),
    "views": (list,),
    "weights": (str, type(None)),
    "words": (str, type(None)),
}


def chosen_config(command: str, arguments: list[str]) -> str:
    """The configuration that a command line is of: `fit` fits refiners, with predictor= predictors, and confidence;
    `evaluate` scores predictors on prompts, or on classes=, or variations=.
    """
    for known, configuration, keys in (
        ("fit", "fit_predictor", ("predictor=", "predictor.")),
        ("fit", "fit_confidence", ("refiner=confidence",)),
        ("evaluate", "evaluate_variations", ("variations=",)),
        ("evaluate", "evaluate_classes", ("classes=",)),
    ):
        if command == known and any(one.startswith(keys) for one in arguments):
            return configuration
    return command


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
    known = root_keys(command)
    for key in config:
        if key not in known:
            raise ValueError(f"{key}: no such key{did_you_mean(key, known)}")
    check_values(config, _defaults(command, config), "")
    return config


def check_values(given: Mapping[str, Any], default: Mapping[str, Any], prefix: str) -> None:
    """ValueError for a value of another kind than its default, and for keys of nobody where no class would refuse."""
    for key, value in given.items():
        full = f"{prefix}{key}"
        is_nobody = prefix in ("data.", "target.", "trainer.") or (prefix == "stages." and value is None)
        if is_nobody and key not in default:
            raise ValueError(f"{full}: no such key{did_you_mean(key, list(default))}")
        usual = default.get(key)
        if isinstance(usual, Mapping) and isinstance(value, Mapping):
            check_values(value, usual, f"{full}.")
            continue
        own = tuple(kind for kind in (bool, int, float) if type(usual) is kind)
        kinds = _TAKES.get(key) or own
        if own and not any(_is(usual, kind) for kind in kinds):
            # Another key of the same name.
            kinds = own
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
    for group in root_keys(command):
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


def known_keys(command: str) -> Iterator[str]:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        yield from _flattened(OmegaConf.to_container(hydra_compose(command)), "")


def all_keys(command: str) -> Iterator[str]:
    """Its keys, and those of choices that are not the usual ones."""
    import yaml

    yield from known_keys(command)
    for path in sorted(conf_folder().glob("*/*.yaml")):
        if path.parent.name in root_keys(command):
            yield from _flattened(yaml.safe_load(path.read_text(encoding="utf-8")), f"{path.parent.name}.")


def _flattened(config: Any, prefix: str) -> Iterator[str]:
    for key, value in config.items():
        if key != "_target_":
            yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flattened(value, f"{prefix}{key}.")


def brief(value: Any) -> str:
    """A value for a sentence: a vocabulary or a tokenizer would be pages."""
    text = str(value)
    return text if len(text) <= _BRIEF else f"{text[:_BRIEF]}…"


def did_you_mean(word: str, known: list[str]) -> str:
    # What is known of another choice of the group is no slip.
    known = [key for key in known if key != word]
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    # A key without its group (batch_size for data.batch_size) is a common slip.
    inside = [key for key in known if key.endswith(f".{word}")]
    found = inside or close
    return f"; did you mean {found[0]}?" if found else ""
