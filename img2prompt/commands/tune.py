"""`fit predictor=sdipc_ft` and `sdipc_ct`: what little of CLIP and Stable Diffusion learns from a few images."""

import sys
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from tqdm import tqdm

from img2prompt.commands.converter import load_converter, models_of
from img2prompt.commands.sources import find
from img2prompt.data.cleaning import cleaned
from img2prompt.data.images import ImageError, decode, fit
from img2prompt.data.listing import read_bytes, readable
from img2prompt.predictors.trained import pick_device

_SHOWN = 10


def tune(predictor: dict[str, Any], out: str | None, images: Any, data: dict[str, Any], **options: Any) -> None:
    """Tunes on `images`, or on the images and prompts of `data`, and saves what has learnt. ValueError says what is
    wrong.
    """
    how = instantiate(predictor)
    goal = Path(str(out))
    if out is None or goal.suffix != ".safetensors" or goal.is_dir():
        raise ValueError(f"out={out}: give a file whose ending is .safetensors")
    if (images is None) == (data["root"] is None):
        raise ValueError("give images=, which need no prompts, or data.root=, images with prompts")
    if how.text_term and images is not None:
        raise ValueError("predictor.text_term=true needs prompts: give data.root=, or predictor.text_term=false")
    if how.other_of_prompt and images is not None:
        raise ValueError("predictor.other_of_prompt=true needs prompts: give data.root=")
    decoded, prompts, names = _from_data(data) if images is None else _from_images(images)
    device = pick_device(options["device"])
    models = models_of(options, {})
    converter = load_converter(models, device)
    if how.text_term:
        converter.tokens(prompts)
    from img2prompt.sdipc.tuning import References, save_tuning
    from img2prompt.sdipc.tuning import tune as tuned

    size_px = options["size_px"] or converter.pipeline.unet.config.sample_size * converter.pipeline.vae_scale_factor
    if size_px % converter.pipeline.vae_scale_factor:
        raise ValueError(f"size_px must be a multiple of {converter.pipeline.vae_scale_factor}, got {size_px}")
    references = References(
        torch.stack([converter.prepare(image) for image in decoded]),
        torch.cat([converter.latent(fit(image, size_px, "bicubic", "shortest")) for image in decoded]),
        prompts or None,
    )
    total = how.steps(len(decoded))
    print(f"{how.name}: {total} steps over {len(decoded)} images of {size_px} px", file=sys.stderr)
    losses: list[dict[str, float]] = []
    with tqdm(total=total, desc=how.name, unit=" steps", disable=not sys.stderr.isatty()) as bar:

        def advance(said: dict[str, float]) -> None:
            losses.append(said)
            bar.update()

        learnt = tuned(converter, references, how, options["seed"], advance)
    goal.parent.mkdir(parents=True, exist_ok=True)
    save_tuning(goal, learnt, how, {**models, "images": names})
    few = min(_SHOWN, total)
    for term in losses[0]:
        first, last = (sum(one[term] for one in some) / few for some in (losses[:few], losses[-few:]))
        print(f"{term} loss {first:.4f} in the first {few} steps, {last:.4f} in the last {few}")
    size = sum(one.numel() for one in learnt.values()) / 1e6
    print(f"{size:.1f} M numbers have learnt: {goal}\nuse them:\n  img2prompt vary ckpt={goal} images=… out=…")


def _from_images(images: Any) -> tuple[list[torch.Tensor], list[str], list[str]]:
    files, skipped = readable(images)
    decoded = [decode(read_bytes(file.path)) for file in files]
    return _some(decoded, skipped, f"images={images}"), [], [file.id for file in files]


def _from_data(data: dict[str, Any]) -> tuple[list[torch.Tensor], list[str], list[str]]:
    found = find(data)
    samples, empty = cleaned(found.samples) if data["clean"] else (found.samples, [])
    decoded, prompts, names, bad = [], [], [], [*found.skipped, *empty]
    for sample in samples:
        try:
            decoded.append(decode(sample.source.read(sample.location)))
        except (ImageError, OSError, ValueError) as error:
            bad.append((sample.id, str(error)))
            continue
        prompts.append(sample.prompt)
        names.append(sample.id)
    return _some(decoded, bad, f"data.root={data['root']}"), prompts, names


def _some(decoded: list[torch.Tensor], bad: list[tuple[str, str]], given: str) -> list[torch.Tensor]:
    for name, reason in bad:
        print(f"{name} is left out: {reason}", file=sys.stderr)
    if not decoded:
        raise ValueError(f"{given}: no readable image there")
    return decoded
