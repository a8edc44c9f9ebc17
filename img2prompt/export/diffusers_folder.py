"""The white box goes back to where it came from: a pipeline of diffusers whose U-Net reads as it was trained to.

A U-Net that has learnt to say prompts makes images that are better aligned with them (Croitoru et al., Reverse Stable
Diffusion, 2023).
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from img2prompt.cache import check_free
from img2prompt.encoders.sd_unet import SDUNet, plain_config
from img2prompt.synthesis.pipeline import is_stable_diffusion, load_pipeline


def write_pipeline(encoder: SDUNet, model: str, revision: str | None, out: Path) -> int:
    """Writes the pipeline `model` into the folder `out`, with the encoder's half of the U-Net; returns how many of its
    tensors are others than before. ValueError when the halves are of different U-Nets.
    """
    pipeline = load_pipeline(model, revision)
    if not is_stable_diffusion(pipeline):
        raise ValueError(f"pipeline={model}: {type(pipeline).__name__}; Stable Diffusion 1 or 2 is needed")
    ours = encoder.facts["architecture"]
    kind = {"prediction_type": pipeline.scheduler.config.get("prediction_type", "epsilon")}
    _check(
        model, plain_config(pipeline.unet.config) | kind, ours["unet"] | {one: ours[one] for one in kind if one in ours}
    )
    factors = [vae.get("scaling_factor") for vae in (pipeline.vae.config, ours["vae"])]
    latents = (pipeline.vae.state_dict(), encoder.vae.state_dict())
    if factors[0] != factors[1] or any(
        not torch.equal(latents[0][key].float(), value.float()) for key, value in latents[1].items()
    ):
        raise ValueError(f"pipeline={model}: another VAE, whose latents the U-Net was not trained on")
    whole, half = pipeline.unet.state_dict(), encoder.unet.state_dict()
    strange = [key for key, value in half.items() if key not in whole or whole[key].shape != value.shape]
    if strange:
        raise ValueError(f"pipeline={model}: a U-Net of another architecture (it has no {strange[0]} of that shape)")
    changed = sum(not torch.equal(whole[key], value) for key, value in half.items())
    pipeline.unet.load_state_dict(whole | half)
    parts = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    needed = sum(tensor.nbytes for part in parts for tensor in part.state_dict().values())
    check_free(out, needed, "choose another out=, or free some")
    pipeline.save_pretrained(out)
    written = UNet2DConditionModel.from_pretrained(out, subfolder="unet").state_dict()
    assert all(torch.equal(written[key], value) for key, value in half.items())
    return changed


def _check(model: str, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    # What a picture's size is by default is no part of the weights.
    different = [key for key in ours if key not in ("_class_name", "sample_size") and theirs.get(key) != ours[key]]
    if different:
        told = ", ".join(f"{key} {theirs.get(key)} there, {ours[key]} in the checkpoint" for key in different[:3])
        raise ValueError(f"pipeline={model}: a U-Net of another architecture ({told})")
