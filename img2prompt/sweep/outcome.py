"""What came of a sweep: trials.csv, sweep.json and the importance of its parameters, from which its report is made."""

import math
import warnings
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from img2prompt.files import as_cell, write_json, write_table
from img2prompt.sweep.space import Parameter, overrides_of
from img2prompt.sweep.study import counted, origin

# Of fewer finished trials nothing can be said.
_LEAST = 4
_STATES = {
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "queued",
}


def write_outcome(
    folder: Path, study: optuna.Study, parameters: Sequence[Parameter], about: Mapping[str, Any], is_over: bool = True
) -> None:
    """Writes trials.csv and sweep.json; `about` is what else is to be known of the sweep. Importance takes a second,
    and is found when it `is_over`.
    """
    trials = counted(study.get_trials(deepcopy=False))
    write_table(folder / "trials.csv", [_row(one, parameters) for one in trials])
    best = best_of(trials)
    importance, reason = importances(study, trials) if is_over else ({}, "found when the sweep ends")
    finished = [one.user_attrs for one in trials if one.state == TrialState.COMPLETE]
    earlier = [str(own["best_rung"]) for own in finished if own.get("best_rung") != own.get("rung")]
    found = {
        "best_trial": origin(best) if best else None,
        "best_value": best.value if best else None,
        "best_overrides": overrides_of(typed_params(best)) if best else None,
        "best_folder": best.user_attrs.get("folder") if best else None,
        "best_rung": best.user_attrs.get("rung") if best else None,
        "earlier_rung_better": len(earlier),
        "finished": len(finished),
        "importance": importance,
        "no_importance": reason,
    }
    write_json(folder / "sweep.json", {**about, **found})


def best_of(trials: Sequence[FrozenTrial]) -> FrozenTrial | None:
    finished = [one for one in trials if one.state == TrialState.COMPLETE and one.value is not None]
    # Of equal ones the first that ended.
    finished.sort(key=lambda one: one.datetime_complete or datetime.max)
    return max(finished, key=lambda one: one.value or 0.0, default=None)


def state_of(trial: FrozenTrial) -> str:
    return _STATES[trial.state]


def typed_params(trial: FrozenTrial) -> dict[str, str]:
    """The parameters of a trial as they were typed."""
    # Of a queued one they are known, and not yet drawn.
    found = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
    return {key: value if isinstance(value, str) else repr(value) for key, value in found.items()}


def importances(study: optuna.Study, trials: Sequence[FrozenTrial]) -> tuple[dict[str, float], str | None]:
    """The share of each parameter in what made trials differ (fANOVA), or why there is none. Parameters that are drawn
    in some trials alone are left out.
    """
    values = [one.value for one in trials if one.state == TrialState.COMPLETE]
    if len(values) < _LEAST:
        return {}, f"{_LEAST} finished trials are needed to say which parameters matter, and there are {len(values)}"
    if len(set(values)) == 1:
        return {}, "all finished trials have one value, so that no parameter can be said to matter"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
            found = optuna.importance.get_param_importances(study, evaluator=evaluator)
        except (ValueError, RuntimeError) as error:
            return {}, " ".join(str(error).split())
    shares = {key: round(float(share), 6) for key, share in found.items() if math.isfinite(share)}
    return shares, None if shares else "no parameter is drawn in every finished trial, so that none can be compared"


def _row(trial: FrozenTrial, parameters: Sequence[Parameter]) -> dict[str, Any]:
    own, drawn = trial.user_attrs, typed_params(trial)
    value = trial.value if trial.state in (TrialState.COMPLETE, TrialState.PRUNED) else None
    return {
        "trial": origin(trial),
        "state": state_of(trial),
        "val_cosine": "" if value is None else repr(value),
        **{one.key: as_cell(drawn.get(one.key, "")) for one in parameters},
        "validations": len(trial.intermediate_values),
        "seconds": own.get("seconds", ""),
        "kind": own.get("kind", ""),
        "reason": as_cell(str(own.get("reason", ""))),
        "folder": as_cell(str(own.get("folder", ""))),
        "host": str(own.get("host", "")),
    }
