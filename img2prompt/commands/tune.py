"""`fit predictor=sdipc_ft` and `sdipc_ct`: what little of CLIP and Stable Diffusion learns from a few images."""

import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from tqdm import tqdm

from img2prompt.commands.converter import load_converter, models_of, side_of, weights_in
from img2prompt.commands.sources import find
from img2prompt.data.cleaning import cleaned
from img2prompt.data.decoding import ImageError
from img2prompt.data.fitting import fit
from img2prompt.data.images import decode
from img2prompt.data.listing import read_bytes, readable
from img2prompt.predictors.trained import pick_device

_SHOWN = 10
_TUNED = ("sdipc_ft", "sdipc_ct")


@dataclass(frozen=True, slots=True)
class Pair:
    """An image that is yet to be read, and its prompt if it has one."""

    name: str
    read: Callable[[], bytes]
    prompt: str | None


def tune(predictor: dict[str, Any], out: str | None, images: Any, data: dict[str, Any], **options: Any) -> None:
    """Tunes on `images`, or on the images and prompts of `data`, and saves what has learnt. ValueError says what is
    wrong.
    """
    if predictor["name"] not in _TUNED:
        raise ValueError(
            f"predictor={predictor['name']}: there is nothing to fit; python predict.py predictor={predictor['name']} "
            f"predicts with it. What fit tunes: {', '.join(_TUNED)}"
        )
    how = instantiate(predictor)
    goal = Path(str(out))
    if out is None or goal.suffix != ".safetensors" or goal.is_dir():
        raise ValueError(f"out={out}: give a file whose ending is .safetensors")
    if goal.exists():
        raise ValueError(f"out={out}: is there already; choose another name")
    if (images is None) == (data["root"] is None):
        which = "data.root=, images with prompts" if how.text_term else "images=, which need no prompts, or data.root="
        raise ValueError(f"predictor={how.name}: give {which}")
    if how.text_term and images is not None:
        raise ValueError("predictor.text_term=true needs prompts: give data.root=, or predictor.text_term=false")
    if how.other_of_prompt and images is not None:
        raise ValueError("predictor.other_of_prompt=true needs prompts: give data.root=")
    if options["seed"] < 0:
        raise ValueError(f"seed must be at least 0, got {options['seed']}")
    if data["threads"] < 1:
        raise ValueError(f"data.threads must be at least 1, got {data['threads']}")
    pairs = _of_data(data) if images is None else _of_images(images)
    # What cannot be written is better known before hours of learning.
    goal.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=goal.parent):
        pass
    device = pick_device(options["device"])
    models = models_of(options, {})
    converter = load_converter(models, device)
    size_px = side_of(options["size_px"], converter.pipeline)
    from img2prompt.sdipc.tuning import save_tuning
    from img2prompt.sdipc.tuning import tune as tuned

    references, names = _references(pairs, converter, size_px)
    cut = len(converter.too_long(references.prompts or [])) if how.text_term else 0
    if cut:
        print(f"{cut} prompts have more tokens than are read, and are read in part", file=sys.stderr)
    total = how.steps(len(names))
    print(f"{how.name}: {total} steps over {len(names)} images of {size_px} px", file=sys.stderr)
    losses: list[dict[str, float]] = []
    with tqdm(total=total, desc=how.name, unit=" steps", disable=not sys.stderr.isatty()) as bar:

        def advance(said: dict[str, float]) -> None:
            losses.append(said)
            bar.update()

        learnt = tuned(converter, references, how, options["seed"], advance)
    save_tuning(goal, learnt, how, {**models, "weights": weights_in(models), "images": names})
    few = min(_SHOWN, total)
    for term in losses[0]:
        first, last = (sum(one[term] for one in some) / few for some in (losses[:few], losses[-few:]))
        print(f"{term} loss {first:.4f} in the first {few} steps, {last:.4f} in the last {few}")
    count = sum(one.numel() for one in learnt.values())
    print(f"{count:,} numbers have learnt: {goal}\nuse them:\n  img2prompt vary ckpt={goal} images=… out=…")


def _of_images(images: Any) -> list[Pair]:
    files, skipped = readable(images)
    _tell(skipped)
    return [Pair(file.id, partial(read_bytes, file.path), None) for file in files]


def _of_data(data: dict[str, Any]) -> list[Pair]:
    found = find(data)
    samples, empty = cleaned(found.samples) if data["clean"] else (found.samples, [])
    _tell([*found.skipped, *empty])
    if not samples:
        raise ValueError(f"data.root={data['root']}: no image with a prompt there")
    return [Pair(one.id, partial(one.source.read, one.location), one.prompt) for one in samples]


def _references(pairs: Sequence[Pair], converter: Any, size_px: int) -> tuple[Any, list[str]]:
    """What is learnt from, and its names. One image after another: at their full size they would be gigabytes."""
    from img2prompt.sdipc.tuning import References

    images, latents, prompts, names = [], [], [], []
    bad = []
    for pair in pairs:
        try:
            image = decode(pair.read())
            small, large = converter.prepare(image), fit(image, size_px, "bicubic", "shortest")
        except (ImageError, OSError, ValueError) as error:
            bad.append((pair.name, str(error)))
            continue
        images.append(small)
        latents.append(converter.latent(large).cpu())
        prompts.append(pair.prompt)
        names.append(pair.name)
    _tell(bad)
    if not images:
        raise ValueError("none of the images can be read")
    told = [prompt for prompt in prompts if prompt is not None]
    return References(torch.stack(images), torch.cat(latents), told or None), names


def _tell(left_out: Sequence[tuple[str, str]]) -> None:
    for name, reason in left_out:
        print(f"{name} is left out: {reason}", file=sys.stderr)
