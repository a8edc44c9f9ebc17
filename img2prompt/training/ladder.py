"""The ladder: climbs the rungs in order, saves and scores each, and says what each further hour bought."""

import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from img2prompt import ranks
from img2prompt.data.prompts import prompt_numbers
from img2prompt.files import link_or_copy, read_table, write_table
from img2prompt.metrics import bootstrap_interval
from img2prompt.regressor import Regressor, read_header
from img2prompt.training.closed_form import Mean
from img2prompt.training.run_folder import MetricsFile
from img2prompt.training.scoring import score
from img2prompt.training.stages import Climb, Stage


@dataclass
class Rung:
    """One row of the ladder. A rung that was not climbed has a `note` that says why, and no numbers; the note of one
    that was not climbed to its end says where it stopped.
    """

    rung: str
    val_cosine: float | None = None
    low: float | None = None  # 95 % bootstrap interval of the mean
    high: float | None = None
    seconds: float | None = None
    memory_gib: float | None = None  # peak: of the rung on a GPU, else of the process so far
    note: str = ""


def climb_ladder(stages: list[Stage], climb: Climb, folder: Path) -> list[Rung]:
    """Climbs each stage, leaving checkpoints/<stage>.safetensors and ladder.csv after each; best.safetensors is the
    rung with the highest validation cosine. Rungs that ladder.csv already has are not climbed again.
    """
    rungs = _read_rungs(folder / "ladder.csv")
    if rungs and is_unfinished(rungs[-1]):
        rungs.pop()
    beyond = [stage.name for stage in stages[len(rungs) + 1 :] if _checkpoint(climb, stage.name).exists()]
    if beyond:
        # What was climbed once more would begin from other weights than these rungs did.
        raise ValueError(
            f"{folder / 'ladder.csv'}: damaged: it has {len(rungs)} rungs, and there is a checkpoint of {beyond[-1]}; "
            "start anew in another run_dir"
        )
    for rung in rungs:
        if rung.val_cosine is not None and rung.rung != Mean.name:
            path = _checkpoint(climb, rung.rung)
            climb.resize(read_header(path).encoder["image_size_px"])
            climb.regressor.load_state_dict(load_file(path))
            climb.head_is_fitted = True
    climb.steps_before = sum(climb.steps(stage) for stage in stages[: len(rungs)])
    for stage in stages[len(rungs) :]:
        for logger in climb.loggers:
            if isinstance(logger, MetricsFile):
                logger.rung = len(rungs)
        reason = stage.refusal(climb.start)
        rung = Rung(stage.name, note=f"skipped: {reason}") if reason else _climbed(stage, climb)
        rungs.append(rung)
        best = best_rung(rungs)
        if best is not None:
            # Also where it is an earlier one: a rung that was stopped may have been the best, and be so no more.
            link_or_copy(_checkpoint(climb, best.rung), _checkpoint(climb, "best"))
        # Last, so that a rung that is in the table is complete.
        write_table(folder / "ladder.csv", [asdict(one) for one in rungs])
        climb.steps_before += climb.steps(stage)
        print(_line(rung), file=sys.stderr)
        if is_unfinished(rung):
            break
    return rungs


def _checkpoint(climb: Climb, rung: str) -> Path:
    return climb.checkpoints / f"{rung}.safetensors"


def is_unfinished(rung: Rung) -> bool:
    """Whether the rung was stopped, and `resume=` goes on with it."""
    return rung.val_cosine is not None and rung.note != ""


def has_weights(folder: Path) -> bool:
    """Whether `climb_ladder` will take the encoder's weights from an earlier half of this run."""
    rungs = _read_rungs(folder / "ladder.csv")
    return any(rung.val_cosine is not None and rung.rung != Mean.name for rung in rungs)


def best_rung(rungs: list[Rung]) -> Rung | None:
    """The rung with the highest validation cosine; of equal ones the first."""
    scored = [rung for rung in rungs if rung.val_cosine is not None]
    return max(scored, key=lambda rung: rung.val_cosine or 0.0, default=None)


def table(rungs: list[Rung]) -> str:
    """The ladder for people."""
    return "\n".join(["rung       val cosine  95 % interval      seconds  peak GiB", *(_line(rung) for rung in rungs)])


def _climbed(stage: Stage, climb: Climb) -> Rung:
    began, climb.earlier_seconds, climb.unfinished = time.monotonic(), 0.0, ""
    if climb.regressor.target_mean.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    if stage.steps(climb.start):
        # Other ranks take part in its steps, from the same weights.
        ranks.from_first((stage.name, climb.regressor.encoder.preprocessing.image_size_px))
        ranks.copy_first(climb.regressor.state_dict().values())
    regressor = stage.run(climb)
    scored = score(regressor, climb.data, climb.bf16)
    values, prompts = scored.cosines, [climb.data.samples[row].prompt for row in scored.rows]
    low, high = bootstrap_interval(values, prompt_numbers(prompts))
    seconds = time.monotonic() - began + climb.earlier_seconds
    rung = Rung(stage.name, float(values.mean()), low, high, seconds, _peak_gib(regressor), climb.unfinished)
    if not stage.steps(climb.start):
        # A stage of many steps has kept its best epoch there itself.
        scores = {"val_cosine": rung.val_cosine, "rung": stage.name}
        regressor.save(climb.checkpoints / f"{stage.name}.safetensors", scores)
    return rung


def _peak_gib(regressor: Regressor) -> float:
    if regressor.target_mean.is_cuda:
        return torch.cuda.max_memory_allocated() / 2**30
    if os.name == "nt":
        return float("nan")
    import resource  # not there on Windows

    # Kilobytes on Linux, bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _line(rung: Rung) -> str:
    if rung.val_cosine is None:
        return f"{rung.rung:<10} {rung.note}"
    return (
        f"{rung.rung:<10} {rung.val_cosine:>10.4f}  {rung.low:.4f} to {rung.high:.4f}  {rung.seconds:>8.1f}"
        f"  {rung.memory_gib:>8.2f}  {rung.note}".rstrip()
    )


def _read_rungs(path: Path) -> list[Rung]:
    try:
        return [_read_rung(row) for row in read_table(path)]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: damaged ({type(error).__name__}); start anew in another run_dir") from None


def _read_rung(row: dict[str, Any]) -> Rung:
    numbers = {
        name: float(row[name]) if row[name] else None for name in ("val_cosine", "low", "high", "seconds", "memory_gib")
    }
    return Rung(row["rung"], **numbers, note=row["note"])
