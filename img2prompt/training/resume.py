"""Going on with a run: its own configuration, and the few keys that may differ."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from img2prompt.bank import read_bank
from img2prompt.training.datamodule import PairData
from img2prompt.training.may_differ import MAY_DIFFER
from img2prompt.training.pairs import Rows
from img2prompt.training.run_folder import is_finished


def check_unchanged(folder: Path, rows: Rows) -> None:
    """ValueError when the run in `folder` began with other rows, or another split of them."""
    record = folder / "data.json"
    if not record.is_file():
        return
    try:
        began = json.loads(record.read_text())
        pairs = began["pairs"]
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{record}: damaged; start anew in another run_dir") from None
    now = rows.fingerprint()
    if {key: began.get(key) for key in now} != now:
        raise ValueError(
            f"{folder}: its data have changed: {pairs} pairs then, {now['pairs']} now, or other prompts; "
            "put them back, or start a new run with init_from="
        )


def words_digest(words: Sequence[str]) -> str:
    return hashlib.blake2b("\n".join(words).encode(), digest_size=8).hexdigest()


def check_words(folder: Path, words: Sequence[str]) -> None:
    """ValueError when the run in `folder` began with another vocabulary."""
    record = folder / "data.json"
    if record.is_file() and json.loads(record.read_text()).get("words") != words_digest(words):
        raise ValueError(f"{folder}: its vocabulary.txt has changed; put it back, or start anew in another run_dir")


def check_same_values(folder: Path, pairs: PairData) -> None:
    """ValueError when the images, or the embeddings of the prompts, are others than the run in `folder` began with."""
    if json.loads((folder / "data.json").read_text()).get("pixels") != pairs.pixels.digest():
        raise ValueError(f"{folder}: its images have changed; put them back, or start a new run with init_from=")
    bank = read_bank(folder / "validation.parquet")
    before = dict(zip(bank.prompts, bank.embeddings, strict=True))
    rows = [row for row in pairs.val_rows if pairs.samples[row].prompt in before]
    then = torch.stack([before[pairs.samples[row].prompt] for row in rows])
    # Kept in half precision; another device or batch changes less.
    if (then - pairs.targets[rows]).abs().max() > 0.02:
        raise ValueError(f"{folder}: its text encoder has changed: it embeds the same prompts elsewhere")


def continued(folder: Path, settings: dict[str, Any], overrides: Sequence[str], conf: Path) -> dict[str, Any]:
    """The saved settings of the run in `folder`, with the overrides of keys that may differ taken from `settings`.

    ValueError when there is no run, when another key is overridden, or when the saved file names a class that our own
    configuration does not: the file may be somebody else's.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise ValueError(f"resume={folder}: not a run folder, it has no config.yaml")
    try:
        saved = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: damaged ({' '.join(str(error).split())[:120]})") from None
    if not isinstance(saved, dict):
        raise ValueError(f"{path}: damaged, it holds no settings")
    saved.pop("versions", None)
    saved.pop("overrides", None)
    ours = {target for file in conf.rglob("*.yaml") for target in _targets(yaml.safe_load(file.read_text()))}
    for target in _targets(saved):
        if target not in ours:
            raise ValueError(f"{path}: refused, {target} is not one of our classes")
    for text in _texts(saved):
        # Hydra would resolve them while it builds, and resolvers can call any function.
        if "${" in text:
            raise ValueError(f"{path}: refused, it holds an interpolation: {text}")
    # What a group may choose differs; these are always there.
    needed = yaml.safe_load((conf / "train.yaml").read_text()) | {key: settings[key] for key in ("target", "trainer")}
    there = [key for key, _ in _flat(saved)]
    lacks = [
        key
        for key, _ in _flat({key: needed.get(key) for key in settings})
        if key not in saved and not any(one == key or one.startswith(f"{key}.") for one in there)
    ]
    if lacks:
        raise ValueError(
            f"{path}: damaged, or of another version: it lacks {', '.join(lacks)}; start a new run with init_from="
        )
    # A logger may connect to somewhere: that is for the command line to say.
    saved["logger"] = settings["logger"]
    for override in overrides:
        key = override.lstrip("+~").partition("=")[0]
        if key in MAY_DIFFER:
            _copy(settings, saved, key.split("."))
        else:
            _check_same(folder, key, settings, saved)
    return saved


def run_to_go_on_with(name: str, run_dir: str | None) -> Path | None:
    """What resume=auto means: `run_dir` if that is given and has a run, else the newest unfinished run of `name`."""
    if run_dir is not None:
        return Path(run_dir) if Path(run_dir, "config.yaml").is_file() else None
    runs = [config for config in Path("runs", name).glob("*/config.yaml") if not is_finished(config.parent)]
    return max(runs, key=lambda config: (config.stat().st_mtime_ns, str(config))).parent if runs else None


def _check_same(folder: Path, key: str, settings: dict[str, Any], saved: dict[str, Any]) -> None:
    """ValueError when what `key` sets (an experiment: everything) is not what the run in `folder` began with."""
    now, then = dict(_flat(settings)), dict(_flat(saved))
    for one in sorted(now.keys() | then.keys()):
        is_set = key == "experiment" or one == key or one.startswith(f"{key}.")
        is_free = any(one == free or one.startswith(f"{free}.") for free in MAY_DIFFER)
        if is_set and not is_free and now.get(one) != then.get(one):
            raise ValueError(
                f"resume={folder}: {one} is {then.get(one)} in that run, not {now.get(one)}: a resumed run keeps its "
                f"own settings; only {', '.join(MAY_DIFFER)} may differ (init_from= starts a new run from its weights)"
            )


def _flat(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _copy(origin: dict[str, Any], goal: dict[str, Any], keys: list[str]) -> None:
    for key in keys[:-1]:
        origin, goal = origin[key], goal[key]
    goal[keys[-1]] = origin[keys[-1]]


def _texts(config: Any) -> Iterator[str]:
    if isinstance(config, dict):
        for key, value in config.items():
            yield from _texts(value)
            if str(key).startswith("_") and key != "_target_":
                yield f"${{{key}}}"
    elif isinstance(config, list):
        for value in config:
            yield from _texts(value)
    elif isinstance(config, str):
        yield config


def _targets(config: Any) -> Iterator[str]:
    if isinstance(config, dict):
        for key, value in config.items():
            if key == "_target_":
                yield str(value)
            else:
                yield from _targets(value)
    elif isinstance(config, list):
        for value in config:
            yield from _targets(value)
