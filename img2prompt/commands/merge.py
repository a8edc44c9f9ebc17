"""`merge`: averages checkpoints into one, scored on validation images that none of them trained on."""

import math
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from img2prompt.commands.earlier import runs_of
from img2prompt.commands.held_out import HeldOut, held_out
from img2prompt.commands.settings import brief, compose
from img2prompt.data.prompts import prompt_numbers
from img2prompt.encoders.encoder import load_strictly
from img2prompt.merging import averaged, greedy_soup
from img2prompt.metrics import bootstrap_interval
from img2prompt.predictors.trained import pick_device
from img2prompt.provenance import checkpoint_of
from img2prompt.regressor import BLIND, Regressor, load_regressor, read_header
from img2prompt.training.scoring import score

METHODS = ("soup", "wise", "uniform")
DEVICES = ("auto", "cpu", "cuda", "mps")
# While nothing is trained these change nothing: runs that differ in them can be averaged.
_FREE = ("dropout", "drop_path")
Weights = tuple[float, ...]


def main(arguments: list[str]) -> None:
    merge(**compose("merge", arguments))


def merge(
    ckpts: str | list[Any],
    method: str,
    alpha: float | None,
    alphas: list[Any],
    run: str | None,
    out: str | None,
    device: str,
    batch_size: int | None,
    cache_dir: str | None,
) -> None:
    """Writes the average of `ckpts` to `out` and prints what each of them scores. ValueError says what is wrong."""
    _check(method, alpha, alphas, device, batch_size)
    paths = _ingredients([ckpts] if isinstance(ckpts, str) else ckpts, method)
    _check_alike(paths)
    runs = _runs(paths)
    folder = _scoring_run(run, paths, runs)
    goal = _goal(out, folder, method)
    pick_device(device)
    regressor = load_regressor(paths[0])
    held = held_out(folder, runs, regressor.encoder.preprocessing, device, batch_size, cache_dir)
    cosines_of = _scorer(paths, regressor.to(held.device).to(memory_format=torch.channels_last), held)
    names, scores = _names(paths), []
    for number, name in enumerate(names):
        scores.append(_mean(cosines_of(_uniform([number], len(paths)))))
        print(f"{name}: {scores[-1]:.4f}", file=sys.stderr)
    if max(scores) == -math.inf:
        raise ValueError(f"none of {', '.join(str(path) for path in paths)} predicts finite values; they are damaged")
    tried: dict[float, float] = {}
    if method == "wise":
        some = [0.0, 1.0, *(float(one) for one in alphas)] if alpha is None else [float(alpha)]
        tried = {one: _mean(cosines_of((1 - one, one))) for one in sorted(set(some))}
        best = max(tried, key=lambda one: tried[one])
        weights: Weights = (1 - best, best)
    else:
        numbers = list(range(len(paths)))
        if method == "soup":
            numbers = greedy_soup(scores, lambda some: _mean(cosines_of(_uniform(some, len(paths)))))
        weights = _uniform(numbers, len(paths))
    values = cosines_of(weights)
    cosine = _mean(values)
    if cosine == -math.inf:
        raise ValueError(f"method={method}: the average predicts values that are not finite; choose method=soup")
    load_strictly(regressor, averaged(paths, weights), str(goal))
    low, high = bootstrap_interval(values, prompt_numbers([sample.prompt for sample in held.data.samples]))
    made_of = {
        "method": method,
        "runs": [_relative(one, goal) for one in runs],
        "ingredients": [
            {"checkpoint": _relative(path, goal), "weight": weight, "val_cosine": own if math.isfinite(own) else None}
            for path, weight, own in zip(paths, weights, scores, strict=True)
        ],
        "scored_on": {"run": _relative(folder, goal), "images": len(values)},
    }
    regressor.save(goal, {"val_cosine": cosine, "val_interval": [low, high], "rung": method}, made_of)
    print(_table(names, scores, weights, tried, f"{method}, {cosine:.4f}, 95 % interval {low:.4f} to {high:.4f}"))
    is_chosen = method == "soup" or alpha is None and method == "wise"
    _explain(folder, held, len(values), is_chosen)
    if cosine < max(scores):
        print(f"{method} scores less than its best ingredient; method=soup and alpha=null never do", file=sys.stderr)
    elif is_chosen and max(weights) == 1:
        print(f"{method}: no average is better than {names[weights.index(1)]}, which is {goal} now", file=sys.stderr)
    print(f"\npredict with it:\n  img2prompt predict ckpt={shlex.quote(str(goal))} images=…")


