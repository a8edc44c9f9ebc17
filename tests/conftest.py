"""What tests share: no network, a folder of pairs, one finished run."""

import csv
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("IMG2PROMPT_TRACEBACK", None)
# Embeddings of a run of the tests are shared by its processes, and by no other run.
_CACHE = tempfile.TemporaryDirectory(prefix="img2prompt-cache-")
os.environ["IMG2PROMPT_CACHE"] = _CACHE.name

ROOT = Path(__file__).parent.parent
TINY = (
    "encoder=timm",
    "encoder.name=test_vit",
    "encoder.image_size_px=32",
    "encoder.pretrained=false",
    "+encoder.model_kwargs.patch_size=8",
)
# Twenty composed prompts are all alike: joined at any usual threshold, nothing would be left to validate on.
ALIKE = ("data.group_threshold=null", "data.duplicate_threshold=null", "data.report_thresholds=[]")
QUICK = ("data=kaggle", "data.batch_size=8", "trainer.max_epochs=4", "trainer.accelerator=cpu", "augment=none", *ALIKE)
# What `predict` takes besides ckpt, images and out.
PREDICT = {
    "device": "cpu",
    "batch_size": 4,
    "precision": "fp32",
    "top_k": 3,
    "top_words": 4,
    "threads": 2,
    "prompts": None,
    "text_model": None,
}


@pytest.fixture(autouse=True)
def no_connections(monkeypatch):
    def refuse(self, address, *args):
        raise AssertionError(f"a test tried to connect to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="session")
def pairs_folder(tmp_path_factory) -> Path:
    """Forty drawings of twenty prompts in the layout of data=kaggle."""
    from img2prompt.data.drawings import Drawings
    from img2prompt.synthesis.procedural import Procedural
    from img2prompt.training.pairs import write_pairs

    folder = tmp_path_factory.mktemp("pairs")
    source = Drawings(count=40, images_per_prompt=2, seed=0, generator=Procedural(32))
    write_pairs(source.find().samples, folder)
    return folder


def settings_of(*overrides: str) -> dict:
    """The settings of `train` with overrides, as the command composes them."""
    from img2prompt.commands.settings import compose

    return compose("train", list(overrides))


@pytest.fixture(scope="session")
def train_here(pairs_folder):
    """Trains in this process: (folder, *overrides) -> validation cosine."""
    from img2prompt.commands.train import train

    def run(folder: Path, *overrides: str):
        return train(settings_of(*QUICK, *TINY, f"data.root={pairs_folder}", *overrides), folder)

    return run


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, train_here) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "finished"
    train_here(folder)
    return folder


@pytest.fixture
def unfinished(tmp_path, finished_run) -> Path:
    """A run that has climbed its rungs, and was killed before it said so."""
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    (run / "summary.json").unlink()
    return run


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """A tiny Stable Diffusion 1, and the CLIP that it reads."""
    from tiny_diffusion import tiny_clip, tiny_stable_diffusion_1

    folder = tmp_path_factory.mktemp("sdipc")
    pipeline = tiny_stable_diffusion_1(folder / "diffusion")
    return pipeline, tiny_clip(folder / "clip", pipeline)


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Three pictures of other sizes."""
    import numpy as np
    from PIL import Image

    folder, drawn = tmp_path / "pictures", np.random.default_rng(0)
    folder.mkdir()
    for name, size in (("a", (40, 50)), ("b", (32, 32)), ("c", (90, 30))):
        Image.fromarray(drawn.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="session")
def door():
    """Runs a door as a user does, in a process that can open no connection: (*arguments, cwd=…) -> result."""

    def run(*arguments: str, cwd: Path, stdin: str | None = None, **environment: str):
        env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'offline'}", **environment}
        program = ROOT / arguments[0]
        return subprocess.run(
            [sys.executable, str(program), *arguments[1:]],
            cwd=cwd,
            env=env,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
