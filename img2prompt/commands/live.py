"""What a sweep says while it runs: on a terminal a table that is written over itself, elsewhere a line a trial."""

import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TextIO

import optuna
from optuna.trial import FrozenTrial

from img2prompt.sweep.loop import Running, number_of
from img2prompt.sweep.outcome import best_of, state_of, typed_params
from img2prompt.sweep.study import counted, origin

_EVERY_S = 1.0


class Live:
    """Is called by the loop, often."""

    def __init__(self, n_trials: int, out: TextIO | None = None) -> None:
        self._n_trials, self._out = n_trials, out or sys.stdout
        self._is_terminal = self._out.isatty() and os.environ.get("TERM") != "dumb"
        self._began, self._due, self._lines = time.monotonic(), 0.0, 0

    def __call__(self, running: Sequence[Running], study: optuna.Study, finished: FrozenTrial | None) -> None:
        if finished is not None:
            self._clear()
            best = best_of(counted(study.get_trials(deepcopy=False)))
            self._out.write(f"{line_of(finished, best)}\n")
            self._due = 0.0
        if self._is_terminal and time.monotonic() >= self._due:
            self._clear()
            self._draw(running, counted(study.get_trials(deepcopy=False)))
            self._due = time.monotonic() + _EVERY_S
        self._out.flush()

    def _draw(self, running: Sequence[Running], trials: Sequence[FrozenTrial]) -> None:
        columns = shutil.get_terminal_size().columns
        best = best_of(trials)
        done = sum(one.state.is_finished() for one in trials)
        states = Counter(state_of(one) for one in trials)
        told = [
            f"{done} of {self._n_trials}",
            f"best {best.value:.4f} (trial {origin(best)})" if best else "no best yet",
        ]
        told += [f"{states[name]} {name}" for name in ("pruned", "failed", "queued") if states[name]]
        elsewhere = states["running"] - len(running)
        told += [f"{elsewhere} running elsewhere"] if elsewhere > 0 else []
        told.append(str(timedelta(seconds=round(time.monotonic() - self._began))))
        lines = [", ".join(told)]
        for one in sorted(running, key=lambda one: one.slot):
            last = f"{one.values[-1]:.4f} after {len(one.values)}" if one.values else "begins"
            kept = " (stops)" if one.kill_at is not None else ""
            lines.append(f"  {one.slot}: trial {number_of(one.trial):<4} {last:<16}{kept}  {drawn_text(one.drawn)}")
        lines = [line[: columns - 1] for line in lines]
        self._out.write("\n".join(lines) + "\n")
        self._lines = len(lines)

    def _clear(self) -> None:
        if self._lines:
            self._out.write(f"\x1b[{self._lines}F\x1b[J")
            self._lines = 0


def line_of(trial: FrozenTrial, best: FrozenTrial | None) -> str:
    """One line of a trial that has ended."""
    own = trial.user_attrs
    state = state_of(trial)
    if state == "finished":
        what = f"{trial.value:.4f}{', the best so far' if best and best.number == trial.number else ''}"
    elif state == "pruned":
        value = f", {trial.value:.4f}" if trial.value is not None else ""
        what = f"pruned after {len(trial.intermediate_values)} validations{value}"
    elif own.get("again"):
        what = f"{own.get('reason')}, and is queued again"
    else:
        kind, reason = str(own.get("kind", "")), str(own.get("reason", ""))
        what = f"failed: {reason if kind in reason else f'{kind}: {reason}'}"
    seconds = f" ({own['seconds']} s)" if "seconds" in own else ""
    return f"trial {origin(trial)}: {what}{seconds}  {drawn_text(typed_params(trial))}"


def drawn_text(drawn: Mapping[str, str]) -> str:
    return " ".join(f"{key}={_short(value)}" for key, value in drawn.items())


def _short(value: str) -> str:
    try:
        return f"{float(value):.4g}" if "." in value or "e" in value else value
    except ValueError:
        return value
