"""Which weights a diffusion model has: another model under the same name makes other pictures."""

import hashlib
import json
from pathlib import Path

from img2prompt.hub import PIPELINE, HubFile, commit_of

_LOADED = (".json", ".txt", ".model", ".safetensors")
# No part of what makes a picture.
_BESIDE = ("safety_checker", "feature_extractor")


def weights_of(model: str, revision: str | None, filename: str = PIPELINE) -> str | None:
    """The digest of a folder's files, or the commit of a model in the Hub's cache; None where it is not there yet. The
    model is a pipeline or, with another `filename`, one model, in whose folder that file is.
    """
    if Path(model).is_dir():
        digest = _digest(Path(model)) if filename == PIPELINE else _digest_of_files(Path(model), [Path(model)], "")
        return f"folder {digest}"
    return commit_of(HubFile(model, filename, revision))


def _digest(folder: Path) -> str:
    """Of the parts that the pipeline names, their weights, words and configurations: all bytes, because a model that
    was trained further has files of the same names and sizes. Seconds for gigabytes.
    """
    try:
        named = json.loads((folder / PIPELINE).read_text(encoding="utf-8"))
        parts = sorted(name for name, one in named.items() if isinstance(one, list) and name not in _BESIDE)
    except (OSError, ValueError, AttributeError):
        return "of no pipeline"
    told = json.dumps({name: named[name] for name in parts})
    return _digest_of_files(folder, [folder / part for part in parts], told)


def _digest_of_files(folder: Path, parts: list[Path], told: str) -> str:
    digest = hashlib.blake2b(told.encode(), digest_size=8)
    for path in sorted(path for part in parts for path in part.glob("*")):
        # Copies in half precision lie beside the others under a second name.
        if path.suffix in _LOADED and ".fp16." not in path.name:
            with path.open("rb") as file:
                digest.update(f"{path.relative_to(folder)}\0".encode() + hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()
