"""The study of a sweep: who may start a trial, and what becomes of trials whose worker has died.

All processes of a sweep, on one machine or several, share nothing but the study. A trial is followed by another one
of the same parameters when its worker died or was stopped; both have the same `origin`, and count as one.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.exceptions import DuplicatedStudyError, UpdateFinishedTrialError
from optuna.trial import FrozenTrial, Trial, TrialState

from img2prompt.sweep.storage import storage_of

SAMPLERS = ("tpe", "random")
PRUNERS = ("median", "hyperband", "none")
_IDENTITY = "img2prompt"
STOPPED = "stopped with the sweep"


def open_study(
    storage: str | None, journal: Path, name: str, sampler: str, pruner: str, seed: int, **pruning: int
) -> optuna.Study:
    """The study `name` in a storage of Optuna or, with None, in the file `journal`; made if it is not there.

    `pruning` is startup_trials and warmup_validations. ValueError when the storage does not answer.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    for option, given, known in (("sampler", sampler, SAMPLERS), ("pruner", pruner, PRUNERS)):
        if given not in known:
            raise ValueError(f"{option}={given}: must be one of {', '.join(known)}")
    kept = storage_of(storage, journal)
    try:
        study = optuna.create_study(
            storage=kept,
            study_name=name,
            direction="maximize",
            load_if_exists=True,
            sampler=_sampler(sampler, seed),
            pruner=_pruner(pruner, **pruning),
        )
    except DuplicatedStudyError:
        # Another process has made it in this moment.
        study = optuna.load_study(
            storage=kept, study_name=name, sampler=_sampler(sampler, seed), pruner=_pruner(pruner, **pruning)
        )
    if study.directions != [optuna.study.StudyDirection.MAXIMIZE]:
        raise ValueError(f"study={name}: this study of the storage is none of ours; choose another name")
    return study


def _sampler(name: str, seed: int) -> optuna.samplers.BaseSampler:
    return optuna.samplers.TPESampler(seed=seed) if name == "tpe" else optuna.samplers.RandomSampler(seed=seed)


def _seeded(name: str, seed: int, number: int) -> optuna.samplers.BaseSampler:
    """That of one trial: processes that draw by one seed would draw the same."""
    return _sampler(name, int(np.random.SeedSequence([seed, number]).generate_state(1)[0]))


def _pruner(name: str, startup_trials: int, warmup_validations: int) -> optuna.pruners.BasePruner:
    if name == "median":
        # Validations are counted from 1.
        return optuna.pruners.MedianPruner(startup_trials, warmup_validations + 1)
    return optuna.pruners.HyperbandPruner() if name == "hyperband" else optuna.pruners.NopPruner()


def claim_study(
    study: optuna.Study,
    space: Mapping[str, Any],
    settings: Mapping[str, Any],
    chosen_by: Mapping[str, Any],
    where: str,
) -> bool:
    """Makes it the study of this space, these settings of train, and of who chooses among them; says whether it is new.
    ValueError when it is one of others.
    """
    is_new = _IDENTITY not in study.user_attrs
    if is_new:
        if study.get_trials(deepcopy=False):
            raise ValueError(f"{where}: its trials are not of img2prompt sweep; choose another study=")
        study.set_user_attr(_IDENTITY, {"space": dict(space), "settings": dict(settings), "sweep": dict(chosen_by)})
    said = study.user_attrs[_IDENTITY]
    for what, ours, theirs in (
        ("the search space", space, said.get("space", {})),
        ("train", settings, said.get("settings", {})),
        ("the sweep", chosen_by, said.get("sweep", {})),
    ):
        # As both are when they were written.
        ours = json.loads(json.dumps(ours))
        for key in dict.fromkeys([*ours, *theirs]):
            if key not in ours or key not in theirs or ours[key] != theirs[key]:
                raise ValueError(
                    f"{where}: {what} differs: {key} is {_brief(theirs, key)} in this study, and "
                    f"{_brief(ours, key)} now; another study needs another sweep_dir (and study=, in a storage)"
                )
    return is_new


def _brief(values: Mapping[str, Any], key: str) -> str:
    text = json.dumps(values[key], ensure_ascii=False) if key in values else "not there"
    return text if len(text) <= 120 else f"{text[:120]}…"


