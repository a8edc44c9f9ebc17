"""`train`: composes the configuration, prints the plan, climbs the ladder, and says what came of it."""

import logging
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning import Callback, Trainer
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from img2prompt.bank import write_bank
from img2prompt.build import build
from img2prompt.commands.door import checked, conf_folder
from img2prompt.data.pixels import Pixels
from img2prompt.data.sample import Found, Sample
from img2prompt.data.split import split
from img2prompt.data.targets import TextEncoder, TextModel, locate
from img2prompt.encoders.encoder import Encoder
from img2prompt.files import write_json, write_table
from img2prompt.metrics import cosines
from img2prompt.predictors.trained import checkpoint_of, pick_device
from img2prompt.regressor import Regressor, Target, build_regressor, load_regressor
from img2prompt.search import nearest
from img2prompt.training.datamodule import PairData
from img2prompt.training.ladder import Rung, best_rung, climb_ladder, has_weights, table
from img2prompt.training.optim import AdamW
from img2prompt.training.pairs import load_pairs, select, write_pairs
from img2prompt.training.plan import Plan
from img2prompt.training.resume import continued
from img2prompt.training.run_folder import MetricsFile, new_run_folder, write_config
from img2prompt.training.scoring import score
from img2prompt.training.stages import Climb, Stage, Start

PRECISIONS = ("auto", "32-true", "bf16-mixed")
_HELD_OUT_IMAGES = 200
_EXAMPLES = 3


def main(arguments: list[str]) -> None:
    """Runs `train` under Hydra: once, or under -m once for each combination."""
    sys.argv = [sys.argv[0], *arguments]
    # Hydra would print tracebacks of its own and exit; errors are the door's business.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name="train")(_job)()
    except _JobFailed as failed:
        raise failed.error from failed.error.__cause__


class _JobFailed(BaseException):
    """Carries an error past Hydra, which would wrap what is an Exception."""

    def __init__(self, error: Exception) -> None:
        self.error = error


def _job(config: DictConfig) -> float | None:
    try:
        return _run(config)
    except Exception as error:
        raise _JobFailed(error) from error


def _run(config: DictConfig) -> float | None:
    settings = checked("train", OmegaConf.to_container(config, resolve=True, throw_on_missing=True))
    if settings["resume"] is None:
        return train(settings, new_run_folder(_run_dir(settings), settings["name"]))
    folder = Path(settings["resume"])
    return train(continued(folder, settings, list(HydraConfig.get().overrides.task), conf_folder()), folder)


def _run_dir(settings: dict[str, Any]) -> str | None:
    job = HydraConfig.get()
    if job.mode != RunMode.MULTIRUN:
        return settings["run_dir"]
    if settings["run_dir"] is not None:
        return str(Path(settings["run_dir"], str(job.job.num)))
    return job.runtime.output_dir


