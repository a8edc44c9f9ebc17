"""`train`: composes the configuration, prints the plan, climbs the ladder, and says what came of it."""

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.loggers import Logger, WandbLogger
from omegaconf import DictConfig, OmegaConf

from img2prompt import ranks
from img2prompt.cache import cache_folder, check_free
from img2prompt.commands import assembly
from img2prompt.commands.arguments import typed
from img2prompt.commands.conf import conf_folder
from img2prompt.commands.earlier import split_identity
from img2prompt.commands.launch import check_started, others
from img2prompt.commands.settings import checked
from img2prompt.commands.table import embedder, progress
from img2prompt.data.pixels import Pixels
from img2prompt.data.split import Earlier
from img2prompt.files import locked, remove_temporary_files, write_json, write_text
from img2prompt.regressor import Target
from img2prompt.report.run import write_pictures, write_run_report
from img2prompt.training.checkpoint import room_bytes
from img2prompt.training.curriculum import write_records
from img2prompt.training.datamodule import PairData
from img2prompt.training.ladder import climb_ladder, has_weights, is_unfinished
from img2prompt.training.pairs import Rows, load_pairs
from img2prompt.training.plan import data_lines, found_lines
from img2prompt.training.resume import check_same_values, continued, run_to_go_on_with, words_digest
from img2prompt.training.run_folder import MetricsFile, is_finished, new_run_folder, write_config
from img2prompt.training.stages import Climb, Start
from img2prompt.training.summary import (
    summarise,
    write_bad_images,
    write_data_report,
    write_scores,
    write_trained,
    write_words,
)

# What tells a run from others of the same settings.
_OF_THIS_RUN = ("run_dir", "resume", "dry_run")


def main(arguments: list[str]) -> None:
    """Runs `train` under Hydra: once, or under -m once for each combination."""
    sweeps = any(argument in ("-m", "--multirun") for argument in arguments)
    own_folder = [argument.partition("=")[2] for argument in arguments if argument.startswith("run_dir=")]
    if sweeps and own_folder:
        arguments = [*arguments, f"hydra.sweep.dir={own_folder[-1]}"]
    sys.argv = [sys.argv[0], *arguments]
    # Hydra would print tracebacks of its own and exit; errors are the door's business.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name="train")(_job)()
    except _JobFailed as failed:
        raise failed.error from failed.error.__cause__
    # Processes that torchrun started wait for another run, also where there was none.
    ranks.join()
    ranks.from_first(None)
    ranks.leave()


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
    run_dir = _run_dir(settings)
    if ranks.started() > 1 and settings["trainer"]["devices"] == 1:
        settings["trainer"]["devices"] = ranks.started()
    given = settings["resume"]
    going_on = Path(given) if given is not None and given != "auto" else None
    if given == "auto" and HydraConfig.get().mode == RunMode.MULTIRUN and settings["run_dir"] is None:
        raise ValueError("resume=auto under -m needs run_dir=FOLDER: without it each sweep has a folder of its own")
    if given == "auto":
        going_on = run_to_go_on_with(settings["name"], run_dir)
        told = f"goes on with {going_on}" if going_on else "no unfinished run, so a new one begins"
        print(f"resume=auto: {told}", flush=True)
    if going_on is not None:
        folder = going_on
        return train(continued(folder, settings, list(HydraConfig.get().overrides.task), conf_folder()), folder)
    folder = new_run_folder(run_dir, settings["name"], make=not settings["dry_run"])
    if not settings["dry_run"]:
        # A run that is killed while it embeds or decodes is found again by it.
        write_config(folder, settings, _typed(settings))
    try:
        return train(settings, folder)
    except Exception:
        if not (folder / "data.json").exists():
            (folder / "config.yaml").unlink(missing_ok=True)
        raise
    finally:
        # Of a run that failed before its first file.
        with suppress(OSError):
            folder.rmdir()
            if run_dir is None:
                folder.parent.rmdir()


def _run_dir(settings: dict[str, Any]) -> str | None:
    job = HydraConfig.get()
    return settings["run_dir"] if job.mode != RunMode.MULTIRUN else job.runtime.output_dir


