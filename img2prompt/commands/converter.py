"""From settings to the pair of CLIP and Stable Diffusion that makes conditions of images."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from img2prompt.hub import PIPELINE, HubFile, describe
from img2prompt.sdipc.projector import FLOOR, NORM
from img2prompt.synthesis.weights import weights_of

USUAL = {
    "pipeline": "CompVis/stable-diffusion-v1-4",
    "revision": None,
    "clip": "openai/clip-vit-large-patch14",
    "clip_revision": None,
    "norm": NORM,
    "floor": FLOOR,
}


def models_of(options: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """Which models, and how they are used: as the options say, else as the file of a tuning does, else as usual."""
    found = {**USUAL, **{key: saved[key] for key in USUAL if saved.get(key) is not None}}
    for name, revision in (("pipeline", "revision"), ("clip", "clip_revision")):
        if options[name] is not None:
            # A revision is one of its own model.
            found[revision] = None
    found |= {key: options[key] for key in USUAL if options[key] is not None}
    if not found["floor"] >= 0:
        raise ValueError(f"floor must be at least 0, got {found['floor']}")
    # Where a folder is must not depend on where the next command is given.
    return found | {key: str(Path(found[key]).resolve()) for key in ("pipeline", "clip") if Path(found[key]).is_dir()}


def load_converter(models: Mapping[str, Any], device: str) -> Any:
    """The Converter of `models_of`, in float32; what a download costs is said first. ValueError says what is wrong."""
    # Seconds of imports, for which what is wrong with the settings need not wait.
    from img2prompt.encoders.parts import check_place
    from img2prompt.sdipc.converter import Converter, load_clip
    from img2prompt.synthesis.pipeline import is_stable_diffusion, load_pipeline

    name, revision = models["pipeline"], models["revision"]
    for key in ("pipeline", "clip"):
        check_place(key, models[key])
    for file in (_file_of_clip(models), HubFile(name, PIPELINE, revision)):
        if not Path(file.repository).is_dir():
            print(f"loading {describe(file)}", file=sys.stderr)
    pipeline = load_pipeline(name, revision, "pipeline")
    if not is_stable_diffusion(pipeline):
        raise ValueError(f"pipeline={name}: {type(pipeline).__name__}; Stable Diffusion 1 is needed")
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        part.float().to(device)
    clip = load_clip(models["clip"], models["clip_revision"]).to(device)
    converter = Converter(clip, pipeline, models["norm"], models["floor"])
    told = f"{converter.projector.rank} of {converter.projector.full} singular values are above floor={models['floor']}"
    print(told, file=sys.stderr)
    return converter


def weights_in(models: Mapping[str, Any]) -> dict[str, str | None]:
    """Which weights the two models have, after they were loaded: what is at a name may change."""
    return {
        "pipeline": weights_of(models["pipeline"], models["revision"]),
        "clip": weights_of(models["clip"], models["clip_revision"], "config.json"),
    }


def side_of(size_px: int | None, pipeline: Any) -> int:
    """The side of pictures; ValueError where the pipeline can make none of it."""
    from img2prompt.sdipc.converter import native_size_px

    side, factor = native_size_px(pipeline) if size_px is None else size_px, pipeline.vae_scale_factor
    if side < factor or side % factor:
        raise ValueError(f"size_px must be a multiple of {factor} above 0, got {size_px}")
    return side


def _file_of_clip(models: Mapping[str, Any]) -> HubFile:
    return HubFile(models["clip"], "model.safetensors", models["clip_revision"])
