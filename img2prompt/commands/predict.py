"""`predict`: lists the images, predicts them part by part, and writes one file."""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from img2prompt.cache import cache_folder
from img2prompt.commands.aside import aside_of, set_aside
from img2prompt.commands.composing import Composer, Composing
from img2prompt.commands.predictor import TRAINED, check_numbers, check_use, made
from img2prompt.commands.settings import compose
from img2prompt.commands.truth import Truth
from img2prompt.data.decoding import EXTENSIONS
from img2prompt.data.listing import Listing, file_stamp, list_images, printable
from img2prompt.files import write_table
from img2prompt.predictions import WRITERS, Parts, Prediction, joined
from img2prompt.predictors.confident import Confident
from img2prompt.predictors.predictor import Predictor, Setting, items_of, predict_files
from img2prompt.predictors.trained import pick_device
from img2prompt.provenance import checkpoint_of, header_of, is_foreign, located
from img2prompt.regressor import BLIND
from img2prompt.submission import DIMENSION, write_submission
from img2prompt.training.run_folder import is_finished

PART_IMAGES = 512
_SHOWN = 10


def main(arguments: list[str]) -> None:
    predict(**compose("predict", arguments))


def predict(
    ckpt: str | None,
    images: str | list[str],
    out: str,
    prompts: str | None,
    text_model: str | None,
    device: str,
    batch_size: int,
    precision: str,
    top_k: int,
    top_words: int,
    threads: int,
    cache_dir: str | None = None,
    predictor: Mapping[str, Any] = TRAINED,
    views: Sequence[str] = (),
    compose: bool = False,
    compose_beams: int = 3,
    compose_phrases: int = 12,
    confidence: str | None = "auto",
    min_confidence: float | None = None,
) -> None:
    """Predicts `images` into the file `out`, and prints what a person wants to know. ValueError says what is wrong."""
    began = time.monotonic()
    for key, value in (("images", images), ("out", out)):
        if not value:
            raise ValueError(f"{key} must be given")
    check_use(predictor, ckpt, views)
    check_numbers(batch_size, threads, top_k, top_words, precision)
    how = Composing(compose_beams, compose_phrases)
    goal = Path(out)
    if goal.suffix not in (*WRITERS, ".csv"):
        raise ValueError(f"out={out}: the ending must be one of {', '.join(WRITERS)}, .csv")
    if goal.is_dir():
        raise ValueError(f"out={out}: a folder; give a file name")
    if compose and goal.suffix == ".csv":
        raise ValueError(f"out={out}: a submission has no place for composed prompts; leave out compose=true")
    if min_confidence is not None and goal.suffix == ".csv":
        raise ValueError(f"out={out}: a submission needs every image; leave out min_confidence")
    listed = [images] if isinstance(images, str) else images
    given_files = {Path(one).resolve() for one in [*listed, *(one for one in (ckpt, prompts) if one)]}
    if any(one.resolve() in given_files for one in (goal, aside_of(goal))):
        raise ValueError(f"out={out}: would replace what it is made from; choose another name")
    if ckpt is not None:
        # What is wrong with it is said before anything is read.
        ckpt = located(ckpt)
        introduce(ckpt)
    listing = list_images(images)
    if not listing.files and not listing.skipped:
        raise ValueError(f"images={images}: no image file there; endings: {', '.join(EXTENSIONS)}")
    setting = Setting(
        pick_device(device), precision, text_model, cache_folder(cache_dir), top_k, top_words, items_of(listing.files)
    )
    chosen = made(predictor, ckpt, setting, views, confidence)
    if min_confidence is not None and not isinstance(chosen, Confident):
        raise ValueError(
            f"min_confidence={min_confidence}: nothing says how sure this predictor is; give confidence=FILE, which "
            "img2prompt fit refiner=confidence writes"
        )
    if any(goal.resolve() == path.resolve() for path in chosen.files):
        raise ValueError(f"out={out}: would replace what it is made from; choose another name")
    if goal.suffix == ".csv" and chosen.dimension != DIMENSION:
        raise ValueError(
            f"out={out}: a submission has {DIMENSION} values an image, these predictions {chosen.dimension}"
        )
    if ckpt is not None and chosen.bank is None and top_k > 0:
        print(f"no bank of prompts beside {ckpt}: nearest prompts are left out", file=sys.stderr)
    # Before the images, so that what is wrong with it costs no prediction.
    truth = None if prompts is None else Truth(prompts, chosen, setting)
    if truth is not None:
        truth.embed(listing)
    composer = Composer(how, chosen, setting) if compose else None
    options = [precision, top_k, top_words, *views, *(composer.options() if composer else [])]
    twice = next((file.path for file in listing.files if file.id != printable(file.path.stem)), None)
    if goal.suffix == ".csv" and twice is not None:
        raise ValueError(
            f"out={out}: {twice} and another file would have the same imgId; a submission needs its own each"
        )
    with closing(_parts(goal, chosen, predictor, listing, options)) as parts:
        _fill(parts, chosen, composer, listing, batch_size, threads)
        skipped = listing.skipped + [item for part in parts for item in part.skipped]
        predicted = len(listing.files) + len(listing.skipped) - len(skipped)
        _report_skipped(goal, skipped)
        if predicted == 0:
            parts.remove()
            first_reason = f" (first: {skipped[0][0]}: {skipped[0][1]})" if skipped else ""
            raise ValueError(f"images={images}: no readable image among {len(skipped)} files{first_reason}")
        if goal.suffix == ".csv":
            write_submission(goal, _with_unreadable(parts, listing, chosen), [file.id for file in listing.files])
        else:
            if min_confidence is None:
                # Of an earlier job with this name.
                aside_of(goal).unlink(missing_ok=True)
            sure = parts if min_confidence is None else set_aside(goal, parts, min_confidence)
            WRITERS[goal.suffix](goal, sure)
        _show(next(iter(parts)), "training prompts" if ckpt is not None else "prompts of the bank")
        if truth is not None:
            truth.print_score(parts)
            if min_confidence is not None:
                print("without those set aside: ", end="")
                truth.print_score(sure)
            truth.print_controls(listing, batch_size, threads)
        parts.remove()
    seconds = time.monotonic() - began
    print(f"{predicted} images predicted, {len(skipped)} skipped, in {seconds:.1f} s after start-up: {goal}")


