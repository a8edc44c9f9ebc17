"""A model that has learnt something, in the hands of sentence-transformers: texts find their images."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, settings_of

from img2prompt.commands.export import export
from img2prompt.commands.train import train
from img2prompt.data.drawings import Drawings
from img2prompt.synthesis.procedural import Procedural
from img2prompt.training.pairs import write_pairs

# A small CLIP ViT from scratch, on the demo's drawings.
SMALL_CLIP = (
    "encoder=timm",
    "encoder.name=vit_xsmall_patch16_clip_224",
    "encoder.pretrained=false",
    "encoder.image_size_px=64",
    "encoder.resize_mode=shortest",
    "+encoder.model_kwargs.patch_size=8",
    "+encoder.model_kwargs.depth=3",
    "+encoder.model_kwargs.embed_dim=128",
    "+encoder.model_kwargs.num_heads=2",
)
SEARCH = """
import sys
from pathlib import Path
import numpy as np
from PIL import Image
from sentence_transformers import SentenceTransformer

model = SentenceTransformer(sys.argv[1], device="cpu")
files = sorted(Path(sys.argv[2]).glob("*.png"))
prompts = Path(sys.argv[3]).read_text().splitlines()
cosines = model.similarity(model.encode(prompts), model.encode([Image.open(file) for file in files])).numpy()
order = np.argsort(-cosines, axis=1)
ranks = [int(np.where(order[row] == row)[0][0]) for row in range(len(prompts))]
print(np.mean([rank < 10 for rank in ranks]), np.mean(ranks))
"""


@pytest.mark.slow
def test_a_text_finds_its_image_in_an_exported_demo_model(tmp_path):
    """Of 200 held-out drawings the right one is among the first ten for at least 30 % of the texts; by chance, 5 %."""
    run = tmp_path / "run"
    train(settings_of(*SMALL_CLIP, "data.count=4000", "trainer.max_epochs=8", "trainer.accelerator=cpu"), run)
    out = tmp_path / "model"
    export(str(run / "checkpoints" / "finetune.safetensors"), "sentence_transformers", str(out))
    held_out = tmp_path / "held_out"
    # Other drawings of other seeds, each prompt once.
    samples = list({sample.prompt: sample for sample in Drawings(400, 1, 977, Procedural(64)).find().samples}.values())
    write_pairs(samples[:200], held_out)
    import csv

    with (held_out / "prompts.csv").open(newline="") as file:
        prompts = {row["imgId"]: row["prompt"] for row in csv.DictReader(file)}
    listed = tmp_path / "prompts.txt"
    listed.write_text("\n".join(prompts[file.stem] for file in sorted((held_out / "images").glob("*.png"))))
    offline = {"PYTHONPATH": str(ROOT / "tests" / "offline"), "HF_HUB_OFFLINE": "1", "PATH": ""}
    found = subprocess.run(
        [sys.executable, "-c", SEARCH, str(out), str(held_out / "images"), str(listed)],
        env=offline, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-2000:]
    share, rank = map(float, found.stdout.split())
    assert len(prompts) == 200 and share >= 0.3 and rank < 60, (share, rank)
    assert np.isfinite(rank) and Path(out, "README.md").is_file()
