"""The checkpoint as it is, in a folder that can be given to others: img2prompt opens it, from the Hub as well."""

from pathlib import Path

from img2prompt.files import link_or_copy
from img2prompt.provenance import MODEL


def write_safetensors(checkpoint: Path, folder: Path) -> None:
    link_or_copy(checkpoint, folder / MODEL)
