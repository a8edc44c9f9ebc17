"""What a run leaves behind besides its checkpoints: words to read predictions by, and what came of it."""

import shlex
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from img2prompt.bank import read_bank, write_bank
from img2prompt.data.pixels import Pixels
from img2prompt.data.prompts import prompt_numbers
from img2prompt.data.sample import Sample, image_digest
from img2prompt.data.split import Earlier
from img2prompt.files import as_cell, write_json, write_table
from img2prompt.metrics import cosines
from img2prompt.predictions import Prediction
from img2prompt.predictors.trained import confidence_of
from img2prompt.provenance import checkpoint_of
from img2prompt.refine.confidence import NEIGHBOURS, calibrated
from img2prompt.regressor import load_regressor, read_header
from img2prompt.search import nearest
from img2prompt.training.datamodule import PairData
from img2prompt.training.ladder import Rung, best_rung, is_unfinished, table
from img2prompt.training.pairs import Rows, write_pairs
from img2prompt.training.scoring import score
from img2prompt.training.stages import Climb

_HELD_OUT_IMAGES = 200
_EXAMPLES = 3


@dataclass
class Judged:
    """What the best rung said of N validation images: their `rows` in the table, the cosines with their prompts, the
    training prompt that was nearest to each prediction, with its cosine.
    """

    rows: list[int]
    cosines: Float[Tensor, " N"]
    nearest_prompts: list[str]
    nearest_cosines: list[float]


def write_words(folder: Path, pairs: PairData) -> None:
    """bank.parquet, validation.parquet: the prompts; held_out/: validation pairs that exist nowhere else as files."""
    held_out = [pairs.samples[row] for row in pairs.val_rows[:_HELD_OUT_IMAGES]]
    if held_out[0].source.images is None:
        write_pairs(held_out, folder / "held_out")
    train = [pairs.samples[row] for row in pairs.train_rows]
    write_bank(folder / "bank.parquet", [sample.prompt for sample in train], pairs.targets[pairs.train_rows].numpy())
    held = [pairs.samples[row].prompt for row in pairs.val_rows]
    write_bank(folder / "validation.parquet", held, pairs.targets[pairs.val_rows].numpy())


def write_trained(folder: Path, rows: Rows, earlier: Earlier | None) -> None:
    """trained.json: what this run trains on, what it holds out, and what the runs before it trained on."""
    train = [sample for sample, held in zip(rows.samples, rows.validates, strict=True) if not held]
    held_out = {sample.prompt for sample, held in zip(rows.samples, rows.validates, strict=True) if held}
    # As they were found, too: another run may clean them otherwise.
    prompts = {text for sample in train for text in (sample.prompt, sample.raw_prompt) if text}
    images = {digest for sample in train if (digest := image_digest(sample)) is not None}
    combinations = {one for sample in train for one in sample.combinations}
    before = earlier or Earlier([], torch.zeros(0, 0), ())
    record = {
        **_sorted(prompts, images, combinations),
        "held_out": sorted(held_out),
        "earlier": _sorted(before.train_prompts, before.train_images, before.combinations),
    }
    write_json(folder / "trained.json", record)


def _sorted(
    prompts: Collection[str], images: Collection[str], combinations: Collection[tuple[str, ...]]
) -> dict[str, Any]:
    return {"prompts": sorted(prompts), "images": sorted(images), "combinations": sorted(combinations)}


def write_data_report(folder: Path, rows: Rows, split: dict[str, Any]) -> None:
    """lineage.csv, what each step of the data left; and split.json, how far training and validation are apart, with
    what `split` says of its settings.
    """
    write_table(folder / "lineage.csv", rows.lineage.table())
    sides = rows.sides
    counts = {"train_pairs": int((~sides.validates).sum()), "val_pairs": int(sides.validates.sum())}
    groups = {
        "largest_group": sides.largest_group,
        "pairs_in_large_groups": sides.too_large,
        "pairs_trained_before": sides.trained_before,
        "prompts_moved": sides.moved,
    }
    write_json(folder / "split.json", counts | groups | rows.leak | {"split": split})


def write_bad_images(folder: Path, samples: Sequence[Sample], pixels: Pixels) -> None:
    """bad_images.csv: ids, places and reasons of images that could not be decoded; nothing when all could."""
    if not pixels.bad:
        return
    bad = [
        {"id": (sample := samples[row]).id, "path": place_of(sample), "reason": reason}
        for row, reason in sorted(pixels.bad.items())
    ]
    write_table(folder / "bad_images.csv", bad)
    print(f"\n{len(bad)} images were bad and left out; bad_images.csv lists them", file=sys.stderr)


def write_scores(folder: Path, samples: Sequence[Sample], judged: Judged) -> None:
    """scores.csv: what the best rung says of each validation image."""
    write_table(
        folder / "scores.csv",
        [
            {
                "id": as_cell(samples[row].id),
                "source": samples[row].source.name,
                "path": place_of(samples[row]) if samples[row].source.images is not None else "",
                "cosine": f"{cosine:.6f}",
                "prompt": as_cell(samples[row].prompt),
                "nearest_prompt": as_cell(judged.nearest_prompts[number]),
                "nearest_cosine": f"{judged.nearest_cosines[number]:.6f}",
            }
            for number, (row, cosine) in enumerate(zip(judged.rows, judged.cosines.tolist(), strict=True))
        ],
    )


