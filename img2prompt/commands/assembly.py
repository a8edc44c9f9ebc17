"""From settings to the objects of a run. No file beyond this folder sees a setting's key."""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from lightning import Callback, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy

from img2prompt import ranks
from img2prompt.build import build
from img2prompt.cache import cache_folder
from img2prompt.commands import checks
from img2prompt.commands.earlier import earlier_runs
from img2prompt.commands.synthesis import made_for
from img2prompt.commands.table import Table, find_table, settle
from img2prompt.data.pixels import Pixels
from img2prompt.data.sample import Sample
from img2prompt.data.split import Earlier
from img2prompt.data.targets import TextModel, locate
from img2prompt.encoders.encoder import Encoder, load_strictly
from img2prompt.losses import Loss
from img2prompt.predictors.trained import pick_device
from img2prompt.provenance import checkpoint_of
from img2prompt.regressor import Regressor, Target, build_regressor, load_regressor, outline, read_header
from img2prompt.training.augment import Augment
from img2prompt.training.curriculum import USED, Curriculum
from img2prompt.training.finetune import FineTune
from img2prompt.training.loop import Loop, seconds_of
from img2prompt.training.optim import AdamW
from img2prompt.training.pairs import Rows
from img2prompt.training.plan import Plan
from img2prompt.training.resume import check_unchanged, check_words
from img2prompt.training.stages import Stage, Start

VOCABULARY = "vocabulary.txt"
ACCELERATORS = ("auto", "cpu", "cuda", "gpu", "mps")
PRECISIONS = ("auto", "32-true", "bf16-mixed")
# Names that files among the checkpoints have for other reasons.
_TAKEN = ("best", "soup", "uniform", "wise")


@dataclass
class Recipe:
    """What trains, apart from model and data."""

    loss: Loss
    optim: AdamW
    augment: Augment
    loop: Loop
    stages: list[Stage]
    curriculum: Curriculum
    loggers: list[Logger]


@dataclass
class Prepared:
    """A run before its data are found: everything that can be wrong with its settings has been."""

    text_model: TextModel
    encoder: Encoder
    recipe: Recipe
    plan: Plan


def prepare(settings: dict[str, Any], folder: Path) -> Prepared:
    """Builds what needs no data."""
    checks.check_data(settings["data"])
    device, precision = device_and_precision(settings["trainer"])
    devices = settings["trainer"]["devices"]
    if settings["data"]["batch_size"] % devices:
        raise ValueError(
            f"data.batch_size={settings['data']['batch_size']} cannot be divided among trainer.devices={devices}: it "
            "counts the images of all devices together; choose a multiple"
        )
    text_model = locate(settings["target"]["model"], settings["target"]["revision"])
    built = encoder(settings["encoder"])
    checks.check_origin(settings, built, text_model)
    parts = recipe(settings, folder)
    for stage in parts.stages:
        stage.check(built)
    start = None if settings["init_from"] is not None else settings["encoder"]["pretrained"]
    begun = (folder / USED).is_file()
    checks.check_curriculum(parts.curriculum, parts.stages, paced(parts.stages), built, start, begun)
    checks.check_vocabulary(settings["head"], parts.loss)
    checks.check_batches(parts.augment, parts.loss, built, settings["data"]["batch_size"])
    if parts.loop.activation_checkpointing:
        built.checkpoint_activations()
    if parts.loop.compile and not built.block_modules():
        raise ValueError(f"trainer.compile=true: {settings['encoder']['name']} has no blocks to compile")
    return Prepared(text_model, built, parts, plan(settings, folder, text_model, built, parts, device, precision))


def table(settings: dict[str, Any]) -> Table:
    """What the sources hold, pairs that are made for this run among them."""
    found = find_table(settings["data"], made_for(settings))
    if settings["data"]["cache"] == "disk":
        for sample in {id(sample.source): sample for sample in found.samples + found.validation}.values():
            sample.source.stamp(sample.location)
    return found


