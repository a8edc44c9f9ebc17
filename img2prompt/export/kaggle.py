"""`format=kaggle`: a folder that makes a submission where there is no network: weights, code, wheels and a notebook.

All its files lie side by side, because Kaggle's uploads leave folders out unless they are told not to.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from packaging.utils import canonicalize_name

from img2prompt.export.check import Agreement
from img2prompt.export.install import LIST, fits, here
from img2prompt.export.isolation import needed_of
from img2prompt.export.notebook import write_notebook
from img2prompt.export.own_code import modules_of, others_of, write_own_wheel
from img2prompt.export.wheels import closure_of, fetched, repacked, tags_of
from img2prompt.predictors.predictor import Item
from img2prompt.provenance import MODEL
from img2prompt.regressor import Header, read_header
from img2prompt.submission import DIMENSION

# What Kaggle's machines have; all that these require is there as well.
GIVEN = ("torch", "torchvision", "numpy", "pillow")
_FAMILIES = {
    "img2prompt.encoders.timm_model.Timm": "timm",
    "img2prompt.encoders.openclip.OpenCLIP": "openclip",
    "img2prompt.encoders.huggingface.HuggingFace": "huggingface",
}
_ROOTS = ("img2prompt.export.competition", "img2prompt.export.install", "img2prompt.heads")
_MODEL = "all-MiniLM-L6-v2"
_MACHINE = "x86_64"  # Kaggle's
_OLDEST = (3, 11)


def write_kaggle(
    checkpoint: Path, folder: Path, python: str | None, items: Sequence[Item], of: str
) -> tuple[list[str], Agreement]:
    """Fills the empty `folder` for the model of `checkpoint`; returns lines for people (what is in it, what it cannot
    know) and how far what it submits of `items`, called `of`, is what the checkpoint predicts.

    `python` (such as 3.12) is that of Kaggle's machines, where it is known to differ from this one: the few packages
    that are compiled for one Python are then fetched for it from the package index. ValueError, before anything is
    written, for a checkpoint whose encoder cannot go along, or that does not predict what the competition asks for.
    """
    header = read_header(checkpoint)
    _check(header, checkpoint)
    wanted = _parsed(python)
    modules = modules_of([*_ROOTS, header.encoder["_target_"].rpartition(".")[0]])
    given, imported = closure_of(GIVEN), _distributions_of(others_of(modules))
    visible = {**closure_of(imported), **given}
    for name in imported:
        if canonicalize_name(name) not in given:
            tags_of(metadata.distribution(name))
    ours = write_own_wheel(modules, folder)
    needed, found = needed_of(visible, given, ours, checkpoint, items, of)
    wheels, bound = [("img2prompt-kaggle", metadata.version("img2prompt"), ours)], []
    for one in needed.values():
        wheel = repacked(one, folder)
        if not fits(wheel.name, wanted, _MACHINE):
            wheel.unlink()
            wheel = fetched(one.name, one.version, wanted, folder)
        wheels.append((one.name, one.version, wheel))
        if not fits(wheel.name, (wanted[0], wanted[1] + 1), _MACHINE):
            bound.append(f"{one.name} {one.version}")
    listed = [
        {"name": name, "version": version, "file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for name, version, path in wheels
    ]
    (folder / LIST).write_text(json.dumps({"wheels": listed}, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(checkpoint, folder / MODEL)
    encoder = str(header.encoder.get("name"))
    write_notebook(folder / "submission.ipynb", f"Image to prompts, by {encoder}", "Exported by img2prompt.")
    return _lines(header, wheels, bound, wanted), found


def _check(header: Header, checkpoint: Path) -> None:
    if header.encoder.get("_target_") not in _FAMILIES:
        name = str(header.encoder.get("_target_")).rpartition(".")[2]
        raise ValueError(
            f"format=kaggle: the encoder of {checkpoint} is {name}, which needs more than fits beside it; it can be "
            f"{', '.join(_FAMILIES.values())}"
        )
    if header.target.dimension != DIMENSION:
        raise ValueError(
            f"format=kaggle: {checkpoint} predicts {header.target.dimension} numbers of {header.target.model}, and the "
            f"competition asks for the {DIMENSION} of {_MODEL}; train with its target (target.model), the default"
        )


def _parsed(python: str | None) -> tuple[int, int]:
    if python is None:
        return here()
    found = re.fullmatch(r"3\.(\d{1,2})", python)
    if found is None or (3, int(found[1])) < _OLDEST:
        raise ValueError(
            f"python={python}: must be 3.11 or later, such as 3.12, as Kaggle's `python --version` says it"
        )
    return 3, int(found[1])


def _distributions_of(names: set[str]) -> set[str]:
    """The installed packages that these are imported from."""
    known = metadata.packages_distributions()
    for name in sorted(names):
        if name not in known:
            raise ValueError(
                f"{name} is imported by the model, and no installed package has it; install it from a wheel"
            )
    return {one for name in names for one in known[name]}


def _lines(header: Header, wheels: list[tuple[str, str, Path]], bound: list[str], python: tuple[int, int]) -> list[str]:
    size_mb = sum(path.stat().st_size for _, _, path in wheels) / 1e6
    names = ", ".join(f"{name} {version}" for name, version, _ in wheels)
    number = f"{python[0]}.{python[1]}"
    lines = [
        "submission.ipynb writes the competition's file from model.safetensors, offline, in fp16 on a GPU",
        f"{len(wheels)} wheels ({size_mb:.1f} MB): {names}; torch, torchvision, numpy and Pillow are Kaggle's own",
    ]
    if bound:
        lines.append(
            f"{' and '.join(bound)}: compiled for Python {number}; where Kaggle's is another, the notebook says so and "
            "uses what is installed there, or export again with python=3.x, its version"
        )
    if _MODEL not in header.target.model:
        lines.append(f"the target is {header.target.model}; the competition is scored by {_MODEL}")
    return lines
