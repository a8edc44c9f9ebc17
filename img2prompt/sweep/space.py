"""A search space: which keys of `train` are drawn, and from what. It is read from a YAML file of `key: values`:

    head: [linear, mlp]                                          one of these, here whole choices of a group
    optim.lr: {float: [1e-5, 1e-3], log: true}                   a number between these
    head.hidden: {int: [512, 8192], log: true, when: {head: mlp}}
    data.batch_size: {int: [32, 256], step: 32}
    optim.ema_decay: {choice: [null, 0.999], when: {head: [linear, mlp]}}

`when` draws a key only where those above it have been drawn so. What is drawn are texts, as they are typed.
"""

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import yaml

_KINDS = ("choice", "float", "int")
_SHAPE = "[a, b, …], {float: [low, high]} or {int: [low, high]}, with log: true, step: N or when: {key: value}"
_PLAIN = r"[A-Za-z_][\w./@-]*"


@dataclass(frozen=True)
class Parameter:
    key: str
    kind: str
    choices: tuple[str, ...] = ()
    low: float = 0
    high: float = 0
    log: bool = False
    step: float | None = None
    when: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@runtime_checkable
class Draws(Protocol):
    """What of an Optuna trial a space asks."""

    def suggest_categorical(self, name: str, choices: Sequence[str]) -> Any: ...
    def suggest_float(self, name: str, low: float, high: float, *, step: float | None, log: bool) -> float: ...
    def suggest_int(self, name: str, low: int, high: int, *, step: int, log: bool) -> int: ...


def read_space(path: Path, paths: Collection[str] = ()) -> list[Parameter]:
    """The parameters of a file, in its order; ValueError when it is no search space. Values of the keys `paths` are
    left as they are, for the command line quotes them itself.
    """
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ValueError(f"{path}: no search space is there to be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML ({' '.join(str(error).split())[:160]})") from None
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{path}: a search space has lines of key: values, where values are {_SHAPE}")
    parameters: list[Parameter] = []
    for key, given in found.items():
        try:
            parameters.append(_parameter(str(key), given, parameters, paths))
        except ValueError as error:
            raise ValueError(f"{path}: {key}: {error}") from None
    return parameters


def draw(parameters: Sequence[Parameter], trial: Draws) -> dict[str, str]:
    """The keys that this trial sets, with what is typed behind the =."""
    drawn: dict[str, str] = {}
    for one in parameters:
        if any(drawn.get(key) not in allowed for key, allowed in one.when.items()):
            continue
        if one.kind == "choice":
            drawn[one.key] = str(trial.suggest_categorical(one.key, list(one.choices)))
        elif one.kind == "float":
            drawn[one.key] = repr(trial.suggest_float(one.key, one.low, one.high, step=one.step, log=one.log))
        else:
            step = int(one.step or 1)
            drawn[one.key] = str(trial.suggest_int(one.key, int(one.low), int(one.high), step=step, log=one.log))
    return drawn


def overrides_of(drawn: Mapping[str, str]) -> list[str]:
    """As arguments of `train`: choices of groups first, because they bring the keys that others set."""
    return [f"{key}={value}" for key, value in sorted(drawn.items(), key=lambda item: "." in item[0])]


def corners(parameters: Sequence[Parameter]) -> Iterator[tuple[Parameter, list[str]]]:
    """For each parameter, all choices or both ends, beside every choice that lets it be drawn and every one of the
    group that it lies in: what is to be checked.
    """
    by_key = {one.key: one for one in parameters}
    for one in parameters:
        if one.kind == "choice":
            values: Sequence[str] = one.choices
        else:
            values = [repr(one.low), repr(one.high)] if one.kind == "float" else [str(int(one.low)), str(int(one.high))]
        for value in dict.fromkeys(values):
            for others in _contexts(one, by_key):
                yield one, overrides_of({**others, one.key: value})


def plain(parameters: Sequence[Parameter]) -> dict[str, Any]:
    """The space as plain data, by which two are compared."""
    return {
        one.key: {
            key: ({name: list(values) for name, values in value.items()} if key == "when" else value)
            for key, value in (asdict(one) | {"choices": list(one.choices)}).items()
            if key != "key" and value not in (None, False, [], {})
        }
        for one in parameters
    }


