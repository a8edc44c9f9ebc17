"""A model is used where only some of the installed packages can be seen, and it turns out which of them it needs.

What a package requires is more than what it imports: of 16 packages that timm requires, directly or not, a prediction
imports half.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import numpy as np
from PIL import Image

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


def needed_of(visible: Mapping[str, metadata.Distribution], code: Path, weights: Path) -> set[str]:
    """Those of the `visible` packages that a prediction by the checkpoint `weights` needs; `code` has our modules.

    ValueError where they are not enough.
    """
    with tempfile.TemporaryDirectory(prefix="img2prompt-trial-") as temporary:
        place = Path(temporary)
        site, images, told = place / "site", place / "images", place / "told.json"
        owners = _linked(visible, site)
        images.mkdir()
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(images / "black.png")
        arguments = [site, code, weights.absolute(), images, place / "submission.csv", told]
        done = subprocess.run(
            # -I and -S: neither the environment nor what is installed adds a path.
            [sys.executable, "-I", "-S", "-c", _PROGRAM, *map(str, arguments)],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise ValueError(
                f"{weights}: beside torch and the packages that it requires, its prediction wants more than "
                f"{', '.join(visible)}: {' '.join(done.stderr.splitlines()[-1:])}"
            )
        answer = json.loads(told.read_text())
    known = {one.name: key for key, one in visible.items()}
    return {key for top in answer["tops"] for key in owners[top]} | {known[name] for name in answer["asked"]}


def _linked(visible: Mapping[str, metadata.Distribution], site: Path) -> dict[str, set[str]]:
    """Makes `site` a folder that has these packages alone; returns whose each of its entries is."""
    site.mkdir()
    owners: dict[str, set[str]] = {}
    for key, distribution in visible.items():
        for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            if top not in owners:
                (site / top).symlink_to(Path(str(distribution.locate_file(top))).absolute())
            owners.setdefault(top, set()).add(key)
    return owners
