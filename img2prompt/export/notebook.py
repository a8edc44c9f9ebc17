"""The notebook of `format=kaggle`: few cells, of which each says in its first line what it does."""

import json
from pathlib import Path

from img2prompt.export.install import LIST

_ABOUT = """\
# {title}

{about} Attach the dataset that this notebook came with and the data of *Stable Diffusion - Image to Prompts*, choose a
GPU, switch the internet off, and run all cells. `submission.csv` is validated before it is there."""

_PATHS = """\
# Where everything is: below /kaggle/input, unless the environment says otherwise.
import os
from pathlib import Path


def found(key, pattern):
    paths = [Path(os.environ[key])] if key in os.environ else sorted(Path("/kaggle/input").rglob(pattern))
    if len(paths) != 1:
        raise ValueError(f"{len(paths)} of {pattern} below /kaggle/input, one is needed: attach it, or set {key}")
    return paths[0]


FOLDER = found("IMG2PROMPT_LIST", "LIST_NAME").parent
IMAGES = found("IMG2PROMPT_IMAGES", "stable-diffusion-image-to-prompts/images")
SAMPLE = IMAGES.parent / "sample_submission.csv"
OUT = Path(os.environ.get("IMG2PROMPT_OUT", "submission.csv"))"""

_INSTALL = """\
# Installs the wheels of the folder beside what is here, in a place of their own: pip --no-index --no-deps.
import subprocess
import sys
import tempfile


def run(path, module, *arguments):
    paths = [str(path), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", module, *map(str, arguments)]
    told = subprocess.PIPE, subprocess.STDOUT
    with subprocess.Popen(command, env=environment, stdout=told[0], stderr=told[1], text=True) as process:
        for line in process.stdout:
            print(line, end="")
    if process.returncode:
        raise RuntimeError(f"{module} stopped; the lines above say why")


SITE = Path(tempfile.mkdtemp())
run(next(FOLDER.glob("img2prompt_kaggle-*.whl")), "img2prompt.export.install", FOLDER, SITE)"""

_SUBMIT = """\
# Predicts every image, in fp16 on a GPU, and writes the submission.
run(SITE, "img2prompt.export.competition", FOLDER / "model.safetensors", IMAGES, SAMPLE, OUT)"""

_SHOW = """\
# Shows how it begins.
with OUT.open() as file:
    print(*(next(file).rstrip() for _ in range(4)), sep="\\n")"""


def write_notebook(path: Path, title: str, about: str) -> None:
    """Writes the notebook (nbformat 4.5)."""
    texts = [_PATHS.replace("LIST_NAME", LIST), _INSTALL, _SUBMIT, _SHOW]
    cells = [_cell(0, "markdown", _ABOUT.format(title=title, about=about))]
    for number, text in enumerate(texts, start=1):
        cells.append({**_cell(number, "code", text), "execution_count": None, "outputs": []})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=True) + "\n", encoding="utf-8")


def _cell(number: int, kind: str, text: str) -> dict[str, object]:
    return {"id": f"cell-{number}", "cell_type": kind, "metadata": {}, "source": text.splitlines(keepends=True)}
