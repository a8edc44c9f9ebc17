"""What `ckpt=` may name, and what it says about itself: a run folder, a checkpoint, a folder that `export` wrote, or an
id of the Hub where such a folder lies.

An exported folder says in provenance.json what it was made of: the facts of the checkpoint's header, the mean training
target, and how it was checked.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from img2prompt.encoders.encoder import Preprocessing
from img2prompt.files import write_json
from img2prompt.hub import REPOSITORY, HubFile, describe, is_cached
from img2prompt.regressor import Header, Target, read_header

PROVENANCE = "provenance.json"
HUB = "hf-hub:"
MODEL = "model.safetensors"
# Formats whose weights are a checkpoint of ours.
OURS = ("safetensors", "kaggle")
_INPUT_FACTS = tuple(one.name for one in fields(Preprocessing))
# What is fetched of a repository: weights as safetensors or ONNX, and plain data; nothing that can hold code.
_FETCHED = ("*.json", "*.safetensors", "*.onnx", "*.onnx.data", "*.txt", "*.model", "README.md")


@dataclass(frozen=True)
class Provenance:
    """What an exported folder was made of; `checked` says how it was compared with the checkpoint."""

    format: str
    header: Header
    target_mean: list[float]
    checkpoint_sha256: str
    options: dict[str, Any] = field(default_factory=dict)
    checked: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)

    @property
    def preprocessing(self) -> Preprocessing:
        """What the encoder wants of its images."""
        return Preprocessing(**{key: self.header.encoder[key] for key in _INPUT_FACTS})

    def write(self, folder: Path) -> None:
        write_json(folder / PROVENANCE, asdict(self))


def located(ckpt: str) -> str:
    """A path as it is; of hf-hub:user/name, or hf-hub:user/name@revision, the folder that it has been fetched to."""
    if not ckpt.startswith(HUB):
        return ckpt
    name, _, revision = ckpt.removeprefix(HUB).partition("@")
    if not REPOSITORY.fullmatch(name):
        raise ValueError(f"ckpt={ckpt}: must be hf-hub:user/name, or hf-hub:user/name@revision")
    announced = HubFile(name, PROVENANCE, revision or None)
    if not is_cached(announced):
        print(f"downloading {describe(HubFile(name, None, revision or None))}", file=sys.stderr)
    try:
        folder = huggingface_hub.snapshot_download(name, revision=revision or None, allow_patterns=list(_FETCHED))
    except (OSError, HfHubHTTPError, LocalEntryNotFoundError, HFValidationError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"ckpt={ckpt}: cannot be fetched ({type(error).__name__}: {reason})") from None
    if not (Path(folder) / PROVENANCE).is_file():
        raise ValueError(f"ckpt={ckpt}: has no {PROVENANCE}, which img2prompt export writes; it is no export of ours")
    return folder


def is_exported(path: Path) -> bool:
    """Whether it is a folder that `export` wrote."""
    return (path / PROVENANCE).is_file()


def is_foreign(path: Path) -> bool:
    """Whether it is an exported folder of another library's format."""
    return is_exported(path) and read_provenance(path).format not in OURS


def header_of(ckpt: str | Path) -> Header:
    """What a run folder, a checkpoint or an exported folder says about itself; ValueError for anything else."""
    path = Path(ckpt)
    return read_provenance(path).header if is_foreign(path) else read_header(checkpoint_of(path))


def read_provenance(folder: Path) -> Provenance:
    """What an exported folder says of itself; ValueError for one that is damaged."""
    path = folder / PROVENANCE
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        header = said["header"]
        target = Target(
            str(header["target"]["model"]), header["target"]["revision"], int(header["target"]["dimension"])
        )
        parts: Mapping[str, Any] = {
            "header": Header(dict(header["encoder"]), dict(header["head"]), target, dict(header["scores"])),
            "target_mean": [float(value) for value in said["target_mean"]],
        }
        plain = {key: said[key] for key in ("format", "checkpoint_sha256", "options", "checked", "versions")}
        found = Provenance(**parts, **plain)
        if not all(isinstance(one, dict) for one in (found.options, found.checked, found.versions)):
            raise TypeError("options, checked and versions are mappings")
        if found.format != "diffusers":
            _ = found.preprocessing
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged ({type(error).__name__}: {error})") from None
    if len(found.target_mean) != target.dimension or not np.isfinite(found.target_mean).all():
        raise ValueError(f"{path}: damaged: its mean target has not {target.dimension} finite numbers")
    return found


def checkpoint_of(path: Path) -> Path:
    """The checkpoint that `path` names: itself, of a run folder its best rung, or that of an exported folder."""
    if not path.is_dir():
        return path
    best = path / "checkpoints" / "best.safetensors"
    if best.is_file():
        return best
    if is_exported(path):
        if is_foreign(path):
            raise ValueError(f"{path}: exported for other libraries; this needs a run folder or a checkpoint")
        return path / MODEL
    state = "it has no checkpoints yet" if (path / "config.yaml").is_file() else "it is not a run folder"
    raise ValueError(
        f"{path}: {state}; expected checkpoints/best.safetensors, as train.py writes it, or what export wrote"
    )
