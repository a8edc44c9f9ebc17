"""A model is used where only some of the installed packages can be seen, and it turns out which of them it needs.

What a package requires is more than what it imports: of 16 packages that timm requires, directly or not, a prediction
imports half.
"""

import csv
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import Distribution
from pathlib import Path

import numpy as np
from jaxtyping import Float

from img2prompt.export.check import EXACT, Agreement, embeddings, of_embeddings
from img2prompt.predictors.predictor import Item
from img2prompt.predictors.trained import Trained
from img2prompt.regressor import load_regressor

_FEW = 3  # images, to find out which packages are needed

# Runs with the standard library and, of all that is installed, `site` alone. Some packages ask for the versions of
# others and want them, whether they import them or not.
_PROGRAM = """
import json, sys
from importlib import metadata
from pathlib import Path
site, code, weights, images, out, told = sys.argv[1:]
sys.path[:0] = [code, site]
asked, found = set(), metadata.Distribution.from_name
def noted(name):
    distribution = found(name)
    asked.add(distribution.name)
    return distribution
metadata.Distribution.from_name = noted
from img2prompt.export.competition import submit
submit(Path(weights), Path(images), Path(images, "none"), Path(out))
files = [Path(module.__file__) for module in sys.modules.values() if getattr(module, "__file__", None)]
tops = {file.relative_to(site).parts[0] for file in files if file.is_relative_to(site)}
Path(told).write_text(json.dumps({"asked": sorted(asked), "tops": sorted(tops)}))
"""


def needed_of(
    visible: Mapping[str, Distribution],
    given: Mapping[str, Distribution],
    code: Path,
    checkpoint: Path,
    items: Sequence[Item],
    of: str,
) -> tuple[dict[str, Distribution], Agreement]:
    """Those of the `visible` packages that a submission by a checkpoint needs beside those that are `given`; `code` has
    our modules.

    Also how far what these packages alone submit of `items`, called `of`, is what the checkpoint predicts. ValueError
    where it is not, and where even all of the visible ones are not enough.
    """
    # Their names need not be those of files.
    numbered = [replace(item, id=f"{number:02d}") for number, item in enumerate(items)]
    expected = embeddings(Trained(load_regressor(checkpoint), top_k=0, top_words=0), numbered)
    readable = [item for item in numbered if item.id in expected]
    with tempfile.TemporaryDirectory(prefix="img2prompt-trial-") as temporary:
        place = Path(temporary)
        few, images = place / "few", place / "images"
        for folder, some in ((few, readable[:_FEW]), (images, readable)):
            folder.mkdir()
            for item in some:
                (folder / f"{item.id}.png").write_bytes(item.read())
        used = _submit(visible, code, checkpoint, few, place / "first")
        needed = {key: visible[key] for key in sorted(used - given.keys())}
        _submit({**needed, **given}, code, checkpoint, images, place / "second")
        said = _embeddings(place / "second" / "submission.csv")
    found = of_embeddings(expected, said, of)
    if not found.least >= EXACT:
        raise ValueError(
            f"the export is not what {checkpoint} is, and is not kept: {found.line()}; at least {EXACT} is needed"
        )
    return needed, found


def _submit(visible: Mapping[str, Distribution], code: Path, checkpoint: Path, images: Path, place: Path) -> set[str]:
    """Submits the images, on the CPU, in a process that can see no other packages; returns those that it needed."""
    place.mkdir()
    site, out, told = place / "site", place / "submission.csv", place / "told.json"
    owners = _linked(visible, site)
    paths = (site, code, checkpoint.absolute(), images, out, told)
    done = subprocess.run(
        # -I and -S: neither the environment nor what is installed adds a path.
        [sys.executable, "-I", "-S", "-c", _PROGRAM, *map(str, paths)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise ValueError(
            f"{checkpoint}: its prediction needs more than {', '.join(visible)}, which are the packages that it "
            f"requires: {' '.join(done.stderr.splitlines()[-1:])}"
        )
    answer = json.loads(told.read_text())
    known = {one.name: key for key, one in visible.items()}
    return {key for top in answer["tops"] for key in owners[top]} | {known[name] for name in answer["asked"]}


def _embeddings(submission: Path) -> dict[str, Float[np.ndarray, " D"]]:
    values: dict[str, list[float]] = {}
    with submission.open(newline="") as file:
        for row in csv.DictReader(file):
            values.setdefault(row["imgId_eId"].rpartition("_")[0], []).append(float(row["val"]))
    return {image_id: np.array(row) for image_id, row in values.items()}


def _linked(visible: Mapping[str, Distribution], site: Path) -> dict[str, set[str]]:
    """Makes `site` a folder that has these packages alone; returns whose each of its entries is."""
    site.mkdir()
    owners: dict[str, set[str]] = {}
    for key, distribution in visible.items():
        for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            if top not in owners:
                (site / top).symlink_to(Path(str(distribution.locate_file(top))).absolute())
            owners.setdefault(top, set()).add(key)
    return owners
