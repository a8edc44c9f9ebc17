"""`sweep`: looks at the search space and at what all trials share, runs the trials, and says what came of them."""

import json
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from img2prompt.commands.arguments import PATH_KEYS, quoted_paths
from img2prompt.commands.conf import conf_folder, groups, root_keys
from img2prompt.commands.sentences import sentence_of
from img2prompt.commands.settings import all_keys, compose, did_you_mean
from img2prompt.files import write_text
from img2prompt.report.sweep import best_command, write_sweep_report
from img2prompt.sweep.gpus import slots, told, visible
from img2prompt.sweep.space import Parameter, corners, plain, read_space
from img2prompt.sweep.trial import TRAIN

_FILE = "sweep.yaml"
_BY_THE_SWEEP = ("run_dir", "resume", "dry_run")
# What machines that share a study may have of their own.
_OF_A_MACHINE = (
    "cache_dir",
    "data.root",
    "data.cache",
    "data.cache_gib",
    "data.threads",
    "data.synthesis.out",
    "logger",
    "trainer.accelerator",
    "trainer.devices",
)
_OF_A_SOURCE = ("root", "threads")
# Of these the sweep must know before it begins.
_NEVER_DRAWN = ("trainer.devices", "trainer.accelerator")


@dataclass(frozen=True)
class Given:
    """A command line: the sweep's own arguments, those of every trial, and the file of the search space."""

    own: list[str]
    overrides: list[str]
    space: Path
    name: str


def main(arguments: list[str]) -> None:
    sweep(arguments)


def sweep(arguments: Sequence[str], command: Sequence[str] = TRAIN) -> None:
    """Runs a sweep; `command` is what a trial's arguments are given to. ValueError says what is wrong."""
    if os.name == "nt":
        raise ValueError("sweep ends trainings by groups of processes, which Windows has not: run it under WSL")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("a sweep starts its own processes: start it without torchrun; trainer.devices= is for trials")
    given = split(arguments)
    settings = compose("sweep", quoted_paths(given.own))
    _check(settings)
    parameters = read_space(given.space, PATH_KEYS)
    shared = _train_settings(given.overrides, "")
    check_parameters(parameters, given)
    trainer = shared["trainer"]
    if trainer["devices"] < 1:
        raise ValueError(f"trainer.devices={trainer['devices']}: must be at least 1, the GPUs of one trial")
    is_cpu = trainer["accelerator"] in ("cpu", "mps")
    found = [] if is_cpu else visible(settings["gpus"], os.environ)
    places = slots(settings["workers"], trainer["devices"], found, os.environ)
    if settings["gpus"] == []:
        places = [{**one, "CUDA_VISIBLE_DEVICES": ""} for one in places]
    folder = Path(settings["sweep_dir"] or Path("runs", "sweeps", given.name))
    _check_folder(folder)
    # Seconds of imports.
    from optuna.exceptions import StorageInternalError

    from img2prompt.commands.live import Live
    from img2prompt.sweep import loop, outcome, study
    from img2prompt.sweep import storage as storages

    storage, name = settings["storage"], settings["study"] or folder.resolve().name
    _check_study(folder, name, storages.without_password(storage) if storage else None)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"sweep_dir={folder}: cannot be made ({error.strerror})") from None
    journal = folder / "journal.log"
    try:
        opened = study.open_study(
            storage,
            journal,
            name,
            settings["sampler"],
            settings["pruner"],
            settings["sampler_seed"],
            startup_trials=settings["startup_trials"],
            warmup_validations=settings["warmup_validations"],
        )
        where = str(folder) if storage is None else f"study {name} of {storages.without_password(storage)}"
        space = plain(parameters)
        chosen_by = {key: settings[key] for key in ("sampler", "pruner")}
        study.claim_study(opened, space, _flat(shared), chosen_by, where)
        about = {
            "name": given.name,
            "space": space,
            "overrides": given.overrides,
            "n_trials": settings["n_trials"],
            "sampler": settings["sampler"],
            "pruner": settings["pruner"],
            "study": name,
            "storage": storages.without_password(storage) if storage else None,
        }
        write_text(folder / _FILE, yaml.safe_dump(about, sort_keys=False, allow_unicode=True))
        trials = opened.get_trials(deepcopy=False)
        done = sum(one.state.is_finished() for one in study.counted(trials))
        queued = sum(one.state == study.TrialState.WAITING for one in trials)
        print(
            f"sweep {given.name}: {settings['n_trials']} trials{f', {done} of them done' if done else ''}"
            f"{f', {queued} that were stopped are queued again' if queued else ''}; "
            f"{settings['sampler']}, pruner {settings['pruner']}; {', '.join(one.key for one in parameters)}\n"
            f"{settings['workers']} at once; {told(settings['workers'], trainer['devices'], found)}\n"
            f"trials: {folder / 'trials'}; study: {where}",
            flush=True,
        )
        plan = loop.Plan(
            folder=folder,
            parameters=parameters,
            overrides=given.overrides,
            n_trials=settings["n_trials"],
            slots=places,
            sampler=settings["sampler"],
            seed=settings["sampler_seed"],
            dead_after_s=settings["dead_after_s"],
            retries=settings["retries"],
            grace_s=settings["grace_s"],
            rungs=_compared(shared["stages"]),
            command=command,
        )
        live = Live(plan.n_trials)

        def show(running: Sequence[loop.Running], of: Any, finished: Any) -> None:
            live(running, of, finished)
            if finished is not None:
                # For whoever looks at it meanwhile.
                outcome.write_outcome(folder, opened, parameters, about, is_over=False)

        if study.is_over(trials, plan.n_trials):
            print("all of them are there; a larger n_trials= takes more")
        try:
            outcome.write_outcome(folder, opened, parameters, about, is_over=False)
            loop.run(opened, plan, show)
        except (KeyboardInterrupt, SystemExit):
            print("the same command goes on with this sweep", file=sys.stderr)
            raise
        finally:
            # Also of a sweep that was stopped.
            with suppress(StorageInternalError, OSError):
                outcome.write_outcome(folder, opened, parameters, about)
        _tell(folder)
    except Exception as error:
        # Not all that its database says is wrapped by Optuna.
        if not isinstance(error, StorageInternalError) and not type(error).__module__.startswith("sqlalchemy"):
            raise
        said = storages.without_secrets(" ".join(str(error.__cause__ or error).split())[:300], storage)
        raise ValueError(f"the storage does not answer: {said}; the same command goes on when it does") from None