def origin(trial: FrozenTrial) -> int:
    """The number of the first trial of the same parameters that this one goes on with, often its own."""
    return int(trial.user_attrs.get("origin", trial.number))


def counted(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """The trials that count: of those with one origin the last, and none that was one too many."""
    last: dict[int, FrozenTrial] = {}
    for trial in sorted(trials, key=lambda one: one.number):
        if "surplus" not in trial.user_attrs:
            last[origin(trial)] = trial
    return sorted(last.values(), key=origin)


def is_over(trials: Sequence[FrozenTrial], n_trials: int) -> bool:
    """Whether all are finished, and none is to be queued again."""
    found = counted(trials)
    return len(found) >= n_trials and all(one.state.is_finished() and not is_lost(one) for one in found)


def claim_trial(study: optuna.Study, n_trials: int, worker: str, sampler: str = "tpe", seed: int = 0) -> Trial | None:
    """The next trial for `worker`, a queued one before a new one; None when all there may be have begun.

    Two processes may see the same last place: the storage numbers their trials, and the later one gives way.
    """
    trials = study.get_trials(deepcopy=False)
    is_queued = any(one.state == TrialState.WAITING for one in trials)
    if not is_queued and len(counted(trials)) >= n_trials:
        return None
    trial = study.ask()
    trial.set_user_attr("worker", worker)
    if _is_surplus(study.get_trials(deepcopy=False), trial.number, n_trials):
        trial.set_user_attr("surplus", True)
        finish(study, trial._trial_id, TrialState.FAIL)
        return None
    study.sampler = _seeded(sampler, seed, trial.number)
    return trial


def _is_surplus(trials: Sequence[FrozenTrial], number: int, n_trials: int) -> bool:
    own = next(one for one in trials if one.number == number)
    before = [one for one in trials if one.number < number and "surplus" not in one.user_attrs]
    again = own.user_attrs.get("again_of")
    if again is not None:
        return any(one.user_attrs.get("again_of") == again for one in before)
    return len({origin(one) for one in before}) >= n_trials


def is_ours(study: optuna.Study, trial: Trial) -> bool:
    """Whether nobody has taken this trial's worker for dead."""
    return study._storage.get_trial(trial._trial_id).state == TrialState.RUNNING


def tell(study: optuna.Study, trial: Trial, state: TrialState, value: float | None = None) -> None:
    """Ends a trial of ours; nothing if somebody has taken its worker for dead."""
    with suppress(ValueError, UpdateFinishedTrialError):
        study.tell(trial, value, state)


def queue_again(study: optuna.Study, number: int, reason: str, lost: int) -> bool:
    """Ends a running trial and queues its parameters again; whether it was this process that did so."""
    trial = study.get_trials(deepcopy=False)[number]
    if trial.state != TrialState.RUNNING:
        return False
    try:
        for key, value in {"kind": reason, "reason": reason, "again": True, "lost": lost}.items():
            study._storage.set_trial_user_attr(trial._trial_id, key, value)
    except (ValueError, UpdateFinishedTrialError):
        return False
    if not finish(study, trial._trial_id, TrialState.FAIL):
        return False
    enqueue(study, study.get_trials(deepcopy=False)[number])
    return True


def enqueue(study: optuna.Study, trial: FrozenTrial) -> None:
    kept = {key: trial.user_attrs[key] for key in ("folder", "host") if key in trial.user_attrs}
    lost = trial.user_attrs.get("lost", 0)
    attributes: dict[str, Any] = {"origin": origin(trial), "again_of": trial.number, "lost": lost}
    # Then its training is known to have ended, wherever it ran.
    attributes["stopped"] = trial.user_attrs.get("kind") == STOPPED
    parameters: dict[str, Any] = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
    study.enqueue_trial(parameters, user_attrs=attributes | kept)


def is_lost(trial: FrozenTrial) -> bool:
    """Whether it was ended to be queued again."""
    return trial.state == TrialState.FAIL and bool(trial.user_attrs.get("again"))


def finish(study: optuna.Study, trial_id: int, state: TrialState) -> bool:
    try:
        return bool(study._storage.set_trial_state_values(trial_id, state))
    except (UpdateFinishedTrialError, ValueError):
        return False
