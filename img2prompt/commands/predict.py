"""`predict`: lists the images, predicts them part by part, and writes one file."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from img2prompt.commands.door import compose
from img2prompt.data.kaggle import read_prompts
from img2prompt.data.listing import Listing, list_images, printable
from img2prompt.data.targets import TextEncoder, locate
from img2prompt.files import write_table
from img2prompt.metrics import bootstrap_interval, cosines
from img2prompt.predictions import WRITERS, Parts, Prediction, joined
from img2prompt.predictors.predictor import predict_files
from img2prompt.predictors.trained import Trained, checkpoint_of, load
from img2prompt.submission import DIMENSION, write_submission

PART_IMAGES = 512
_SHOWN = 10


def main(arguments: list[str]) -> None:
    predict(**compose("predict", arguments))


def predict(
    ckpt: str,
    images: str | list[str],
    out: str,
    prompts: str | None,
    device: str,
    batch_size: int,
    precision: str,
    top_k: int,
    threads: int,
) -> None:
    """Predicts `images` into the file `out`, and prints what a person wants to know. ValueError says what is wrong."""
    began = time.monotonic()
    for name, value in (("ckpt", ckpt), ("images", images), ("out", out)):
        if not value:
            raise ValueError(f"{name} must be given")
    goal = Path(out)
    writers = {**WRITERS, ".csv": write_submission}
    if goal.suffix not in writers:
        raise ValueError(f"out={out}: the ending must be one of {', '.join(writers)}")
    if goal.is_dir():
        raise ValueError(f"out={out}: a folder; give a file name")
    listed = [images] if isinstance(images, str) else images
    if any(goal.resolve() == Path(given).resolve() for given in [ckpt, *listed, *([prompts] if prompts else [])]):
        raise ValueError(f"out={out}: would replace what it is made from; choose another name")
    truth = dict(read_prompts(prompts)) if prompts is not None else {}
    checkpoint = checkpoint_of(Path(ckpt))
    predictor = load(checkpoint, device, precision, top_k)
    if goal.suffix == ".csv" and predictor.dimension != DIMENSION:
        raise ValueError(
            f"out={out}: a submission has {DIMENSION} values an image, {ckpt} predicts {predictor.dimension}"
        )
    if predictor.bank is None and top_k > 0:
        print(f"no bank of prompts beside {checkpoint.parent}: nearest prompts are left out", file=sys.stderr)
    listing = list_images(images)
    job = {
        "checkpoint": [str(checkpoint.resolve()), *_stamp(checkpoint)],
        "images": [[file.id, printable(file.path), *_stamp(file.path)] for file in listing.files],
        "options": [precision, top_k, PART_IMAGES],
    }
    parts = Parts(goal, job)
    if parts.continued:
        print(f"continuing from the parts in {parts.folder}", file=sys.stderr)
    numbers = range(0, len(listing.files), PART_IMAGES)
    for number, first in enumerate(numbers):
        if number not in parts:
            files = listing.files[first : first + PART_IMAGES]
            parts.write(number, joined(list(predict_files(predictor, files, batch_size, threads))))
            print(f"{first + len(files)} of {len(listing.files)} images", file=sys.stderr)
    skipped = listing.skipped + [item for part in parts.read(len(numbers)) for item in part.skipped]
    predicted = len(listing.files) + len(listing.skipped) - len(skipped)
    _report_skipped(goal, skipped)
    if predicted == 0:
        parts.remove()
        first_reason = f" (first: {skipped[0][0]}: {skipped[0][1]})" if skipped else ""
        raise ValueError(f"images={images}: no readable image among {len(skipped)} files{first_reason}")
    whole = parts.read(len(numbers))
    writers[goal.suffix](goal, _with_unreadable(whole, listing, predictor) if goal.suffix == ".csv" else whole)
    _show(parts.read(1))
    if prompts is not None:
        _print_score(parts.read(len(numbers)), truth, predictor)
    parts.remove()
    seconds = time.monotonic() - began
    print(f"{predicted} images predicted, {len(skipped)} skipped, in {seconds:.1f} s: {goal}")


def _stamp(path: Path) -> list[int]:
    try:
        status = path.stat()
    except OSError:
        return [-1, -1]
    return [status.st_size, status.st_mtime_ns]


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


def _with_unreadable(parts: Iterator[Prediction], listing: Listing, predictor: Trained) -> Iterator[Prediction]:
    """The parts with the constant mean for unreadable images: a submission without every image is refused whole."""
    ids = {printable(file.path): file.id for file in listing.files}
    mean = torch.nn.functional.normalize(predictor.regressor.target_mean.cpu(), dim=-1).numpy()
    for part in parts:
        bad = [ids[path] for path, _ in part.skipped]
        if bad:
            print(f"{len(bad)} unreadable images get the mean embedding in the submission", file=sys.stderr)
        yield Prediction(part.ids + bad, np.concatenate([part.embeddings, np.tile(mean, (len(bad), 1))]))


def _show(parts: Iterator[Prediction]) -> None:
    part = next(parts)
    prompts, scores = part.columns.get("nearest_prompts"), part.columns.get("nearest_cosines")
    if prompts is None or scores is None:
        return
    print("nearest training prompts:")
    for image_id, words, values in list(zip(part.ids, prompts, scores, strict=True))[:_SHOWN]:
        print(f"  {image_id}: {words[0]} ({values[0]:.3f})")


def _print_score(parts: Iterator[Prediction], truth: dict[str, str], predictor: Trained) -> None:
    scored: list[tuple[str, np.ndarray]] = []
    for part in parts:
        scored += [
            (image_id, row) for image_id, row in zip(part.ids, part.embeddings, strict=True) if image_id in truth
        ]
    if not scored:
        print("none of the images has a prompt in prompts=", file=sys.stderr)
        return
    target = predictor.regressor.target
    text = TextEncoder(locate(target.model, target.revision))
    if text.dimension != predictor.dimension:
        raise ValueError(
            f"target.model {target.model} has dimension {text.dimension}, the checkpoint {predictor.dimension}"
        )
    targets = torch.from_numpy(text.embed([truth[image_id] for image_id, _ in scored]))
    values = cosines(torch.from_numpy(np.stack([row for _, row in scored])), targets)
    mean = predictor.regressor.target_mean.cpu().expand_as(targets)
    low, high = bootstrap_interval(values)
    print(
        f"mean cosine {values.mean():.4f} (95 % interval {low:.4f} to {high:.4f}) over {len(scored)} images; "
        f"constant mean of the training targets {cosines(mean, targets).mean():.4f}"
    )
