"""`fit`: fits a refiner on saved predictions whose prompts are known, and refines those of other images."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from jaxtyping import Float
from torch import Tensor

from img2prompt.cache import cache_folder
from img2prompt.commands.settings import chosen_config, compose
from img2prompt.data.kaggle import read_prompts
from img2prompt.data.prompt_files import read_bank_prompts
from img2prompt.data.prompts import prompt_key, prompt_numbers
from img2prompt.data.targets import DEFAULT_MODEL, TextModel, embeddings_of, locate
from img2prompt.files import write_json
from img2prompt.hub import describe
from img2prompt.metrics import bootstrap_interval, cosines
from img2prompt.predictions import FINDINGS, WRITERS, Prediction, read_predictions
from img2prompt.predictors.predictor import Setting
from img2prompt.predictors.retrieval import target_rows
from img2prompt.predictors.trained import pick_device
from img2prompt.refine.bank_blend import BankBlend
from img2prompt.refine.ensemble import Ensemble
from img2prompt.refine.linear import Linear
from img2prompt.refine.refiner import Refiner, blend, equal
from img2prompt.submission import DIMENSION, write_submission

_NAMED = 3


def main(arguments: list[str]) -> None:
    chosen = chosen_config("fit", arguments)
    if chosen == "fit_confidence":
        from img2prompt.commands.calibrate import calibrate

        calibrate(**compose(chosen, arguments))
        return
    if chosen != "fit":
        from img2prompt.commands.tune import tune

        tune(**compose(chosen, arguments))
        return
    fit(**compose("fit", arguments))


def fit(
    refiner: Mapping[str, Any],
    source: str | list[Any],
    prompts: str | None,
    apply_to: str | list[Any] | None,
    out: str | None,
    truth: str | None,
    weights: str | None,
    text_model: str | None,
    device: str,
    cache_dir: str | None,
) -> None:
    """Writes the refined `apply_to` to `out` and prints what the refiner is worth. ValueError says what is wrong."""
    for key, value in (("prompts", prompts), ("out", out), ("apply_to", apply_to)):
        if value is None or value == "":
            raise ValueError(f"{key} must be given")
    assert prompts and out and apply_to is not None
    sources, targets = (
        [str(one) for one in ([given] if isinstance(given, str) else given)] for given in (source, apply_to)
    )
    chosen: Refiner = instantiate(refiner)
    saves_weights = isinstance(chosen, Ensemble)
    goal = goal_of(out, [*sources, *targets, prompts, *([truth] if truth else [])], weights, saves_weights)
    device = pick_device(device)
    if len(sources) != len(targets):
        raise ValueError(
            f"apply_to has {len(targets)} prediction files and source {len(sources)}; give the same members, in the "
            "same order"
        )
    given = None if saves_weights else _read_weights(weights, sources)
    known = Known(prompts, read_prompts(prompts))
    answers = None if truth is None else Known(truth, read_prompts(truth))
    ids, members, _ = aligned(sources, "source")
    target_ids, target_members, columns = aligned(targets, "apply_to")
    width = members.shape[2]
    if target_members.shape[2] != width:
        raise ValueError(
            f"{targets[0]}: its embeddings have {target_members.shape[2]} numbers, those of {sources[0]} {width}"
        )
    if goal.suffix == ".csv" and width != DIMENSION:
        raise ValueError(f"out={out}: a submission has {DIMENSION} values an image, these predictions {width}")
    if answers is not None:
        answers.rows_of(target_ids, targets[0])
    # In the order of their ids: the centroids of another order would be others.
    rows = sorted(known.rows_of(ids, sources[0]), key=lambda row: ids[row])
    if len(rows) < len(ids):
        missing = [one for one in ids if one not in known.prompts]
        print(f"{len(missing)} images of source have no prompt and are left out: {_some(missing)}", file=sys.stderr)
    texts = known.of([ids[row] for row in rows])
    model = located(text_model)
    goals = embedded(texts, model, device, cache_dir, width)
    groups = prompt_numbers(texts)
    members, target_members, goals = members[:, rows].to(device), target_members.to(device), goals.to(device)
    tell_leaks(ids, target_ids, texts, answers)

    if isinstance(chosen, BankBlend):
        _give_bank(chosen, texts, Setting(device, "fp32", model.name, cache_folder(cache_dir), 0, 0, ()), width)
    chosen.fit(members, goals, groups, given)
    refined = chosen.refine(target_members)
    plain = Linear()
    plain.fit(members, goals, groups, chosen.weights.tolist())
    if len(targets) > 1:
        # How near the members are to what was made of them.
        columns["agreement"] = torch.stack([cosines(one, refined) for one in target_members]).mean(0).tolist()
    _write(goal, Prediction(target_ids, refined.cpu().numpy(), columns))
    if saves_weights and weights is not None:
        write_json(weights, dict(zip(sources, chosen.weights.tolist(), strict=True)))

    print(f"{chosen.name} of {len(sources)} members, fitted to {len(rows)} images of {groups.max() + 1} prompts")
    both = zip(sources, targets, strict=True)
    print("\n".join(f"  {number}: {one}, then {other}" for number, (one, other) in enumerate(both, start=1)))
    print("\n".join(chosen.lines() + ([] if isinstance(chosen, Linear) else plain.lines())))
    if answers is not None:
        found = {f"member {number}": member for number, member in enumerate(target_members, start=1)}
        found["equal mean"] = blend(target_members, equal(len(targets)))
        found[plain.name] = plain.refine(target_members)
        found[chosen.name] = refined
        found["constant mean"] = goals.mean(0, keepdim=True).expand_as(refined)
        kept = answers.rows_of(target_ids, targets[0])
        named = answers.of([target_ids[row] for row in kept])
        reality = embedded(named, model, device, cache_dir, width).to(device)
        print(scores({name: each[kept] for name, each in found.items()}, reality, named))
    print(f"{len(target_ids)} images refined: {goal}")


def _give_bank(refiner: BankBlend, texts: Sequence[str], setting: Setting, width: int) -> None:
    """The bank without the prompts of the source: who finds the very prompt learns nothing of what neighbours do."""
    prompts = read_bank_prompts(refiner.bank, "refiner.bank")
    own = {prompt_key(text) for text in texts}
    others = [prompt for prompt in prompts if prompt_key(prompt) not in own]
    if len(others) < len(prompts):
        print(f"{len(prompts) - len(others)} prompts of the bank are the source's and are left out", file=sys.stderr)
    if not others:
        raise ValueError(f"refiner.bank={refiner.bank}: all of its prompts are the source's; give others")
    rows = target_rows(others, setting)
    assert rows.shape[1] == width, "the source was embedded by the same model"
    refiner.use(rows)


def aligned(paths: Sequence[str], key: str) -> tuple[list[str], Float[Tensor, "M N D"], dict[str, list[Any]]]:
    """The ids of the images that all files predict, the members' embeddings in the order of the first file, and its
    columns but for what its model found. ValueError, with some ids, when the files are of other images, or when their
    widths differ.
    """
    if not paths:
        raise ValueError(f"{key} must name a prediction file, or a [list] of them")
    resolved = [Path(path).resolve() for path in paths]
    twice = next((path for number, path in enumerate(paths) if resolved[number] in resolved[:number]), None)
    if twice is not None:
        raise ValueError(f"{key}: {twice} is named twice; each member once")
    first = read_predictions(paths[0])
    members = torch.empty(len(paths), *first.embeddings.shape)
    members[0] = torch.from_numpy(first.embeddings)
    for number, path in enumerate(paths[1:], start=1):
        other = read_predictions(path)
        place = {one: row for row, one in enumerate(other.ids)}
        lacking = [one for one in first.ids if one not in place]
        more = sorted(place.keys() - set(first.ids))
        if lacking or more:
            who, whom, some = (path, paths[0], lacking) if lacking else (paths[0], path, more)
            raise ValueError(
                f"{who}: {len(some)} images of {whom} are not in it ({_some(some)}); the members of {key} must predict "
                "the same images"
            )
        if other.embeddings.shape[1] != first.embeddings.shape[1]:
            raise ValueError(
                f"{path}: its embeddings have {other.embeddings.shape[1]} numbers, those of {paths[0]} "
                f"{first.embeddings.shape[1]}"
            )
        members[number] = torch.from_numpy(other.embeddings[[place[one] for one in first.ids]])
    columns = {name: values for name, values in first.columns.items() if name not in FINDINGS}
    return first.ids, members, columns


class Known:
    """Prompts by the ids of their images; empty ones are not known."""

    def __init__(self, path: str, rows: Sequence[tuple[str, str]]) -> None:
        self.path = path
        self.prompts = {image_id: prompt for image_id, prompt in rows if prompt.strip()}

    def rows_of(self, ids: Sequence[str], predictions: str) -> list[int]:
        """The rows of `ids` with a prompt; ValueError when there is none: the ids are others."""
        rows = [row for row, one in enumerate(ids) if one in self.prompts]
        if not rows:
            raise ValueError(
                f"{self.path}: none of its {len(self.prompts)} imgIds with a prompt (first: "
                f"{next(iter(self.prompts), None)}) is an id of {predictions} (first: {ids[0]})"
            )
        return rows

    def of(self, ids: Sequence[str]) -> list[str]:
        return [self.prompts[one] for one in ids]


def goal_of(out: str, inputs: Sequence[str], weights: str | None, saves_weights: bool) -> Path:
    """Where the result goes; ValueError when that is an input, or no file that can be written."""
    goal = Path(out)
    if goal.suffix not in (*WRITERS, ".csv"):
        raise ValueError(f"out={out}: the ending must be one of {', '.join(WRITERS)}, .csv")
    written = {"out": goal}
    if weights is not None and saves_weights:
        written["weights"] = Path(weights)
        if written["weights"].suffix != ".json":
            raise ValueError(f"weights={weights}: the ending must be .json")
    else:
        inputs = [*inputs, *([weights] if weights else [])]
    for key, path in written.items():
        if path.is_dir():
            raise ValueError(f"{key}={path}: a folder; give a file name")
        same = next((one for one in inputs if path.resolve() == Path(one).resolve()), None)
        if same is not None:
            raise ValueError(f"{key}={path}: would replace what it is made from; choose another name")
    return goal


def _read_weights(path: str | None, sources: Sequence[str]) -> list[float] | None:
    """The members' weights, of sum 1: a mapping of the files of source, as an ensemble writes it, or a list in their
    order.
    """
    if path is None:
        return None
    if not Path(path).is_file():
        raise ValueError(f"weights={path}: no such file; refiner=ensemble weights={path} writes it")
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"weights={path}: no JSON file that can be read ({str(error)[:120]})") from None
    if isinstance(found, dict):
        if set(found) != set(sources):
            raise ValueError(f"weights={path}: it weighs {', '.join(found)}, and source is {', '.join(sources)}")
        found = [found[one] for one in sources]
    numbers = isinstance(found, list) and all(type(one) in (int, float) and 0 <= one < math.inf for one in found)
    if not numbers or len(found) != len(sources) or not sum(found):
        raise ValueError(
            f"weights={path}: expected {len(sources)} numbers of at least 0 and not all 0, one for each file of source"
        )
    return [one / sum(found) for one in found]


def located(text_model: str | None) -> TextModel:
    model = locate(DEFAULT_MODEL if text_model is None else text_model)
    if model.download is not None:
        print(f"downloading {describe(model.download)}", file=sys.stderr)
    return model


def embedded(
    texts: Sequence[str], model: TextModel, device: str, cache_dir: str | None, width: int | None
) -> Float[Tensor, "N D"]:
    embeddings = embeddings_of(texts, model, "fp32", device, cache_folder(cache_dir))
    if width is not None and embeddings.shape[1] != width:
        raise ValueError(
            f"the predictions have {width} numbers an image, {model.name} {embeddings.shape[1]}; give the text encoder "
            "of their target as text_model="
        )
    return torch.from_numpy(embeddings)


def tell_leaks(ids: Sequence[str], target_ids: Sequence[str], texts: Sequence[str], answers: "Known | None") -> None:
    """Says what would make the scores of the target too good."""
    both = sorted(set(target_ids) & set(ids))
    if both:
        print(f"{len(both)} ids are in source and in apply_to: {_some(both)}", file=sys.stderr)
    if answers is not None:
        keys = {prompt_key(text) for text in texts}
        seen = sum(prompt_key(answers.prompts[one]) in keys for one in target_ids if one in answers.prompts)
        if seen:
            print(f"{seen} images of apply_to have a prompt of the source: their scores are too good", file=sys.stderr)


def _write(goal: Path, prediction: Prediction) -> None:
    if goal.suffix == ".csv":
        write_submission(goal, [prediction], prediction.ids)
    else:
        WRITERS[goal.suffix](goal, [prediction])


def scores(found: Mapping[str, Float[Tensor, "N D"]], reality: Float[Tensor, "N D"], texts: Sequence[str]) -> str:
    width = max(map(len, found))
    lines = [f"{len(texts)} images of apply_to with a prompt:", f"{'':<{width}}  mean cosine  95 % interval"]
    groups = prompt_numbers(texts)
    for name, rows in found.items():
        values = cosines(rows, reality).cpu()
        low, high = bootstrap_interval(values, groups)
        lines.append(f"{name:<{width}}  {values.mean():11.4f}  {low:.4f} to {high:.4f}")
    return "\n".join(lines)


def _some(ids: Sequence[str]) -> str:
    return ", ".join(ids[:_NAMED]) + (", …" if len(ids) > _NAMED else "")