def recipe(settings: dict[str, Any], folder: Path) -> Recipe:
    """Built before anything is decoded, so that what is wrong with it costs nothing."""
    outline(settings["head"])
    loggers = [instantiate(node, save_dir=str(folder)) for node in settings["logger"].values()]
    stages: list[Stage] = []
    for name, node in settings["stages"].items():
        if node is not None:
            if name in _TAKEN or not re.fullmatch(r"[a-z][a-z0-9_]*", name):
                raise ValueError(f"stages.{name}: checkpoints/{name}.safetensors is another file; give another name")
            stages.append(instantiate(node))
            stages[-1].name = name
    if not stages:
        raise ValueError("stages: no rung is left to climb")
    if (one := paced(stages)) is not None:
        one.has_curriculum = True
    return Recipe(
        instantiate(settings["loss"]),
        instantiate(settings["optim"]),
        instantiate(settings["augment"]),
        loop(settings["trainer"]),
        stages,
        instantiate(settings["curriculum"]),
        loggers,
    )


def paced(stages: Sequence[Stage]) -> FineTune | None:
    """The stage that a curriculum is of: the fine-tune or, without one, the probe."""
    named = {stage.name: stage for stage in stages if isinstance(stage, FineTune)}
    return named.get("finetune", named.get("probe"))


def loop(trainer: dict[str, Any]) -> Loop:
    own = {field.name: trainer[field.name] for field in fields(Loop) if field.name in trainer}
    limit = trainer["max_time"]
    return Loop(**own, deadline=None if limit is None else time.monotonic() + seconds_of(limit))


def rows(
    settings: dict[str, Any], table: Table, embed: Callable[[list[str]], np.ndarray], device: str, folder: Path
) -> tuple[Rows, Earlier | None]:
    """Embeds the prompts, drops near duplicates, and splits. ValueError when a run that goes on has other rows."""
    earlier = earlier_runs(settings, folder, embed)
    # Only CUDA searches faster than the CPU does, with all that the search needs.
    found = settle(settings["data"], table, embed, device if device == "cuda" else "cpu", earlier)
    check_unchanged(folder, found)
    return found, earlier


def vocabulary(settings: dict[str, Any], rows: Rows, folder: Path) -> list[str]:
    """The words that the head is to say: of the run that goes on or that this one starts from, else of the training
    prompts; none for other heads.
    """
    size = outline(settings["head"]).vocabulary_size
    if not size:
        return []
    if settings["head"].get("vocabulary"):
        raise ValueError("head.vocabulary: is found in the training prompts; leave it out")
    if (folder / VOCABULARY).is_file():
        words = (folder / VOCABULARY).read_text(encoding="utf-8").split("\n")[:-1]
        check_words(folder, words)
        return words
    if settings["init_from"] is not None:
        return list(read_header(checkpoint_of(Path(settings["init_from"]))).head["vocabulary"])
    from img2prompt.data.vocabulary import vocabulary_of

    held = rows.validates
    words = vocabulary_of((sample.prompt for sample, out in zip(rows.samples, held, strict=True) if not out), size)
    check_words(folder, words)
    return words


def start(settings: dict[str, Any], rows: Rows, encoder: Encoder) -> Start:
    brings_head = settings["init_from"] is not None
    given = settings["encoder"]["pretrained"]
    pretrained = bool(given) or brings_head
    no_text = encoder.text_refusal(given if isinstance(given, str) else None) if pretrained else None
    epoch_pairs = rows.draws(np.flatnonzero(~rows.validates)).count
    images_per_step = settings["data"]["batch_size"] * settings["trainer"]["accumulate_grad_batches"]
    head = outline(settings["head"])
    known = epoch_pairs, images_per_step, head.is_affine, head.reads_tokens, no_text
    return Start(pretrained, brings_head, *known, settings["curriculum"]["stages"])


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


def pixels(
    settings: dict[str, Any], samples: Sequence[Sample], encoder: Encoder, image_size_px: int | None = None
) -> tuple[Pixels, str]:
    """The pixels of the samples as the encoder wants them, or of another size, and where they are kept."""
    data, want = settings["data"], encoder.preprocessing
    size_px = image_size_px or want.image_size_px
    folder = cache_folder(settings["cache_dir"]) if data["cache"] == "disk" else None
    devices = settings["trainer"]["devices"]
    keep_gib = data["cache_gib"] if data["cache"] == "ram" else -1.0
    # Each device's process keeps all of them.
    each = keep_gib / devices
    built = Pixels(samples, size_px, want.interpolation, want.resize_mode, each, data["threads"], folder)
    gib = f"{built.gib:.2f} GiB" if devices == 1 or folder else f"{devices} x {built.gib:.2f} GiB"
    if folder is not None:
        return built, f"{gib} on disk in {folder}"
    if built.keeps:
        return built, f"{gib} in memory"
    more = f" ({gib} are more than data.cache_gib={keep_gib:g})" if keep_gib >= 0 else ""
    return built, f"decoded in every epoch{more}"