def typed_value(value: Any) -> str:
    """A value of YAML as Hydra's command line takes it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list):
        return f"[{','.join(map(typed_value, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{typed_value(one)}' for key, one in value.items())}}}"
    text = str(value)
    is_word = re.fullmatch(_PLAIN, text) and text.lower() not in ("null", "true", "false", "nan", "inf")
    if is_word or _number(text) is not None:
        return text
    escaped = re.sub(r"(\\*)'", lambda match: match[1] * 2 + r"\'", text)
    # The last backslashes would escape the quote.
    escaped = re.sub(r"\\+$", lambda match: match[0] * 2, escaped)
    return f"'{escaped}'"


def _parameter(key: str, given: Any, above: Sequence[Parameter], paths: Collection[str]) -> Parameter:
    given = {"choice": given} if isinstance(given, list) else given
    kinds = [kind for kind in _KINDS if isinstance(given, dict) and kind in given]
    if len(kinds) != 1:
        raise ValueError(f"its values must be {_SHAPE}")
    if not re.fullmatch(r"\+{0,2}[\w@/.-]+", key):
        raise ValueError("not a key of train")
    if any(one.key.lstrip("+") == key.lstrip("+") for one in above):
        raise ValueError("is there twice, with and without +")
    kind = kinds[0]
    known = (kind, "when") if kind == "choice" else (kind, "when", "log", "step")
    odd = next((one for one in given if one not in known), None)
    if odd is not None:
        raise ValueError(f"{odd} says nothing of a {kind}; known are {', '.join(known)}")
    when = _conditions(given.get("when") or {}, above)
    values = given[kind]
    if kind == "choice":
        if not isinstance(values, list) or len({typed_value(one) for one in values}) < max(len(values), 1):
            raise ValueError("needs a [list] of different values")
        is_path = key.lstrip("+") in paths
        typed = [one if is_path and isinstance(one, str) else typed_value(one) for one in values]
        return Parameter(key, kind, tuple(typed), when=when)
    ends = [_number(one) for one in values] if isinstance(values, list) else []
    low, high = (ends[0], ends[1]) if len(ends) == 2 else (None, None)
    if low is None or high is None or not low < high:
        raise ValueError(f"{kind} takes [low, high], two numbers of which the first is smaller, not {values}")
    if kind == "int" and (low != int(low) or high != int(high)):
        raise ValueError(f"int takes whole numbers, not {values}")
    log, step = given.get("log", False), given.get("step")
    if not isinstance(log, bool):
        raise ValueError(f"log must be true or false, not {log}")
    if log and low <= 0:
        raise ValueError(f"log needs numbers above 0, not {values}")
    width = _number(step) if step is not None else None
    if step is not None and (width is None or width <= 0 or log or (kind == "int" and width != int(width))):
        raise ValueError(
            f"step must be a {'whole ' if kind == 'int' else ''}number above 0, and goes without log: true"
        )
    steps = (high - low) / width if width is not None else 1
    if width is not None and abs(steps - round(steps)) > 1e-9 * max(1, steps):
        raise ValueError(f"steps of {step} from {values[0]} do not reach {values[1]}, but {low + int(steps) * width:g}")
    return Parameter(key, kind, (), low, high, log, width, when)


def _conditions(given: Any, above: Sequence[Parameter]) -> dict[str, tuple[str, ...]]:
    if not isinstance(given, dict):
        raise ValueError(f"when takes {{key: value}}, not {given}")
    found = {}
    for key, allowed in given.items():
        parent = next((one for one in above if one.key == str(key)), None)
        if parent is None or parent.kind != "choice":
            raise ValueError(f"when: {key} must be a key of choices that stands above")
        found[parent.key] = tuple(typed_value(one) for one in (allowed if isinstance(allowed, list) else [allowed]))
        odd = next((one for one in found[parent.key] if one not in parent.choices), None)
        if odd is not None:
            raise ValueError(f"when: {key} is never {odd}; its values are {', '.join(parent.choices)}")
    return found


def _contexts(one: Parameter, by_key: Mapping[str, Parameter]) -> list[dict[str, str]]:
    """What else is drawn, in all the ways that let this one be drawn."""
    conditions = dict(one.when)
    group, _, own = one.key.lstrip("+").partition(".")
    if own and group in by_key and by_key[group].kind == "choice":
        conditions.setdefault(group, by_key[group].choices)
    found: list[dict[str, str]] = [{}]
    for key, allowed in conditions.items():
        ways = [{**above, key: value} for above in _contexts(by_key[key], by_key) for value in allowed]
        # Two conditions may depend on one key.
        found = [{**a, **b} for a in found for b in ways if all(a.get(key, value) == value for key, value in b.items())]
    return found


def _number(value: Any) -> float | None:
    """A finite number, also one that YAML reads as text (1e-5)."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


class _Loader(yaml.SafeLoader):
    """YAML keeps the last of two equal keys without a word."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(one, deep=True) for one, _ in node.value]
        twice = next((key for number, key in enumerate(keys) if key in keys[:number]), None)
        if twice is not None:
            raise yaml.YAMLError(f"{twice} is there twice")
        return super().construct_mapping(node, deep)