def _check(method: str, alpha: float | None, alphas: list[Any], device: str, batch_size: int | None) -> None:
    if method not in METHODS:
        raise ValueError(f"method={method}: must be one of {', '.join(METHODS)}")
    if alpha is not None and method != "wise":
        raise ValueError(f"alpha={alpha} is for method=wise; leave it out with method={method}")
    for key, given in (("alpha", [] if alpha is None else [alpha]), ("alphas", alphas)):
        for one in given:
            if isinstance(one, bool) or not isinstance(one, int | float) or not 0 <= one <= 1:
                raise ValueError(f"{key} must be between 0 (the start) and 1 (the end), got {one}")
    if device not in DEVICES:
        raise ValueError(f"device={device}: must be one of {', '.join(DEVICES)}")
    if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")


def _ingredients(given: Sequence[Any], method: str) -> list[Path]:
    """The checkpoints that are named, each file once; ValueError when they are too few or too many for the method."""
    listed = [Path(str(one)) for one in given]
    if method == "wise" and len(listed) == 1 and listed[0].is_dir():
        named = [listed[0] / "checkpoints" / f"{rung}.safetensors" for rung in ("probe", "finetune")]
        missing = next((path.name for path in named if not path.is_file()), None)
        if missing:
            raise ValueError(f"{listed[0]}: it has no {missing} to go from or to; give ckpts=[START,END]")
        later = [path.name for path in listed[0].glob("checkpoints/finetune_*") if "_step" not in path.name]
        if later:
            raise ValueError(f"{listed[0]}: it went on from its fine-tune to {later[0]}; give ckpts=[START,END]")
    else:
        named = [path for one in listed for path in _of(one)]
    paths: dict[tuple[int, int], Path] = {}
    for path in named:
        if read_header(path).encoder.get("_target_") == BLIND:
            raise ValueError(
                f"{path}: the mean rung, which has no encoder to average; give another, such as "
                f"{path.with_name('finetune.safetensors')}"
            )
        # best.safetensors is another name of the file of a rung.
        paths.setdefault((path.stat().st_dev, path.stat().st_ino), path)
    found = list(paths.values())
    if len(found) < 2:
        told = f"only {found[0]}" if found else "none"
        raise ValueError(
            f"ckpts: a merge needs two checkpoints or more, got {told}; train with trainer.keep_checkpoints=5, or give "
            "checkpoints of several runs"
        )
    if method == "wise" and len(found) != 2:
        raise ValueError(f"method=wise takes two checkpoints, the start and the end, got {len(found)}")
    return found


def _of(path: Path) -> list[Path]:
    """The checkpoints that a path stands for: itself or, of a run folder, those that it kept, else its best."""
    if not path.is_dir():
        return [path]
    rungs: dict[str, list[Path]] = {}
    for one in sorted(path.glob("checkpoints/*.safetensors")):
        if re.search(r"_step\d{7,}$", one.stem):
            rungs.setdefault(one.stem.rpartition("_step")[0], []).append(one)
    # Of several rungs the best: another one's input may be of another size.
    scores = {rung: max(read_header(one).scores.get("val_cosine", 0.0) for one in kept) for rung, kept in rungs.items()}
    return rungs[max(scores, key=lambda rung: scores[rung])] if rungs else [checkpoint_of(path)]


def _check_alike(paths: Sequence[Path]) -> None:
    """ValueError when the checkpoints are not of one architecture, input and target."""
    first = read_header(paths[0])
    for path in paths[1:]:
        other = read_header(path)
        ours, theirs = first.target, other.target
        if ours.dimension != theirs.dimension:
            raise ValueError(
                f"{path}: its embeddings have {theirs.dimension} numbers, those of {paths[0]} {ours.dimension}; "
                "only checkpoints of one target can be averaged"
            )
        if ours != theirs:
            raise ValueError(
                f"{path}: its target is {theirs.model} (revision {theirs.revision}), that of {paths[0]} {ours.model} "
                f"(revision {ours.revision}); only checkpoints of one target can be averaged"
            )
        for part, one, two in (("head", first.head, other.head), ("encoder", first.encoder, other.encoder)):
            for key in sorted(one.keys() | two.keys()):
                if one.get(key) != two.get(key) and key not in _FREE:
                    raise ValueError(
                        f"{path}: its {part} has {key}={brief(two.get(key))}, that of {paths[0]} "
                        f"{brief(one.get(key))}; only checkpoints of one architecture can be averaged"
                    )


