"""What evaluation says of a regressor trained on clip art: views, robustness, confidence, composed prompts, and then of
the competition's seven images, which are of another kind.

RUN is `python train.py +experiment=clipart data.root=DIR encoder.pretrained=FILE`; its validation images are what is
evaluated, unless it says otherwise. KAGGLE7 is a folder of prompts.csv and images/.

    python benchmarks/clipart_study.py DIR RUN KAGGLE7
"""

import csv
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow.parquet as pq
import torch
from record import record

from img2prompt.cache import cache_folder
from img2prompt.data.prompts import prompt_numbers
from img2prompt.data.targets import embeddings_of, locate
from img2prompt.metrics import bootstrap_interval, cosines
from img2prompt.predictions import read_predictions

ROOT = Path(__file__).parent.parent
VIEWS = ("[flip]", "[flip,crops,sizes]")


def main() -> None:
    data, run, seven = (Path(one).resolve() for one in sys.argv[1:4])
    rows: list[dict[str, object]] = []

    def add(what: str, mean: float, low: float | None = None, high: float | None = None) -> None:
        interval = "" if low is None else f"{low:.4f} to {high:.4f}"
        rows.append({"what": what, "value": f"{mean:.4f}", "interval": interval})

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prompts = _validation(data, run, folder / "val")
        listed = [f"{{predictor: {run}, as: plain}}"]
        listed += [f"{{predictor: {run}, views: {views}, as: 'views {views}'}}" for views in VIEWS]
        found = _evaluated(folder / "views", folder / "val", listed)
        for one in found["predictors"]:
            add(one["predictor"], one["mean"], one["low"], one["high"])
            if "against_the_first" in one:
                change = one["against_the_first"]
                add(f"{one['predictor']}: change", change["mean"], change["low"], change["high"])
        for name, one in found["floors"].items():
            if not name.startswith("views"):
                add(f"floor: {name}", one["mean"], one["low"], one["high"])
        for name, value in found["predictors"][0]["recall"].items():
            add(name, value)
        card = _evaluated(folder / "card", folder / "val", listed[:1], "robustness=true")
        for name, one in card["predictors"][0]["robustness"].items():
            add(f"robustness: {name}", one["change"]["mean"], one["change"]["low"], one["change"]["high"])
        saved = folder / "composed.parquet"
        _run("predict.py", f"ckpt={run}", f"images={folder / 'val' / 'images'}", f"out={saved}", "compose=true")
        _composed(saved, prompts, add)
        known = [f"source={saved}", f"prompts={folder / 'val' / 'prompts.csv'}", f"weights={folder / 'c.json'}"]
        _run("-m", "img2prompt", "fit", "refiner=confidence", *known)
        checked = json.loads((folder / "c.json").read_text(encoding="utf-8"))["checked"]
        add("confidence: rank correlation, cross-validated by prompt", checked["spearman"] or 0.0)
        add("confidence: calibration error, cross-validated by prompt", checked["calibration_error"])
        for end, one in (("least", checked["bins"][0]), ("most", checked["bins"][-1])):
            add(f"confidence: {end} sure tenth, expected", one["confidence"])
            add(f"confidence: {end} sure tenth, true", one["cosine"])
        other = _evaluated(folder / "seven", seven, listed[:1])
        one = other["predictors"][0]
        add("kaggle's seven", one["mean"], one["low"], one["high"])
        for name, floor in other["floors"].items():
            add(f"kaggle's seven, floor: {name}", floor["mean"], floor["low"], floor["high"])
        with (folder / "seven" / "evaluation.csv").open(encoding="utf-8", newline="") as file:
            closest = [row["id"] == row["closest plain"] for row in csv.DictReader(file)]
        add("kaggle's seven: closest to its own prompt", sum(closest) / len(closest))
    record("clipart_study", rows)


def _validation(data: Path, run: Path, folder: Path) -> dict[str, str]:
    """Links the images that the run validated on into `folder`; returns their prompts."""
    held = set(pq.read_table(run / "validation.parquet", columns=["prompt"]).column("prompt").to_pylist())
    (folder / "images").mkdir(parents=True)
    with (data / "prompts.csv").open(encoding="utf-8", newline="") as file:
        prompts = {row["imgId"]: row["prompt"] for row in csv.DictReader(file) if row["prompt"] in held}
    for one in prompts:
        os.symlink(data / "images" / f"{one}.png", folder / "images" / f"{one}.png")
    with (folder / "prompts.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("imgId", "prompt"), *prompts.items()])
    return prompts


def _evaluated(out: Path, data: Path, listed: list[str], *more: str) -> dict:
    given = [f"predictors=[{','.join(listed)}]", "data=kaggle", f"data.root={data}", f"out={out}", *more]
    _run("-m", "img2prompt", "evaluate", *given)
    return json.loads((out / "evaluation.json").read_text(encoding="utf-8"))


def _composed(saved: Path, prompts: dict[str, str], add) -> None:
    found = read_predictions(saved)

    def embedded(texts: list[str]) -> torch.Tensor:
        return torch.from_numpy(embeddings_of(texts, locate(), "fp32", "cpu", cache_folder(None)))

    truth, said = embedded([prompts[one] for one in found.ids]), torch.from_numpy(found.embeddings)
    composed = embedded(found.columns["composed_prompt"])
    nearest = embedded([one[0] for one in found.columns["nearest_prompts"]])
    for what, goal in (("the prediction", said), ("the truth", truth)):
        add(f"nearest prompt of the bank, to {what}", float(cosines(nearest, goal).mean()))
        add(f"composed prompt, to {what}", float(cosines(composed, goal).mean()))
    gain = cosines(composed, truth) - cosines(nearest, truth)
    groups = prompt_numbers([prompts[one] for one in found.ids])
    add("composed above nearest, to the truth", float(gain.mean()), *bootstrap_interval(gain, groups))


def _run(*command: str) -> None:
    subprocess.run([sys.executable, *command], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
