"""`fit refiner=confidence`: learns from saved predictions with known prompts how sure others can be."""

import sys
from collections.abc import Mapping
from pathlib import Path

from img2prompt.commands.fit import Known, embedded, located, tell_leaks
from img2prompt.data.kaggle import read_prompts
from img2prompt.data.prompts import prompt_numbers
from img2prompt.metrics import cosines
from img2prompt.predictions import WRITERS, read_predictions, taken
from img2prompt.predictors.trained import pick_device
from img2prompt.refine.confidence import calibrated, reliability


def calibrate(
    refiner: Mapping[str, str],
    source: str | list[str],
    prompts: str,
    weights: str,
    apply_to: str | list[str] | None,
    out: str | None,
    truth: str | None,
    text_model: str | None,
    device: str,
    cache_dir: str | None,
) -> None:
    """Writes what was learnt to `weights`, and `apply_to` with it to `out`. ValueError says what is wrong."""
    source, apply_to = _one("source", source), None if apply_to is None else _one("apply_to", apply_to)
    saved = Path(weights)
    if saved.suffix != ".json":
        raise ValueError(f"weights={weights}: the ending must be .json")
    if (apply_to is None) != (out is None) or (truth is not None and apply_to is None):
        raise ValueError("apply_to and out must be given together, and truth with them")
    if out is not None and Path(out).suffix not in WRITERS:
        raise ValueError(f"out={out}: the ending must be one of {', '.join(WRITERS)}")
    made_of = [Path(one).resolve() for one in (source, prompts, apply_to, truth) if one is not None]
    for key, path in (("weights", saved), ("out", Path(out) if out is not None else None)):
        if path is not None and path.is_dir():
            raise ValueError(f"{key}={path}: a folder; give a file name")
        if path is not None and path.resolve() in made_of:
            raise ValueError(f"{key}={path}: would replace what it is made from; choose another name")
    device = pick_device(device)
    predictions, known = read_predictions(source), Known(prompts, read_prompts(prompts))
    others = None if apply_to is None else read_predictions(apply_to)
    answers = None if truth is None else Known(truth, read_prompts(truth))
    if answers is not None and others is not None:
        answers.rows_of(others.ids, str(apply_to))
    rows = known.rows_of(predictions.ids, source)
    if len(rows) < len(predictions):
        print(f"{len(predictions) - len(rows)} images of source have no prompt and are left out", file=sys.stderr)
    texts = known.of([predictions.ids[row] for row in rows])
    model = located(text_model)
    targets = embedded(texts, model, device, cache_dir, predictions.embeddings.shape[1])
    tell_leaks(predictions.ids, others.ids if others is not None else [], texts, answers)
    found = calibrated(taken(predictions, rows), targets.numpy(), prompt_numbers(texts))
    if others is not None:
        others.columns["confidence"] = found(others).tolist()
    found.save(saved)
    print("\n".join(found.lines()))
    print(f"its features: {', '.join(found.features)}; saved: {saved}")
    if others is None or out is None:
        return
    WRITERS[Path(out).suffix](Path(out), [others])
    if answers is not None:
        kept = taken(others, answers.rows_of(others.ids, str(apply_to)))
        goals = embedded(answers.of(kept.ids), model, device, cache_dir, kept.embeddings.shape[1])
        said = found(kept)
        real = cosines(goals.new_tensor(kept.embeddings), goals).double().numpy()
        told = reliability(said, real)
        print(
            f"{len(kept)} images of apply_to with a prompt: mean confidence {said.mean():.4f}, mean cosine "
            f"{real.mean():.4f}, {told.told()}"
        )
    print(f"{len(others)} images: {out}")


def _one(key: str, given: str | list[str]) -> str:
    files = [given] if isinstance(given, str) else given
    if len(files) != 1:
        raise ValueError(f"{key}: confidence is learnt of one file; blend several first, by img2prompt fit")
    return str(files[0])