def _runs(paths: Sequence[Path]) -> list[Path]:
    """The folders of all the runs that the checkpoints come from; ValueError when one does not say what it trained on,
    for then nobody knows which images it has not seen.
    """
    runs: list[Path] = []
    for path in paths:
        for run in runs_of(path):
            if not all((run / name).is_file() for name in ("config.yaml", "data.json", "trained.json")):
                raise ValueError(
                    f"{path}: what it trained on is not known: {run} is no run folder with data.json and trained.json; "
                    "give checkpoints where their runs left them"
                )
            if run.resolve() not in runs:
                runs.append(run.resolve())
    return runs


def _scoring_run(run: str | None, paths: Sequence[Path], runs: Sequence[Path]) -> Path:
    if run is None:
        return runs[0]
    if Path(run).resolve() not in runs:
        raise ValueError(f"run={run}: none of the checkpoints is of it; choose one of {', '.join(map(str, runs))}")
    return Path(run).resolve()


def _goal(out: str | None, folder: Path, method: str) -> Path:
    """Where the average is written; ValueError when something is there."""
    goal = folder / "checkpoints" / f"{method}.safetensors" if out is None else Path(out)
    if goal.suffix != ".safetensors":
        raise ValueError(f"out={out}: the ending must be .safetensors")
    if os.path.lexists(goal):
        raise ValueError(f"out={goal}: is there already and is kept; give out= another name, or remove it")
    return goal


def _scorer(paths: Sequence[Path], regressor: Regressor, held: HeldOut) -> Callable[[Weights], Tensor]:
    """What gives the cosines [N] of the average with some weights; each average is scored once."""

    @cache
    def cosines_of(weights: Weights) -> Tensor:
        counting = [str(path) for path, weight in zip(paths, weights, strict=True) if weight]
        load_strictly(regressor, averaged(paths, weights), " + ".join(counting))
        return score(regressor, held.data, held.bf16).cosines

    return cosines_of


def _mean(cosines: Tensor) -> float:
    mean = float(cosines.mean())
    return mean if math.isfinite(mean) else -math.inf


def _uniform(some: Sequence[int], count: int) -> Weights:
    return tuple(1 / len(some) if number in some else 0.0 for number in range(count))


def _names(paths: Sequence[Path]) -> list[str]:
    """Short names for people: with the run where there are several."""
    runs = {path.absolute().parent for path in paths}
    return [path.stem if len(runs) == 1 else f"{path.absolute().parent.parent.name}/{path.stem}" for path in paths]


def _relative(path: Path, goal: Path) -> str:
    """As seen from the folder of `goal`, so that a folder of runs can move as a whole."""
    try:
        return Path(os.path.relpath(path.resolve(), goal.resolve().parent)).as_posix()
    except ValueError:
        # Another drive of Windows.
        return path.resolve().as_posix()


def _table(
    names: Sequence[str], scores: Sequence[float], weights: Weights, tried: dict[float, float], result: str
) -> str:
    width = max(len("ingredient"), *(len(name) for name in names))
    lines = [f"{'ingredient':<{width}}  val cosine  weight"]
    for name, own, weight in zip(names, scores, weights, strict=True):
        lines.append(f"{name:<{width}}  {own:>10.4f}  {f'{weight:.3f}' if weight else 'left out'}")
    if len(tried) > 1:
        lines += [f"{f'alpha {alpha:g}':<{width}}  {cosine:>10.4f}" for alpha, cosine in tried.items()]
    return "\n".join([*lines, result])


def _explain(folder: Path, held: HeldOut, images: int, is_chosen: bool) -> None:
    told = f"scored on {images} validation images of {folder}"
    if images < held.of:
        told += f", without {held.of - images} that another run trained on, or close to"
    print(f"{told}{'; it was chosen by this score, which is slightly optimistic' if is_chosen else ''}")
