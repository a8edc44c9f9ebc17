"""The loop of a sweep: workers whose trials begin as soon as a place is free, until the study has its total.

One thread asks the study for trials, starts their trainings, reads what these write, and tells it.
"""

import math
import os
import platform
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, Trial, TrialState

from img2prompt.sweep.presence import Presence
from img2prompt.sweep.space import Parameter, draw, overrides_of
from img2prompt.sweep.study import STOPPED, claim_trial, is_ours, is_over, queue_again, tell
from img2prompt.sweep.trial import ERROR, NOT_FINITE, TRAIN, Training, changed, ended, failure, validations
from img2prompt.training.may_differ import MAY_DIFFER

# So many first trials that fail alike say that it is not their parameters.
ALIKE = 3
_POLL_S = 0.1
_LOOK_S = 2.0  # for dead workers, and for places that others leave


@dataclass(frozen=True)
class Plan:
    """What a sweep does: the rest of the study is in its storage."""

    folder: Path
    parameters: Sequence[Parameter]
    overrides: Sequence[str]  # of every trial, as typed
    n_trials: int
    slots: Sequence[Mapping[str, str]]  # the environment of each worker's trials
    rungs: Sequence[int]  # the numbers of those whose validations are compared
    sampler: str = "tpe"
    seed: int = 0
    dead_after_s: float = 60.0
    retries: int = 1
    grace_s: float = 30.0
    command: Sequence[str] = TRAIN


@dataclass
class Running:
    """A trial and its training."""

    slot: int
    trial: Trial
    training: Training
    drawn: Mapping[str, str]
    began: float = field(default_factory=time.monotonic)
    values: list[float] = field(default_factory=list)
    stamp: int = -1  # when what it writes was last written
    kill_at: float | None = None
    is_pruned: bool = False
    is_foreign: bool = False


# What is told of a sweep while it runs: those that run, and the trial that ended.
Show = Callable[[Sequence[Running], optuna.Study, FrozenTrial | None], None]


class AllFailAlike(ValueError):
    """The first trials failed for a reason that is not their parameters."""


def run(study: optuna.Study, plan: Plan, show: Show) -> None:
    """Runs trials until the study has `plan.n_trials`. Whatever ends it earlier (Ctrl-C, SIGTERM, an error) leaves no
    training behind, and queues those that ran again. ValueError when the first trials all fail alike.
    """
    running: list[Running] = []
    with _noted_signals() as check:
        try:
            _run(study, plan, show, running, check)
        except BaseException:
            _give_back(study, plan, running)
            raise


def _run(
    study: optuna.Study, plan: Plan, show: Show, running: list[Running], check_signals: Callable[[], None]
) -> None:
    presence = Presence(study, plan.dead_after_s)
    ended: list[FrozenTrial] = []
    look_at = 0.0
    while True:
        check_signals()
        presence.beat()
        for one in list(running):
            finished = _step(study, plan, one)
            if finished is not None:
                running.remove(one)
                ended.append(finished)
                show(running, study, finished)
                _check_alike(plan, ended)
                look_at = 0.0
        if time.monotonic() >= look_at:
            for number in presence.queue_dead(plan.retries):
                show(running, study, study.get_trials(deepcopy=False)[number])
            _fill(study, plan, presence.worker, running)
            if not running and is_over(study.get_trials(deepcopy=False), plan.n_trials):
                return
            look_at = time.monotonic() + _LOOK_S
        show(running, study, None)
        time.sleep(_POLL_S)


