"""Which parts of Reverse Stable Diffusion help on real pictures with captions: words, easy pairs first, DAKL.

Trains the models of `+experiment=clipart` on DIR (prompts.csv, images/) with the ImageNet weights FILE, blends and
refines their predictions, and writes means and standard deviations over the seeds. What RUNS already has is not done
again. Folds of the validation images keep prompts of a cosine of 0.7 together, as the split does.

    python benchmarks/reverse_sd_study.py DIR FILE RUNS [SEED ...]
"""

import csv
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from record import record

from img2prompt.data.duplicates import joined

ROOT = Path(__file__).parents[1]
_WORDS = ["head=joint_vocabulary", "head.vocabulary_size=300", "head.dropout=0.5", "loss=joint"]
_SAME_SIDE = 0.7
_SCORE = re.compile(r"^(\S.*?)  +(\d\.\d{4})  \d\.\d{4} to ")


def main() -> None:
    data, weights, runs = (Path(one).resolve() for one in sys.argv[1:4])
    seeds = [int(one) for one in sys.argv[4:]] or [0, 1, 2]
    found = [_of_seed(data, weights, runs, seed) for seed in seeds]
    rows = []
    for name in found[0]:
        values = [each[name] for each in found]
        spread = statistics.stdev(values) if len(values) > 1 else float("nan")
        of_seeds = {f"seed_{seed}": f"{value:.4f}" for seed, value in zip(seeds, values, strict=True)}
        rows.append({"what": name, **of_seeds, "mean": f"{statistics.mean(values):.4f}", "std": f"{spread:.4f}"})
    record("reverse_sd_study", rows)


def _of_seed(data: Path, weights: Path, runs: Path, seed: int) -> dict[str, float]:
    """Every figure of one seed, by what it is of."""
    shared = ["+experiment=clipart", f"data.root={data}", f"encoder.pretrained={weights}", f"seed={seed}"]
    models = {
        "plain": ["curriculum=record"],
        "words": [*_WORDS, "curriculum=record"],
        "easy": ["curriculum=easy_first", f"curriculum.records={runs}/plain_{seed}"],
        "both": [*_WORDS, "curriculum=easy_first", f"curriculum.records={runs}/words_{seed}"],
    }
    found = {}
    for name, given in models.items():
        folder = runs / f"{name}_{seed}"
        if not (folder / "summary.json").is_file():
            _run("train.py", *shared, *given, f"run_dir={folder}", into=runs / f"{name}_{seed}.log")
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        found[name] = summary["val_cosine"]
        if "val_word_map" in summary:
            found |= {f"{name}: word {key}": summary[f"val_word_{key}"] for key in ("map", "f1")}
    return found | _refined(data, runs, seed, list(models))


def _refined(data: Path, runs: Path, seed: int, models: Sequence[str]) -> dict[str, float]:
    """What blends and refiners of the four models say of the validation images, by the source they were fitted on."""
    with (data / "prompts.csv").open(encoding="utf-8", newline="") as file:
        prompts = {row["imgId"]: row["prompt"] for row in csv.DictReader(file)}
    kept = pq.read_table(runs / f"plain_{seed}" / "validation.parquet").to_pydict()
    numbers = dict(zip(kept["prompt"], joined(torch.tensor(kept["embedding"]), _SAME_SIDE).tolist(), strict=True))
    val = sorted(one for one, prompt in prompts.items() if prompt in numbers)
    _, groups = np.unique([numbers[prompts[one]] for one in val], return_inverse=True)
    trained = sorted(pq.read_table(runs / f"plain_{seed}" / "own_cosine.parquet").to_pydict()["id"])
    sets = {"train": trained, "val": val}
    sets |= {f"fold{k}": [one for one, group in zip(val, groups, strict=True) if group % 2 == k] for k in (0, 1)}
    for name, ids in sets.items():
        listed = runs / f"{name}_{seed}.txt"
        listed.write_text("".join(f"{data}/images/{one}.png\n" for one in ids), encoding="utf-8")
        for model in models:
            out = runs / f"{model}_{seed}_{name}.parquet"
            if not out.is_file():
                _run("predict.py", f"ckpt={runs}/{model}_{seed}", f"images={listed}", f"out={out}")
    found: dict[str, float] = {}
    for refiner in ("dakl", "ensemble"):
        whole = _fitted(data, runs, seed, models, refiner, "train", "val")
        folds = [_fitted(data, runs, seed, models, refiner, f"fold{k}", f"fold{1 - k}") for k in (0, 1)]
        share = [len(sets["fold1"]) / len(val), len(sets["fold0"]) / len(val)]
        for name, value in whole.items():
            if name == "equal mean":
                found["equal mean of the four"] = value
            elif not name.startswith(("member", "constant")):
                found[f"{name}, fitted on training images"] = value
                found[f"{name}, fitted on the other half of validation"] = sum(
                    part * fold[name] for part, fold in zip(share, folds, strict=True)
                )
    return found


def _fitted(
    data: Path, runs: Path, seed: int, models: Sequence[str], refiner: str, source: str, target: str
) -> dict[str, float]:
    """Cosines on the target, by the name that `fit` gives them."""
    sources, targets = ([str(runs / f"{one}_{seed}_{name}.parquet") for one in models] for name in (source, target))
    told = _run(
        *("-m", "img2prompt", "fit", f"refiner={refiner}", f"prompts={data}/prompts.csv", f"truth={data}/prompts.csv"),
        *(f"source=[{','.join(sources)}]", f"apply_to=[{','.join(targets)}]"),
        f"out={runs}/{refiner}_{seed}_{source}.parquet",
    )
    return {line[1]: float(line[2]) for line in map(_SCORE.match, told.splitlines()) if line}


def _run(*arguments: str, into: Path | None = None) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, text=True, capture_output=True, check=False)
    if into is not None:
        into.write_text(done.stdout + done.stderr, encoding="utf-8")
    if done.returncode:
        sys.exit(f"{' '.join(arguments)}\n{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main()
