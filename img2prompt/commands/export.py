"""`export`: a trained model as other tools open it."""

import os
import shlex
from pathlib import Path

from img2prompt.commands.settings import compose
from img2prompt.files import write_json
from img2prompt.predictors.trained import checkpoint_of
from img2prompt.regressor import BLIND, load_regressor, read_header

FORMATS = ("diffusers",)
_WHITE_BOX = "img2prompt.encoders.sd_unet.SDUNet"


def main(arguments: list[str]) -> None:
    export(**compose("export", arguments))


def export(ckpt: str, format: str, out: str, pipeline: str | None, revision: str | None) -> None:
    """Writes the model of `ckpt` to the new folder `out`. ValueError says what is wrong."""
    if format not in FORMATS:
        raise ValueError(f"format={format}: must be one of {', '.join(FORMATS)}")
    if os.path.lexists(out):
        raise ValueError(f"out={out}: is there already and is kept; give another name, or remove it")
    checkpoint = checkpoint_of(Path(ckpt))
    header = read_header(checkpoint)
    if header.encoder.get("_target_") == BLIND:
        raise ValueError(
            f"ckpt={ckpt}: its best rung is the mean, which has no encoder; give another, such as "
            f"{checkpoint.with_name('finetune.safetensors')}"
        )
    if header.encoder.get("_target_") != _WHITE_BOX:
        raise ValueError(
            f"format=diffusers puts the half of a U-Net back into its pipeline; the encoder of {checkpoint} is "
            f"{header.encoder.get('name') or 'none'}, and encoder=sd_unet is needed"
        )
    # Seconds of imports.
    from img2prompt.encoders.sd_unet import SDUNet
    from img2prompt.export.diffusers_folder import write_pipeline

    encoder = load_regressor(checkpoint).encoder
    assert isinstance(encoder, SDUNet)
    model = pipeline or header.encoder["name"]
    version = revision if pipeline is not None else revision or header.encoder.get("tag")
    changed = write_pipeline(encoder, model, version, Path(out))
    made_of = {"checkpoint": str(checkpoint), "pipeline": model, "revision": version, "scores": header.scores}
    write_json(Path(out) / "img2prompt.json", made_of)
    print(f"{out}: {model}, with {changed} of its U-Net's tensors as {checkpoint} has them")
    if not changed:
        finetune = checkpoint.with_name("finetune.safetensors")
        print(f"none of them is another than before: nothing of the U-Net was trained; is {finetune} meant?")
    print(f"\nmake pairs with it:\n  img2prompt synthesize generator.model={shlex.quote(out)} prompts=… out=…")
