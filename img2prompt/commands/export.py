"""`export`: a trained model as other tools open it."""

import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from img2prompt.commands.settings import compose, did_you_mean
from img2prompt.hub import REPOSITORY, describe

FORMATS = ("sentence_transformers", "timm", "onnx", "safetensors", "kaggle", "diffusers")

# Keys that only one format has.
_OF = {"int8": "onnx", "text_model": "sentence_transformers", "python": "kaggle"}
_OF |= {"pipeline": "diffusers", "revision": "diffusers"}


def main(arguments: list[str]) -> None:
    export(**compose("export", arguments))


def export(
    ckpt: str,
    format: str,
    out: str,
    images: str | None = None,
    int8: bool = False,
    text_model: str | None = None,
    python: str | None = None,
    pipeline: str | None = None,
    revision: str | None = None,
    push: str | None = None,
    private: bool = True,
) -> None:
    """Writes the model of `ckpt` to the new folder `out`. ValueError says what is wrong."""
    given = {"int8": int8, "text_model": text_model, "python": python, "pipeline": pipeline, "revision": revision}
    _check(format, out, given, images, push, private)
    print(f"{ckpt}: to {format}", file=sys.stderr, flush=True)
    # Seconds of imports.
    from img2prompt.data.targets import TextModel, locate
    from img2prompt.export.make import Options, make_export
    from img2prompt.export.push import push_folder
    from img2prompt.provenance import OURS, checkpoint_of, header_of, located
    from img2prompt.regressor import BLIND

    checkpoint = checkpoint_of(Path(located(ckpt)))
    header = header_of(checkpoint)
    if header.encoder.get("_target_") == BLIND:
        raise ValueError(
            f"ckpt={ckpt}: its best rung is the mean, which has no encoder; give another, such as "
            f"{checkpoint.with_name('finetune.safetensors')}"
        )
    if push is not None and format in OURS:
        # Its weights are the checkpoint's file, header and all.
        paths = [one for one in (header.target.model, header.encoder.get("name")) if one and Path(one).is_absolute()]
        if paths:
            raise ValueError(f"push={push}: the checkpoint's header names {paths[0]}, a folder of this machine")
    text: TextModel | None = None
    if format == "sentence_transformers":
        named = (header.target.model, header.target.revision) if text_model is None else (text_model, None)
        text = locate(*named)
        if text.download is not None:
            print(f"downloading {describe(text.download)}", file=sys.stderr)
    options = Options(images, int8, python, text, pipeline, revision, push)
    for line in make_export(checkpoint, header, format, Path(out), options):
        print(line)
    print(f"{out}: {format}, of {checkpoint}")
    if format == "kaggle":
        print("\nupload the folder as a dataset of Kaggle, and run its submission.ipynb there")
    elif format == "diffusers":
        print(f"\nmake pairs with it:\n  img2prompt synthesize generator.model={shlex.quote(out)} prompts=… out=…")
    else:
        print(f"\npredict with it:\n  python predict.py ckpt={shlex.quote(out)} images=… out=predictions.parquet")
    if push is not None:
        print(f"pushed: {push_folder(Path(out), push, private)}")


def _check(
    format: str, out: str, given: Mapping[str, Any], images: str | None, push: str | None, private: bool
) -> None:
    if format not in FORMATS:
        raise ValueError(
            f"format={format}: no such format{did_you_mean(format, [*FORMATS])}; formats: {', '.join(FORMATS)}"
        )
    for key, value in given.items():
        if value and format != _OF[key]:
            told = "true" if value is True else value
            raise ValueError(f"{key}={told}: is of format={_OF[key]}, and without effect on format={format}")
    if images is not None and format == "diffusers":
        raise ValueError(f"images={images}: without effect on format=diffusers, whose tensors are compared")
    if not private and push is None:
        raise ValueError("private=false: is for push=user/name, and without effect alone")
    if given["int8"] and images is None:
        raise ValueError("int8=true needs images=DIR: how much it costs depends on the images")
    if os.path.lexists(out):
        raise ValueError(f"out={out}: is there already and is kept; give another name, or remove it")
    if push is not None and not REPOSITORY.fullmatch(push):
        raise ValueError(f"push={push}: must be user/name")