def train(settings: dict[str, Any], folder: Path) -> float | None:
    """Trains in `folder` (a new one, or one to go on in) and returns the validation cosine; None for a dry run."""
    if is_finished(folder):
        print(f"{folder}: this run is finished; nothing to do")
        return None
    _silence()
    torch.manual_seed(settings["seed"])
    devices = settings["trainer"]["devices"]
    check_started(devices)
    prepared = assembly.prepare(settings, folder)
    with others(1 if settings["dry_run"] else devices):
        return _train(settings, folder, prepared)


def _train(settings: dict[str, Any], folder: Path, prepared: assembly.Prepared) -> float | None:
    table = assembly.table(settings)
    print(
        "\n".join(found_lines(table.count, table.used, table.left_out, table.by_source()) + prepared.plan.lines()),
        flush=True,
    )
    if settings["dry_run"] and prepared.text_model.download is not None:
        print("the split and the steps are not known before the text encoder is here; a dry run downloads nothing")
        return None
    embed = embedder(settings, prepared.text_model, prepared.plan.device)
    rows, earlier = assembly.rows(settings, table, embed, prepared.plan.device, folder)
    rows.vocabulary = assembly.vocabulary(settings, rows, folder)
    start = assembly.start(settings, rows, prepared.encoder)
    pixels, kept = assembly.pixels(settings, rows.samples, prepared.encoder)
    print("\n".join(data_lines(rows, earlier.runs if earlier else (), prepared.recipe.stages, start, kept)), flush=True)
    if settings["dry_run"]:
        return None
    with locked(folder / "lock", f"{folder}: another process is training in this folder"):
        remove_temporary_files(folder)
        return _climb(settings, folder, prepared, rows, earlier, start, pixels)


def _climb(
    settings: dict[str, Any],
    folder: Path,
    prepared: assembly.Prepared,
    rows: Rows,
    earlier: Earlier | None,
    start: Start,
    pixels: Pixels,
) -> float:
    recipe = prepared.recipe
    if not has_weights(folder):
        assembly.load_weights(settings, prepared.encoder)
    ranks.join()
    ranks.from_first((settings, folder, vars(rows) | {"targets": rows.targets.numpy()}))
    with progress(len(rows.samples), "pixels", "images") as bar:
        try:
            pairs = pairs_of(settings, rows, pixels, bar.update)
        except ValueError:
            write_bad_images(folder, rows.samples, pixels)
            raise
    climb = climb_of(settings, folder, prepared, start, pairs)
    paced = assembly.paced(recipe.stages)
    trains = [pairs.samples[row] for row in pairs.train_rows]
    recipe.curriculum.check(trains, start, folder, climb.steps(paced) if paced else 0)
    regressor = climb.regressor
    has_ema = recipe.optim.ema_decay is not None
    there = sum(file.stat().st_size for file in folder.glob("checkpoints/*"))
    needed = room_bytes(regressor, has_ema, recipe.loop.keep_checkpoints, len(recipe.stages)) - there
    check_free(folder, needed, "choose another run_dir, or free some")
    if not (folder / "data.json").is_file():
        write_config(folder, settings)
        write_words(folder, pairs)
        write_data_report(folder, rows, split_identity(settings))
        write_trained(folder, rows, earlier)
        if rows.vocabulary:
            write_text(folder / assembly.VOCABULARY, "".join(f"{word}\n" for word in rows.vocabulary))
        # Last: from here on the folder can be gone on with.
        write_json(
            folder / "data.json",
            rows.fingerprint() | {"pixels": pairs.pixels.digest(), "words": words_digest(rows.vocabulary)},
        )
    else:
        check_same_values(folder, pairs)
    metrics = MetricsFile(folder / "metrics.csv")
    climb.loggers, climb.rewind = [metrics, *recipe.loggers], metrics.rewind
    rungs = climb_ladder(recipe.stages, climb, folder)
    # No further stage: what follows is the first rank's alone.
    ranks.from_first(None)
    write_bad_images(folder, rows.samples, pixels)
    if recipe.curriculum.record and not is_unfinished(rungs[-1]):
        write_records(folder, pairs)
    seconds = sum(rung.seconds or 0 for rung in rungs)
    summary, judged = summarise(folder, rungs, climb)
    # Before the run is finished: afterwards the images may be gone, and nobody scores them again.
    with _reported():
        write_scores(folder, pairs.samples, judged)
        write_pictures(folder, trains, [pairs.samples[row] for row in judged.rows])
    write_json(folder / "summary.json", summary | {"seed": settings["seed"], "seconds": seconds})
    with _reported():
        print(f"report: {write_run_report(folder)}", file=sys.stderr)
    _finish(recipe.loggers)
    return float(summary["val_cosine"])


