"""A tiny Stable Diffusion 1, the CLIP that it reads, and some pictures."""

import numpy as np
import pytest
from PIL import Image
from tiny_diffusion import tiny_clip, tiny_stable_diffusion_1


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdipc")
    pipeline = tiny_stable_diffusion_1(folder / "diffusion")
    return pipeline, tiny_clip(folder / "clip", pipeline)


@pytest.fixture
def pictures(tmp_path):
    """Three pictures of other sizes."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    drawn = np.random.default_rng(0)
    for name, size in (("a", (40, 50)), ("b", (32, 32)), ("c", (90, 30))):
        Image.fromarray(drawn.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    return folder