def train(settings: dict[str, Any], folder: Path) -> float | None:
    """Trains in `folder` (a new one, or one to go on in) and returns the validation cosine; None for a dry run."""
    began = time.monotonic()
    if (folder / "summary.json").is_file():
        print(f"{folder}: this run is finished; nothing to do")
        return None
    # Lightning tells again what the plan and the ladder already say.
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\).*")  # Lightning's own, with torch 2.15
    warnings.filterwarnings("ignore", r"Found \d+ module\(s\) in eval mode")  # the module sets its own mode
    torch.manual_seed(settings["seed"])
    data, target = settings["data"], settings["target"]
    source = instantiate(data["source"])
    if data["root"] is not None and source.folder is None:
        raise ValueError(f"data.root={data['root']}: data={data['name']} reads no folder; add data=kaggle")
    found: Found = source.find()
    samples = select(found, data["count"])
    validates = split(samples, data["val"], data["seed"])
    text_model = locate(target["model"], target["revision"])
    choice = dict(settings["encoder"])
    pretrained = choice.pop("pretrained")
    encoder = build(choice, Encoder)
    pixels = _pixels(data, samples, encoder)
    plan = _plan(settings, folder, found, samples, validates, text_model, encoder, pretrained, pixels)
    print("\n".join(plan.lines()), flush=True)
    if settings["dry_run"]:
        return None

    checkpoints = folder / "checkpoints"
    resumed = has_weights(folder)
    if pretrained and settings["init_from"] is None and not resumed:
        encoder.load_pretrained(pretrained if isinstance(pretrained, str) else None)
    text = TextEncoder(text_model, device=plan.device)
    with tqdm(total=len(samples), desc="pixels", unit=" images", disable=not sys.stderr.isatty()) as bar:
        pairs = load_pairs(samples, validates, pixels, text, data["batch_size"], settings["seed"], bar.update)
    # Loading a text encoder draws random numbers, and not always as many.
    torch.manual_seed(settings["seed"])
    regressor = _regressor(settings, encoder, Target(text_model.name, text_model.revision, text.dimension))
    regressor.target_mean.copy_(pairs.targets[pairs.train_rows].mean(0))
    if not (folder / "bank.parquet").is_file():
        write_config(folder, settings)
        _write_words(folder, pairs)
    metrics = MetricsFile(folder / "metrics.csv")
    climb = Climb(
        regressor.to(plan.device).to(memory_format=torch.channels_last),
        plan.start,
        pairs,
        instantiate(settings["loss"]),
        instantiate(settings["optim"]),
        instantiate(settings["augment"]),
        plan.precision.startswith("bf16"),
        checkpoints,
        lambda callbacks, loggers: _trainer(settings["trainer"], plan, folder, callbacks, loggers),
        [metrics, *(instantiate(node, save_dir=str(folder)) for node in settings["logger"].values())],
        metrics.rewind,
    )
    rungs = climb_ladder(plan.stages, climb, folder)
    summary = _summary(settings, folder, rungs, climb, time.monotonic() - began)
    write_json(folder / "summary.json", summary)
    return float(summary["val_cosine"])


def _pixels(data: dict[str, Any], samples: Sequence[Sample], encoder: Encoder) -> Pixels:
    if data["cache"] not in ("ram", "none"):
        raise ValueError(f"data.cache={data['cache']}: must be ram or none")
    want = encoder.preprocessing
    return Pixels(
        samples,
        want.image_size_px,
        want.interpolation,
        want.resize_mode,
        keep_gib=data["cache_gib"] if data["cache"] == "ram" else 0.0,
        threads=data["threads"],
    )


def _plan(
    settings: dict[str, Any],
    folder: Path,
    found: Found,
    samples: list[Sample],
    validates: Any,
    text_model: TextModel,
    encoder: Encoder,
    pretrained: bool | str,
    pixels: Pixels,
) -> Plan:
    data, trainer, init_from = settings["data"], settings["trainer"], settings["init_from"]
    if data["batch_size"] < 1:
        raise ValueError(f"data.batch_size must be at least 1, got {data['batch_size']}")
    if trainer["devices"] != 1:
        raise ValueError(f"trainer.devices={trainer['devices']}: this version trains on one device; use 1")
    device = pick_device({"gpu": "cuda"}.get(trainer["accelerator"], trainer["accelerator"]))
    if trainer["precision"] not in PRECISIONS:
        raise ValueError(f"trainer.precision={trainer['precision']}: must be one of {', '.join(PRECISIONS)}")
    has_bf16 = device == "cuda" and torch.cuda.is_bf16_supported()
    precision = trainer["precision"] if trainer["precision"] != "auto" else "bf16-mixed" if has_bf16 else "32-true"
    train_count = int((~validates).sum())
    start = Start(bool(pretrained) or init_from is not None, init_from is not None, train_count, data["batch_size"])
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
        samples=samples,
        found=found,
        validates=validates,
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


def _regressor(settings: dict[str, Any], encoder: Encoder, target: Target) -> Regressor:
    regressor = build_regressor(encoder, settings["head"], target)
    init_from = settings["init_from"]
    if init_from is None:
        return regressor
    path = checkpoint_of(Path(init_from))
    given = load_regressor(path)
    for ours, theirs, what, key in (
        (encoder.config, given.encoder.config, "encoder", "encoder"),
        (regressor.head.config, given.head.config, "head", "head"),
        (target.dimension, given.target.dimension, "target dimension", "target.model"),
        (target.model, given.target.model, "target", "target.model"),
    ):
        if ours != theirs:
            raise ValueError(f"init_from={path}: its {what} is {theirs}, this run's is {ours}; choose the same {key}")
    regressor.load_state_dict(given.state_dict())
    return regressor