def pairs_of(settings: dict[str, Any], rows: Rows, pixels: Pixels, advance: Callable[[int], object]) -> PairData:
    """The data of the run; ValueError when too many images are bad, or steps cannot be divided among the devices."""
    data, trainer = settings["data"], settings["trainer"]
    accumulated = trainer["accumulate_grad_batches"]
    pairs = load_pairs(
        rows, pixels, data["batch_size"], accumulated, settings["seed"], data["max_bad_fraction"], advance
    )
    if pairs.images_per_step % (accumulated * trainer["devices"]) and trainer["devices"] > 1:
        raise ValueError(
            f"an epoch has {pairs.images_per_step} images, fewer than a step, and they cannot be divided among "
            f"trainer.devices={trainer['devices']}; lower data.batch_size"
        )
    return pairs


def climb_of(
    settings: dict[str, Any], folder: Path, prepared: assembly.Prepared, start: Start, pairs: PairData
) -> Climb:
    """What the stages share, with a regressor that has climbed none of them, and without loggers."""
    plan, recipe = prepared.plan, prepared.recipe
    # What came before may have drawn random numbers, and not always as many: a cache may have been full.
    torch.manual_seed(settings["seed"])
    target = Target(prepared.text_model.name, prepared.text_model.revision, pairs.targets.shape[1])
    words = pairs.labels.vocabulary if pairs.labels is not None else []
    regressor = assembly.regressor(settings, prepared.encoder, target, words)
    regressor.target_mean.copy_(pairs.targets[pairs.train_rows].mean(0))

    def pixels_at(image_size_px: int, keep: bool) -> Pixels:
        other, _ = assembly.pixels(settings, pairs.samples, prepared.encoder, image_size_px)
        if keep:
            with progress(len(pairs.samples), f"pixels {image_size_px}", "images") as bar:
                other.fill(bar.update, shared=False)
        return other

    def text_features(prompts: list[str]) -> torch.Tensor:
        given = settings["encoder"]["pretrained"]
        with progress(len(prompts), "prompts", "prompts") as bar:
            return prepared.encoder.text_features(
                prompts, given if isinstance(given, str) else None, plan.device, bar.update
            )

    return Climb(
        regressor=regressor.to(plan.device).to(memory_format=torch.channels_last),
        start=start,
        data=pairs,
        loss=recipe.loss,
        optim=recipe.optim,
        augment=recipe.augment,
        loop=recipe.loop,
        bf16=plan.precision.startswith("bf16"),
        checkpoints=folder / "checkpoints",
        make_trainer=lambda callbacks, loggers: assembly.trainer(settings["trainer"], plan, callbacks, loggers),
        loggers=[],
        rewind=lambda step: None,
        pixels_at=pixels_at,
        text_features=text_features,
        curriculum=recipe.curriculum,
        kept_folder=None if settings["data"]["cache"] == "none" else cache_folder(settings["cache_dir"]),
    )


@contextmanager
def _reported() -> Iterator[None]:
    """What goes wrong with a report is told, and costs nobody a trained model."""
    try:
        yield
    except Exception as error:
        told = " ".join(str(error).split()) or type(error).__name__
        print(f"the report is not complete: {told}; img2prompt report run=DIR writes it again", file=sys.stderr)


def _typed(settings: dict[str, Any]) -> list[str]:
    """The arguments that make another run of these settings, in a folder of its own."""
    given = [typed(one) for one in HydraConfig.get().overrides.task]
    kept = [one for one in given if one.lstrip("+").partition("=")[0] not in _OF_THIS_RUN]
    devices = settings["trainer"]["devices"]
    if ranks.started() > 1 and not any(one.startswith("trainer.devices=") for one in kept):
        kept.append(f"trainer.devices={devices}")
    return kept


def _finish(loggers: list[Logger]) -> None:
    # wandb keeps its run open until the process ends, and the next job of a sweep would write into it.
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()


def _silence() -> None:
    # Lightning tells again what the plan and the ladder already say.
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\).*")  # Lightning's own, with torch 2.15
    warnings.filterwarnings("ignore", r"Found \d+ module\(s\) in eval mode")  # the module sets its own mode