def split(arguments: Sequence[str]) -> Given:
    """ValueError for what is neither the sweep's nor train's, and where there is not exactly one search space."""
    own_keys, train_keys = root_keys("sweep"), root_keys("train")
    known = [*own_keys, *train_keys, "experiment", "sweep", "hydra"]
    own, overrides, names = [], [], []
    for argument in arguments:
        key, _, value = argument.lstrip("+~").partition("=")
        root = key.partition(".")[0].partition("@")[0].partition("/")[0]
        if argument.startswith("-"):
            raise ValueError(f"{argument}: sweep takes no options; grids are for train -m, and search spaces for sweep")
        if key == "sweep":
            names.append(value)
        elif root in _BY_THE_SWEEP:
            raise ValueError(f"{key}: is set for each trial by the sweep; sweep_dir= says where the trials go")
        elif root in own_keys:
            own.append(argument)
        elif root not in known:
            raise ValueError(f"{key}: no such key{did_you_mean(key, [*known, *all_keys('train')])}")
        else:
            overrides.append(argument)
    files = [one.partition("=")[2] for one in own if one.startswith("space=") and one != "space=null"]
    spaces = groups(conf_folder()).get("sweep", [])
    if len(names) + len(files) != 1:
        raise ValueError(f"give one search space: +sweep=NAME ({', '.join(spaces)}), or space=FILE with your own")
    if files:
        path = Path(files[0]).expanduser()
        return Given(own, overrides, path, path.stem)
    if names[0] not in spaces:
        known_names = f"choices: {', '.join(spaces)}, or space=FILE"
        raise ValueError(f"+sweep={names[0]}: no such search space{did_you_mean(names[0], spaces)}; {known_names}")
    return Given(own, overrides, conf_folder() / "sweep" / f"{names[0]}.yaml", names[0])