def plan(
    settings: dict[str, Any],
    folder: Path,
    text_model: TextModel,
    encoder: Encoder,
    recipe: Recipe,
    device: str,
    precision: str,
) -> Plan:
    """What the run will do, as far as it is known before its prompts are embedded."""
    init_from, pretrained = settings["init_from"], settings["encoder"]["pretrained"]
    downloads = [text_model.download]
    if init_from is not None:
        origin = f"from {init_from}"
    elif isinstance(pretrained, str):
        origin = f"pretrained weights of {pretrained}"
    elif pretrained:
        origin = "pretrained weights of the Hub" if encoder.downloads() else "its pretrained weights"
        downloads += encoder.downloads()
    else:
        origin = "from scratch"
    return Plan(
        encoder=encoder,
        origin=origin,
        lr=recipe.optim.peak_lr(bool(pretrained) or init_from is not None),
        device=device,
        precision=precision,
        target=f"{text_model.name}, {settings['target']['precision']}",
        folder=folder,
        downloads=[file for file in downloads if file is not None],
        devices=settings["trainer"]["devices"],
    )


def regressor(settings: dict[str, Any], encoder: Encoder, target: Target, vocabulary: Sequence[str]) -> Regressor:
    """Encoder and head, with the weights of init_from where it is given."""
    known = {"vocabulary": list(vocabulary)} if vocabulary else {}
    built = build_regressor(encoder, {**settings["head"], **known}, target)
    if settings["init_from"] is not None:
        path = checkpoint_of(Path(settings["init_from"]))
        given = load_regressor(path)
        if given.target.dimension != target.dimension:
            raise ValueError(
                f"init_from={path}: its embeddings have {given.target.dimension} numbers, this run's {target.dimension}"
            )
        given.encoder.set_image_size(encoder.preprocessing.image_size_px)
        load_strictly(built, given.state_dict(), f"init_from={path}")
    return built


def trainer(settings: dict[str, Any], plan: Plan, callbacks: list[Callback], loggers: list[Logger]) -> Trainer:
    """Lightning's Trainer for one stage; scoring, checkpoints and progress are ours."""
    precision: Any = plan.precision
    return Trainer(
        accelerator={"cuda": "gpu"}.get(plan.device, plan.device),
        devices=ranks.count(),
        # The processes are there already, and in a process group: Lightning starts none.
        strategy=_together() if ranks.count() > 1 else "auto",
        precision=precision,
        max_epochs=1,  # one pass over all the batches of the stage, however many epochs these are
        accumulate_grad_batches=settings["accumulate_grad_batches"],
        logger=loggers,
        callbacks=callbacks,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,  # or it warns of runs with fewer than fifty
        use_distributed_sampler=False,
        default_root_dir=plan.folder,
    )


def _together() -> DDPStrategy:
    # Gradients stay where they are averaged, or there would be two of each.
    return DDPStrategy(cluster_environment=TorchElasticEnvironment(), gradient_as_bucket_view=True)


def device_and_precision(trainer: dict[str, Any]) -> tuple[str, str]:
    """What the run works on, and in which precision; ValueError for what is not there."""
    devices = trainer["devices"]
    if devices < 1:
        raise ValueError(f"trainer.devices must be at least 1, got {devices}")
    if trainer["precision"] not in PRECISIONS:
        raise ValueError(f"trainer.precision={trainer['precision']}: must be one of {', '.join(PRECISIONS)}")
    if trainer["accelerator"] not in ACCELERATORS:
        raise ValueError(f"trainer.accelerator={trainer['accelerator']}: must be one of {', '.join(ACCELERATORS)}")
    device = pick_device({"gpu": "cuda"}.get(trainer["accelerator"], trainer["accelerator"]))
    if device == "cuda" and devices > torch.cuda.device_count():
        raise ValueError(f"trainer.devices={devices}: this machine has {torch.cuda.device_count()} GPUs")
    if device not in ("cuda", "cpu") and devices > 1:
        raise ValueError(f"trainer.devices={devices}: {device} is one device; use 1")
    if device == "cuda" and ranks.number():
        torch.cuda.set_device(ranks.number())
    if trainer["precision"] != "auto":
        return device, trainer["precision"]
    has_bf16 = device == "cuda" and torch.cuda.is_bf16_supported()
    return device, "bf16-mixed" if has_bf16 else "32-true"