def _trainer(
    trainer: dict[str, Any], plan: Plan, folder: Path, callbacks: list[Callback], loggers: list[Logger]
) -> Trainer:
    return Trainer(
        accelerator={"cuda": "gpu"}.get(plan.device, plan.device),
        devices=1,
        precision="bf16-mixed" if plan.precision == "bf16-mixed" else "32-true",
        max_epochs=1,  # one pass over all the batches of the stage, however many epochs these are
        max_time=trainer["max_time"],
        gradient_clip_val=trainer["gradient_clip_norm"],
        logger=loggers,
        callbacks=callbacks,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )


def _write_words(folder: Path, pairs: PairData) -> None:
    train = [pairs.samples[row] for row in pairs.train_rows]
    write_bank(folder / "bank.parquet", [sample.prompt for sample in train], pairs.targets[pairs.train_rows].numpy())
    held_out = [pairs.samples[row] for row in pairs.val_rows[:_HELD_OUT_IMAGES]]
    if held_out[0].source.folder is None:
        # What was drawn for this run lies nowhere else.
        write_pairs(held_out, folder / "held_out")


def _summary(settings: dict[str, Any], folder: Path, rungs: list[Rung], climb: Climb, seconds: float) -> dict[str, Any]:
    pairs, best = climb.data, best_rung(rungs)
    if best is None:
        raise ValueError("no rung of the ladder was climbed; see stages")
    checkpoint = checkpoint_of(folder)
    # From the file, as a user will have it.
    regressor = load_regressor(checkpoint).to(climb.regressor.target_mean.device)
    values, rows, predicted = score(regressor, pairs, climb.bf16)
    train_targets = pairs.targets[pairs.train_rows]
    similarity, neighbours = nearest(predicted, train_targets, 1)
    nearest_prompt = cosines(train_targets[neighbours[:, 0]], pairs.targets[rows])
    mean = next((rung.val_cosine for rung in rungs if rung.rung == "mean"), None)
    source = pairs.samples[rows[0]].source
    images = source.folder or folder / "held_out"
    print(f"\n{table(rungs)}\n\nnearest training prompt to each prediction, as the answer: {nearest_prompt.mean():.4f}")
    print("\nheld-out examples: prompt, then the nearest training prompt to its prediction (cosine)")
    for i in torch.linspace(0, len(rows) - 1, min(_EXAMPLES, len(rows))).long().tolist():
        words = pairs.samples[int(pairs.train_rows[neighbours[i, 0]])].prompt
        print(f"  {pairs.samples[rows[i]].prompt}\n    {words} ({similarity[i, 0]:.3f})")
    print(
        f"\npredict with it:\n  python predict.py ckpt={folder} images={images / 'images'} "
        f"prompts={images / 'prompts.csv'}"
    )
    if pairs.pixels.bad:
        print(f"\n{len(pairs.pixels.bad)} images were bad and left out; bad_images.csv lists them", file=sys.stderr)
        bad = [{"id": pairs.samples[row].id, "reason": reason} for row, reason in sorted(pairs.pixels.bad.items())]
        write_table(folder / "bad_images.csv", bad)
    write_table(
        folder / "timings.csv", [{"rung": rung.rung, "seconds": rung.seconds} for rung in rungs if rung.seconds]
    )
    return {
        "val_cosine": float(values.mean()),
        "val_interval": [best.low, best.high],
        "mean_baseline": mean,
        "nearest_prompt_baseline": float(nearest_prompt.mean()),
        "best_rung": best.rung,
        "checkpoint": str(checkpoint),
        "images_per_second": climb.images_per_second,
        "seed": settings["seed"],
        "train_pairs": len(pairs.train_rows),
        "val_pairs": len(rows),
        "bad_images": len(pairs.pixels.bad),
        "seconds": seconds,
    }
