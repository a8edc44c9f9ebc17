"""From settings to the objects of a run. No file beyond this folder sees a setting's key."""

import re
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from lightning import Callback, Trainer
from lightning.pytorch.loggers import Logger

from img2prompt.build import build
from img2prompt.data.pixels import Pixels
from img2prompt.data.split import split
from img2prompt.data.targets import TextModel
from img2prompt.encoders.encoder import Encoder, load_strictly
from img2prompt.predictors.trained import checkpoint_of, pick_device
from img2prompt.regressor import Regressor, Target, build_regressor, load_regressor
from img2prompt.training.optim import AdamW
from img2prompt.training.pairs import Rows, select
from img2prompt.training.plan import Plan
from img2prompt.training.stages import Stage, Start

PRECISIONS = ("auto", "32-true", "bf16-mixed")
# A model may go on at another input size, where its weights allow that; all else would change what they mean.
_FREE_IN_INIT_FROM = ("image_size_px", "resize_mode")


def rows(data: dict[str, Any]) -> Rows:
    """Asks the source, selects and splits."""
    source = instantiate(data["source"])
    if data["root"] is not None and source.folder is None:
        raise ValueError(f"data.root={data['root']}: data={data['name']} reads no folder; add data=kaggle")
    found = source.find()
    samples = select(found, data["count"])
    return Rows(found, samples, split(samples, data["val"], data["seed"]))


def encoder(choice: dict[str, Any]) -> Encoder:
    """The architecture that `choice` names; `pretrained` is of no concern to it."""
    if choice["image_size_px"] is not None and choice["image_size_px"] < 1:
        raise ValueError(f"encoder.image_size_px must be at least 1, got {choice['image_size_px']}")
    return build({key: value for key, value in choice.items() if key != "pretrained"}, Encoder)


def load_weights(settings: dict[str, Any], encoder: Encoder) -> None:
    """The published weights or a file's, unless init_from brings others."""
    pretrained = settings["encoder"]["pretrained"]
    if pretrained and settings["init_from"] is None:
        encoder.load_pretrained(pretrained if isinstance(pretrained, str) else None)


def pixels(data: dict[str, Any], rows: Rows, encoder: Encoder) -> Pixels:
    if data["cache"] not in ("ram", "none"):
        raise ValueError(f"data.cache={data['cache']}: must be ram or none")
    if data["threads"] < 1:
        raise ValueError(f"data.threads must be at least 1, got {data['threads']}")
    want = encoder.preprocessing
    return Pixels(
        rows.samples,
        want.image_size_px,
        want.interpolation,
        want.resize_mode,
        keep_gib=data["cache_gib"] if data["cache"] == "ram" else 0.0,
        threads=data["threads"],
    )


def plan(
    settings: dict[str, Any], folder: Path, rows: Rows, text_model: TextModel, encoder: Encoder, pixels: Pixels
) -> Plan:
    """What the run will do, checked as far as it can be before it begins."""
    init_from, pretrained = settings["init_from"], settings["encoder"]["pretrained"]
    batch_size = settings["data"]["batch_size"]
    if batch_size < 1:
        raise ValueError(f"data.batch_size must be at least 1, got {batch_size}")
    device, precision = _device_and_precision(settings["trainer"])
    start = Start(
        bool(pretrained) or init_from is not None, init_from is not None, int((~rows.validates).sum()), batch_size
    )
    stages: list[Stage] = [instantiate(stage) for stage in settings["stages"].values() if stage is not None]
    optim: AdamW = instantiate(settings["optim"])
    downloads = [text_model.download]
    if init_from is not None:
        origin = f"from {init_from}"
    elif isinstance(pretrained, str):
        origin = f"pretrained weights of {pretrained}"
    elif pretrained:
        origin = "pretrained weights of the Hub"
        downloads.append(encoder.download())
    else:
        origin = "from scratch"
    return Plan(
        rows=rows,
        stages=stages,
        start=start,
        encoder=encoder,
        origin=origin,
        lr=optim.peak_lr(start.pretrained),
        device=device,
        precision=precision,
        pixels=f"{pixels.gib:.2f} GiB in memory" if pixels.keeps else "decoded in every epoch",
        target=text_model.name,
        folder=folder,
        downloads=[file for file in downloads if file is not None],
    )


def regressor(settings: dict[str, Any], encoder: Encoder, target: Target) -> Regressor:
    """Encoder and head, with the weights of init_from where it is given: a model of the same kind."""
    built = build_regressor(encoder, settings["head"], target)
    if settings["init_from"] is None:
        return built
    path = checkpoint_of(Path(settings["init_from"]))
    given = load_regressor(path)
    for ours, theirs, what, key in (
        (_kind(encoder.config), _kind(given.encoder.config), "encoder", "encoder"),
        (built.head.config["_target_"], given.head.config["_target_"], "head", "head"),
        (target.dimension, given.target.dimension, "target dimension", "target.model"),
        (target.model, given.target.model, "target", "target.model"),
    ):
        if ours != theirs:
            raise ValueError(f"init_from={path}: its {what} is {theirs}, this run's is {ours}; choose the same {key}")
    load_strictly(built, given.state_dict(), f"init_from={path}")
    return built


def _kind(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in _FREE_IN_INIT_FROM}


def trainer(settings: dict[str, Any], plan: Plan, callbacks: list[Callback], loggers: list[Logger]) -> Trainer:
    """Lightning's Trainer for one stage; scoring, checkpoints and progress are ours."""
    return Trainer(
        accelerator={"cuda": "gpu"}.get(plan.device, plan.device),
        devices=1,
        precision="bf16-mixed" if plan.precision == "bf16-mixed" else "32-true",
        max_epochs=1,  # one pass over all the batches of the stage, however many epochs these are
        max_time=settings["max_time"],
        gradient_clip_val=settings["gradient_clip_norm"],
        logger=loggers,
        callbacks=callbacks,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        use_distributed_sampler=False,
        default_root_dir=plan.folder,
    )


def _device_and_precision(trainer: dict[str, Any]) -> tuple[str, str]:
    if trainer["devices"] != 1:
        raise ValueError(f"trainer.devices={trainer['devices']}: this version trains on one device; use 1")
    if trainer["precision"] not in PRECISIONS:
        raise ValueError(f"trainer.precision={trainer['precision']}: must be one of {', '.join(PRECISIONS)}")
    if trainer["max_time"] is not None and not re.fullmatch(r"\d+(:\d\d){3}", trainer["max_time"]):
        raise ValueError(f"trainer.max_time={trainer['max_time']}: must be DD:HH:MM:SS")
    if (trainer["gradient_clip_norm"] or 0) < 0:
        raise ValueError(f"trainer.gradient_clip_norm={trainer['gradient_clip_norm']}: must be at least 0, or null")
    device = pick_device({"gpu": "cuda"}.get(trainer["accelerator"], trainer["accelerator"]))
    if trainer["precision"] != "auto":
        return device, trainer["precision"]
    has_bf16 = device == "cuda" and torch.cuda.is_bf16_supported()
    return device, "bf16-mixed" if has_bf16 else "32-true"
