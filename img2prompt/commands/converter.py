"""From settings to the pair of CLIP and Stable Diffusion that makes conditions of images."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from img2prompt.hub import PIPELINE, HubFile, describe
from img2prompt.sdipc.projector import FLOOR, NORM

USUAL = {
    "pipeline": "CompVis/stable-diffusion-v1-4",
    "revision": None,
    "clip": "openai/clip-vit-large-patch14",
    "norm": NORM,
    "floor": FLOOR,
}


def models_of(options: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """Which models, and how they are used: as the options say, else as the file of a tuning does, else as usual."""
    found = {**USUAL, **{key: saved[key] for key in USUAL if saved.get(key) is not None}}
    if options["pipeline"] is not None:
        # A revision is one of its own pipeline.
        found["revision"] = None
    return found | {key: options[key] for key in USUAL if options[key] is not None}


def load_converter(models: Mapping[str, Any], device: str) -> Any:
    """The Converter of `models_of`, in float32; what a download costs is said first. ValueError says what is wrong."""
    # Seconds of imports, for which what is wrong with the settings need not wait.
    from img2prompt.sdipc.converter import Converter, load_clip
    from img2prompt.synthesis.pipeline import load_pipeline

    name, revision = models["pipeline"], models["revision"]
    for file in (HubFile(models["clip"], "model.safetensors"), HubFile(name, PIPELINE, revision)):
        if not Path(file.repository).is_dir():
            print(f"loading {describe(file)}", file=sys.stderr)
    pipeline = load_pipeline(name, revision, "pipeline")
    if not all(hasattr(pipeline, part) for part in ("unet", "text_encoder", "tokenizer")):
        raise ValueError(f"pipeline={name}: {type(pipeline).__name__}; Stable Diffusion 1 is needed")
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        part.float().to(device)
    clip = load_clip(models["clip"], None).to(device)
    converter = Converter(clip, pipeline, models["norm"], models["floor"])
    told = f"{converter.projector.rank} of {converter.projector.full} singular values are above floor={models['floor']}"
    print(told, file=sys.stderr)
    return converter