@contextmanager
def _noted_signals() -> Iterator[Callable[[], None]]:
    """A first Ctrl-C or SIGTERM waits until the function that is yielded is called: between a trial that has been asked
    for and a training that runs for it there is no good moment. A second one does not wait.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    received: list[int] = []

    def note(number: int, frame: Any) -> None:
        received.append(number)
        if len(received) > 1:
            _raise(number)
        told = "\nstopping: trials that run are saved and queued again; once more to stop at once\n"
        os.write(2, told.encode())

    def check() -> None:
        if received:
            _raise(received[0])

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
        # A terminal that is closed; with nohup it is ignored.
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _raise(number: int) -> None:
    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)


def _fill(study: optuna.Study, plan: Plan, worker: str, running: list[Running]) -> None:
    for slot in range(len(plan.slots)):
        if any(one.slot == slot for one in running):
            continue
        trial = claim_trial(study, plan.n_trials, worker, plan.sampler, plan.seed)
        if trial is None:
            return
        running.append(_begin(study, plan, slot, trial))


def _begin(study: optuna.Study, plan: Plan, slot: int, trial: Trial) -> Running:
    drawn = draw(plan.parameters, trial)
    own = trial.user_attrs
    # Of a run on another machine nobody here knows whether it has ended.
    is_over = own.get("stopped") or own.get("host") == platform.node()
    earlier = Path(own["folder"]) if "folder" in own and is_over else None
    # From here on a run can be gone on with.
    goes_on = earlier is not None and (earlier / "data.json").is_file()
    folder = earlier if earlier is not None and goes_on else _new_folder(plan, number_of(trial))
    trial.set_user_attr("folder", str(folder))
    trial.set_user_attr("host", platform.node())
    arguments = [*plan.overrides, *overrides_of(drawn), f"run_dir={folder}"]
    if goes_on:
        # It has its own configuration; keys of the machine may be others by now.
        arguments = [*(one for one in plan.overrides if _may_differ(one)), f"resume={folder}"]
    log = folder.with_name(f"{folder.name}.log")
    training = Training([*plan.command, *arguments], folder, log, plan.slots[slot])
    return Running(slot, trial, training, drawn)


def number_of(trial: Trial) -> int:
    """The number that people see: one that is queued again keeps it."""
    return int(trial.user_attrs.get("origin", trial.number))


def _new_folder(plan: Plan, number: int) -> Path:
    folder, attempt = plan.folder.absolute() / "trials" / f"{number:04d}", 1
    # Of an earlier attempt that cannot be gone on with.
    while folder.exists():
        attempt += 1
        folder = folder.with_name(f"{number:04d}-{attempt}")
    return folder


def _may_differ(override: str) -> bool:
    key = override.lstrip("+~").partition("=")[0]
    return key in MAY_DIFFER or key.startswith("logger.")


def _step(study: optuna.Study, plan: Plan, one: Running) -> FrozenTrial | None:
    """Reads what a training has written, and ends it where it must; the trial when it has ended."""
    code = one.training.code()
    try:
        _report(study, plan, one, prunes=code is None)
    except UpdateFinishedTrialError:
        one.is_foreign = True
        _stop(plan, one)
    if code is None:
        if one.kill_at is not None and time.monotonic() > one.kill_at:
            one.training.kill()
        return None
    if not one.is_foreign:
        _end(study, one, code)
    return study.get_trials(deepcopy=False)[one.trial.number]


def _report(study: optuna.Study, plan: Plan, one: Running, prunes: bool) -> None:
    folder = one.training.folder
    stamp = changed(folder)
    if stamp == one.stamp and prunes:
        return
    one.stamp = stamp
    found = validations(folder, plan.rungs)
    # By their order and not by their steps, of which another batch size has others.
    for step, value in list(enumerate(found, 1))[len(one.values) :]:
        one.values.append(value)
        if not math.isfinite(value):
            continue
        one.trial.report(value, step)
        if prunes and one.kill_at is None and one.trial.should_prune():
            one.is_pruned = True
            _stop(plan, one)


def _stop(plan: Plan, one: Running) -> None:
    if one.kill_at is None:
        one.training.stop()
        one.kill_at = time.monotonic() + plan.grace_s


def _end(study: optuna.Study, one: Running, code: int) -> None:
    found = ended(one.training.folder)
    seconds = round(time.monotonic() - one.began, 1)
    if code == 0 and found is not None and math.isfinite(found.value):
        _note(one, seconds=seconds, rung=found.rung, best_rung=found.best_rung, reason=found.unfinished)
        tell(study, one.trial, TrialState.COMPLETE, found.value)
    elif one.is_pruned:
        _note(one, seconds=seconds)
        tell(study, one.trial, TrialState.PRUNED)
    else:
        kind, reason = failure(code, one.training.log, one.training.log_begins)
        if code == 0 and found is not None:
            kind, reason = NOT_FINITE, f"its validation cosine is {found.value}, not finite"
        _note(one, seconds=seconds, kind=kind, reason=reason, log=str(one.training.log.absolute()))
        tell(study, one.trial, TrialState.FAIL)


def _note(one: Running, **told: object) -> None:
    try:
        for key, value in told.items():
            one.trial.set_user_attr(key, value)
    except UpdateFinishedTrialError:
        one.is_foreign = True


def _check_alike(plan: Plan, ended: Sequence[FrozenTrial]) -> None:
    first = ended[:ALIKE]
    if len(ended) != ALIKE or any(one.state != TrialState.FAIL or one.user_attrs.get("kind") != ERROR for one in first):
        return
    reasons = [str(one.user_attrs["reason"]) for one in first]
    # Paths and amounts differ.
    if len({re.sub(r"\d+", "0", reason) for reason in reasons}) == 1:
        raise AllFailAlike(
            f"the first {ALIKE} trials failed alike, so that nothing more is started: {reasons[-1]} "
            f"({plan.folder / 'trials'}/*.log have the rest; the same command goes on)"
        )


def _give_back(study: optuna.Study, plan: Plan, running: Sequence[Running]) -> None:
    """Ends all trainings, first politely, and queues them again; a second Ctrl-C does not wait for them."""
    try:
        for one in running:
            one.training.stop()
        until = time.monotonic() + plan.grace_s
        while time.monotonic() < until and any(one.training.code() is None for one in running):
            time.sleep(_POLL_S)
    finally:
        for one in running:
            one.training.kill()
        for one in running:
            if not is_ours(study, one.trial):
                continue
            if one.training.code() == 0:
                # It has ended by itself meanwhile.
                _end(study, one, 0)
                continue
            if one.is_pruned:
                tell(study, one.trial, TrialState.PRUNED)
            else:
                lost = int(one.trial.user_attrs.get("lost", 0))
                queue_again(study, one.trial.number, STOPPED, lost)