def summarise(folder: Path, rungs: list[Rung], climb: Climb) -> tuple[dict[str, Any], Judged]:
    """Prints the ladder, examples and the command to predict with; returns what summary.json says of them, and what
    was said of each image.

    The best checkpoint is scored again from its file, as a user will have it. ValueError when no rung was climbed.
    """
    best = best_rung(rungs)
    if best is None:
        raise ValueError("no rung of the ladder was climbed; see stages")
    write_table(
        folder / "timings.csv", [{"rung": rung.rung, "seconds": rung.seconds} for rung in rungs if rung.seconds]
    )
    checkpoint = checkpoint_of(folder)
    regressor = load_regressor(checkpoint).to(climb.regressor.target_mean.device)
    # What sees nothing is scored by images of any size.
    pairs = climb.data_at(regressor.encoder.preprocessing.image_size_px) if regressor.encoder.width else climb.data
    scored = score(regressor, pairs, climb.bf16)
    values, rows, predicted = scored.cosines, scored.rows, scored.predicted
    bank = read_bank(folder / "bank.parquet")
    near_cosines, near = nearest(predicted, bank.embeddings, NEIGHBOURS)
    nearest_prompts = [bank.prompts[row] for row in near[:, 0].tolist()]
    columns = {"norm": scored.norms.tolist(), "nearest_cosines": near_cosines.tolist()}
    predictions = Prediction([pairs.samples[row].id for row in rows], predicted.numpy(), columns)
    nearest_prompt = cosines(bank.embeddings[near[:, 0]], pairs.targets[rows])
    print(f"\n{table(rungs)}\n\nbest: {best.rung}")
    print(f"nearest training prompt to each prediction, as the answer: {nearest_prompt.mean():.4f}")
    if scored.words:
        told = "mean average precision {word_map:.4f}, F1 {word_f1:.4f}".format(**scored.words)
        print(f"words of the vocabulary on validation: {told}")
    _learn_confidence(predictions, pairs, rows, checkpoint)
    sources = [pairs.samples[row].source.name for row in rows]
    by_source = {
        name: float(values[[i for i, one in enumerate(sources) if one == name]].mean()) for name in sorted(set(sources))
    }
    if len(by_source) > 1:
        print("validation by source: " + ", ".join(f"{name} {value:.4f}" for name, value in by_source.items()))
    print("\nheld-out examples: prompt, then the nearest training prompt to its prediction (cosine)")
    for i in torch.linspace(0, len(rows) - 1, min(_EXAMPLES, len(rows))).long().tolist():
        print(f"  {pairs.samples[rows[i]].prompt}\n    {nearest_prompts[i]} ({near_cosines[i, 0]:.3f})")
    if is_unfinished(rungs[-1]):
        told = "go on for as long again, or with trainer.max_time=null to the end"
        print(f"\n{rungs[-1].note}; {told}:\n  python train.py resume={shlex.quote(str(folder))}")
    print(f"\npredict with it:\n  {_command(folder, pairs.samples[rows[0]].source.images)}")
    judged = Judged(rows, values, nearest_prompts, near_cosines[:, 0].tolist())
    return {
        "val_cosine": float(values.mean()),
        "val_interval": [best.low, best.high],
        "val_cosine_by_source": by_source,
        **{f"val_{name}": value for name, value in scored.words.items()},
        "mean_baseline": next((rung.val_cosine for rung in rungs if rung.rung == "mean"), None),
        "nearest_prompt_baseline": float(nearest_prompt.mean()),
        "best_rung": best.rung,
        "unfinished": next((rung.note for rung in rungs if is_unfinished(rung)), None),
        "checkpoint": str(checkpoint),
        "images_per_second": climb.images_per_second,
        "train_pairs": len(pairs.train_rows),
        "val_pairs": len(rows),
        "bad_images": len(pairs.pixels.bad),
    }, judged


def _learn_confidence(predictions: Prediction, pairs: PairData, rows: Sequence[int], checkpoint: Path) -> None:
    """confidence.json: what validation says of how near the best checkpoint's predictions are; it may be too small."""
    groups = prompt_numbers([pairs.samples[row].prompt for row in rows])
    file = confidence_of(checkpoint)
    try:
        found = calibrated(predictions, pairs.targets[rows].numpy(), groups, read_header(checkpoint).scores)
    except ValueError as error:
        # Of an earlier best rung.
        file.unlink(missing_ok=True)
        print(f"confidence: {error}", file=sys.stderr)
        return
    found.save(file)
    print("\n".join(found.lines()))


def place_of(sample: Sample) -> str:
    """Where its image is, for people: the path of a file, or an archive and the member's name or offset."""
    place = sample.location.replace("\0", " ")
    return str(sample.source.images / place) if sample.source.images is not None else place


def _command(folder: Path, images: Path | None) -> str:
    command = ["python", "predict.py", f"ckpt={folder}"]
    if images is not None:
        # Most of them were trained on, so their prompts would give a score that means nothing.
        command.append(f"images={images}")
    else:
        command += [f"images={folder / 'held_out' / 'images'}", f"prompts={folder / 'held_out' / 'prompts.csv'}"]
    return " ".join(shlex.quote(part) for part in command)