def check_parameters(parameters: Sequence[Parameter], given: Given) -> None:
    """ValueError for a parameter that train does not have or take, in the sentence that train has for it."""
    set_here = {one.lstrip("+~").partition("=")[0] for one in given.overrides}
    for one in parameters:
        key = one.key.lstrip("+")
        if key in set_here:
            raise ValueError(f"{key}: is drawn by {given.space}, and given here; take it out of one of them")
        if key.partition(".")[0] in (*_BY_THE_SWEEP, "experiment") or key in _NEVER_DRAWN:
            raise ValueError(f"{given.space}: {key} cannot be drawn")
    for one, overrides in corners(parameters):
        _train_settings([*given.overrides, *overrides], f"{given.space}: ", one.key)


def _train_settings(overrides: Sequence[str], before: str, drawn: str = "") -> dict[str, Any]:
    try:
        return compose("train", quoted_paths(overrides))
    except Exception as error:
        sentence = sentence_of("train", error)
        if sentence is None:
            raise
        if "no such key" in sentence and drawn in all_keys("train"):
            group = drawn.partition(".")[0]
            sentence = f"{drawn} is there with some choices of {group} alone: draw it when: {{{group}: …}}"
        raise ValueError(f"{before}{sentence}") from None


def _check(settings: dict[str, Any]) -> None:
    for key, least in (
        ("n_trials", 1),
        ("workers", 1),
        ("startup_trials", 0),
        ("warmup_validations", 0),
        ("retries", 0),
        ("sampler_seed", 0),
    ):
        if settings[key] < least:
            raise ValueError(f"{key}={settings[key]}: must be at least {least}")
    for key in ("dead_after_s", "grace_s"):
        if settings[key] <= 0:
            raise ValueError(f"{key}={settings[key]}: must be above 0")


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"sweep_dir={folder}: is a file; choose another")
    if not folder.is_dir() or (folder / _FILE).is_file():
        return
    # A sweep that another process has just begun has its journal alone.
    if any(not one.name.startswith(("journal.log", f".{_FILE}")) for one in folder.iterdir()):
        raise ValueError(f"sweep_dir={folder}: already holds something that is no sweep; choose another")


def _check_study(folder: Path, name: str, storage: str | None) -> None:
    """ValueError where the folder is that of another study."""
    path = folder / _FILE
    said = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    if isinstance(said, dict) and (said.get("study"), said.get("storage")) != (name, storage):
        theirs = f"{said.get('study')}{' of ' + said['storage'] if said.get('storage') else ''}"
        raise ValueError(f"sweep_dir={folder}: has the trials of study {theirs}; choose another folder")


def _flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    """What all trials share, key by key, without what machines may have of their own."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        full = f"{prefix}{key}"
        # Sources repeat root and threads of the data.
        if full in (*_OF_A_MACHINE, *_BY_THE_SWEEP) or full.startswith("data.") and key in _OF_A_SOURCE:
            continue
        if isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
            value = {str(number): one for number, one in enumerate(value)}
        found |= _flat(value, f"{full}.") if isinstance(value, dict) and value else {full: value}
    return found


def _compared(stages: dict[str, Any]) -> list[int]:
    """The numbers of the rungs whose validations trials are compared by: the probes of some heads are learnt step by
    step, too.
    """
    climbed = [stage for stage in stages.values() if stage is not None]
    return [
        number
        for number, stage in enumerate(climbed)
        if str(stage.get("_target_")).endswith(".FineTune") and stage.get("epochs") != 0
    ]


def _tell(folder: Path) -> None:
    found = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
    print(f"\nreport: {write_sweep_report(folder)}")
    if found["best_overrides"] is None:
        raise ValueError(f"no trial has finished; {folder / 'trials'}/*.log say why")
    best = Path(found["best_folder"], "checkpoints", f"{found['best_rung']}.safetensors")
    if found["earlier_rung_better"]:
        told = f"in {found['earlier_rung_better']} of {found['finished']} finished trials an earlier rung of the ladder"
        print(f"{told} is better than the last, by which they are compared: train longer", file=sys.stderr)
    print(f"best validation cosine: {found['best_value']:.4f}, trial {found['best_trial']}: {best}")
    print(f"train it again:\n  {best_command(found)}")