def _parts(
    goal: Path, chosen: Predictor, settings: Mapping[str, Any], listing: Listing, options: list[str | int]
) -> Parts:
    job = {
        "predictor": [dict(settings), chosen.target.model, *(printable(file_stamp(path)) for path in chosen.files)],
        "images": [[file.id, printable(file_stamp(file.path))] for file in listing.files],
        "options": [*options, PART_IMAGES],
    }
    parts = Parts(goal, job, -(-len(listing.files) // PART_IMAGES))
    if parts.discarded:
        print(f"{parts.discarded} parts of another job in {parts.folder} are discarded", file=sys.stderr)
    elif any(parts.has(number) for number in range(len(parts))):
        print(f"continuing from the parts in {parts.folder}", file=sys.stderr)
    return parts


def _fill(
    parts: Parts, predictor: Predictor, composer: Composer | None, listing: Listing, batch_size: int, threads: int
) -> None:
    """Predicts the parts that are not there yet."""
    for number in range(len(parts)):
        if not parts.has(number):
            files = listing.files[number * PART_IMAGES : (number + 1) * PART_IMAGES]
            part = joined(list(predict_files(predictor, files, batch_size, threads)))
            if composer is not None:
                composer.add_to(part)
            parts.write(number, part)
            print(f"{number * PART_IMAGES + len(files)} of {len(listing.files)} files", file=sys.stderr)


def introduce(ckpt: str) -> None:
    """Says which rung it is: the best so far of a run that was stopped may be no more than the mean."""
    header = header_of(ckpt)
    cosine = header.scores.get("val_cosine")
    score = f", validation cosine {cosine:.4f}" if isinstance(cosine, float) else ""
    print(f"{header.scores.get('rung', 'a checkpoint')} of {header.encoder.get('name') or 'no encoder'}{score}")
    run = Path() if is_foreign(Path(ckpt)) else checkpoint_of(Path(ckpt)).absolute().parent.parent
    if run.name and (run / "config.yaml").is_file() and not is_finished(run):
        print(f"the run in {run} is not finished: see its checkpoints, or go on with resume={run}", file=sys.stderr)
    if header.encoder.get("_target_") == BLIND:
        print("this is the mean rung: every image gets the same embedding", file=sys.stderr)


def _report_skipped(goal: Path, skipped: list[tuple[str, str]]) -> None:
    sidecar = goal.with_name(goal.name + ".skipped.csv")
    if not skipped:
        # Of an earlier job with this name.
        sidecar.unlink(missing_ok=True)
        return
    write_table(sidecar, [{"path": path, "reason": reason} for path, reason in skipped])
    print(f"{len(skipped)} files skipped; all are in {sidecar}:", file=sys.stderr)
    for path, reason in skipped[:_SHOWN]:
        print(f"  {path}: {reason}", file=sys.stderr)
    if len(skipped) > _SHOWN:
        print(f"  … and {len(skipped) - _SHOWN} more", file=sys.stderr)


def _with_unreadable(parts: Parts, listing: Listing, predictor: Predictor) -> Iterator[Prediction]:
    """The parts with the constant mean for unreadable images: a submission without every image is refused whole."""
    ids = {printable(file.path): file.id for file in listing.files}
    mean = torch.nn.functional.normalize(_mean(predictor, parts), dim=-1).numpy()
    for part in parts:
        bad = [ids[path] for path, _ in part.skipped]
        if bad:
            print(f"{len(bad)} unreadable images get the mean embedding in the submission", file=sys.stderr)
        yield Prediction(part.ids + bad, np.concatenate([part.embeddings, np.tile(mean, (len(bad), 1))]))


def _mean(predictor: Predictor, parts: Parts) -> Float[Tensor, " D"]:
    """Of what it was made from or, of what was made from no prompts, of what it says."""
    if predictor.mean is not None:
        return predictor.mean
    return torch.from_numpy(np.concatenate([part.embeddings for part in parts])).mean(0)


def _show(part: Prediction, bank: str) -> None:
    for title, texts, numbers, most in (
        (f"nearest {bank}", "nearest_prompts", "nearest_cosines", 1),
        ("composed prompts", "composed_prompt", "composed_cosine", 1),
        ("likeliest words", "words", "word_probabilities", 5),
    ):
        if texts not in part.columns:
            continue
        print(f"{title}:")
        rows = zip(part.ids, part.columns[texts], part.columns[numbers], strict=True)
        for image_id, words, values in list(rows)[:_SHOWN]:
            if isinstance(words, str):
                words, values = [words], [values]
            best = zip(words[:most], values[:most], strict=True)
            print(f"  {image_id}: {', '.join(f'{word} ({value:.3f})' for word, value in best)}")
    for image_id, caption in list(zip(part.ids, part.columns.get("caption", []), strict=False))[:_SHOWN]:
        print(f"  {image_id}: {caption}")
