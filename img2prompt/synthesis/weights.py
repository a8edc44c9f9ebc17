"""Which weights a diffusion model has: another model under the same name makes other pictures."""

import hashlib
from pathlib import Path

from img2prompt.hub import PIPELINE, HubFile, commit_of

# What is loaded of a folder, and nothing that lies beside it.
_LOADED = (".json", ".txt", ".safetensors")


def weights_of(model: str, revision: str | None) -> str | None:
    """The digest of a folder's files, or the commit of a model in the Hub's cache; None where it is not there yet."""
    if Path(model).is_dir():
        return f"folder {_digest(Path(model).resolve())}"
    return commit_of(HubFile(model, PIPELINE, revision))


def _digest(folder: Path) -> str:
    # All bytes: a model that was trained further has files of the same names and sizes.
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(folder.glob("*/*")) + [folder / PIPELINE]:
        if path.suffix in _LOADED and path.is_file():
            with path.open("rb") as file:
                digest.update(f"{path.relative_to(folder)}\0".encode() + hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()
