"""Which workers live: each tells the study, and trials of those that are dead are queued again."""

import os
import platform
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState

from img2prompt.sweep.study import enqueue, finish, is_lost, queue_again

_BEATS = 4  # within the time after which a worker is dead


class Presence:
    """Tells the study that this process lives, and finds out which others do not.

    A worker is dead when what it tells has not changed for `dead_after_s` by our own clock: those of machines differ.
    On its own machine (where processes see each other) it is dead as soon as its process is gone.
    """

    def __init__(self, study: optuna.Study, dead_after_s: float) -> None:
        self.worker = f"worker {platform.node()} {os.getpid()} {uuid.uuid4().hex[:8]}"
        self._study, self._dead_after_s = study, dead_after_s
        self._beat, self._due = 0, 0.0
        self._seen: dict[str, tuple[Any, float]] = {}
        self.beat()

    def beat(self) -> None:
        """To be called often; tells it when it is time."""
        if time.monotonic() < self._due:
            return
        self._due = time.monotonic() + self._dead_after_s / _BEATS
        self._beat += 1
        self._study.set_user_attr(
            self.worker, {"beat": self._beat, "place": place(), "pid": os.getpid(), "began": _began(os.getpid())}
        )

    def queue_dead(self, retries: int) -> list[int]:
        """Queues trials of dead workers again, each up to `retries` times, and gives their numbers."""
        said = self._study.user_attrs
        trials = self._study.get_trials(deepcopy=False)
        found = []
        for trial in trials:
            if trial.state != TrialState.RUNNING:
                continue
            worker = trial.user_attrs.get("worker", f"nobody {trial.number}")
            if worker == self.worker or not self._is_dead(worker, said.get(worker)):
                continue
            lost = int(trial.user_attrs.get("lost", 0)) + 1
            if lost <= retries:
                if queue_again(self._study, trial.number, "its worker died", lost):
                    found.append(trial.number)
                continue
            reason = f"its worker died, for the {lost}. time" if lost > 1 else "its worker died"
            with suppress(UpdateFinishedTrialError, ValueError):
                for key, value in {"kind": "its worker died", "reason": reason}.items():
                    self._study._storage.set_trial_user_attr(trial._trial_id, key, value)
                finish(self._study, trial._trial_id, TrialState.FAIL)
                found.append(trial.number)
        # Of a worker that died between the two steps of `queue_again`.
        followed = {one.user_attrs.get("again_of") for one in trials}
        for trial in trials:
            if is_lost(trial) and trial.number not in followed and self._is_old(f"lost {trial.number}", None):
                enqueue(self._study, trial)
        return found

    def _is_dead(self, worker: str, said: Any) -> bool:
        if isinstance(said, dict) and said.get("place") and said["place"] == place():
            began = _began(int(said["pid"]))
            return began is None or began != said["began"]
        return self._is_old(worker, said)

    def _is_old(self, name: str, said: Any) -> bool:
        now = time.monotonic()
        before, since = self._seen.get(name, (said, now))
        self._seen[name] = (said, since) if before == said else (said, now)
        return before == said and now - since > self._dead_after_s


def place() -> str:
    """Where processes know each other by their numbers: this boot of this machine, and of containers this one. Empty
    where that cannot be told.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{platform.node()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _began(pid: int) -> str | None:
    """When a process began, in ticks of this boot: numbers of processes are used again."""
    try:
        # The name, in brackets, may hold anything; of what follows it this is the twentieth.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]
