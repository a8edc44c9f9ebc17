"""`fit predictor=sdipc`: embeddings of images' prompts by a bridge that is fitted on texts, with the control beside."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate

from img2prompt.commands.converter import models_of
from img2prompt.commands.fit import Known, embedded, goal_of, located, scores
from img2prompt.data.images import decode
from img2prompt.data.kaggle import read_prompts
from img2prompt.data.listing import ImageFile, printable, read_bytes, readable
from img2prompt.data.prompt_files import read_prompt_files
from img2prompt.hub import HubFile, describe
from img2prompt.predictions import WRITERS, Prediction
from img2prompt.predictors.trained import pick_device
from img2prompt.submission import DIMENSION, write_submission

_BATCH = 32
_FEWEST_PROMPTS = 2


def bridge(predictor: dict[str, Any], out: str, prompts: Any, images: Any, truth: str | None, **options: Any) -> None:
    """Writes predictions of `images` to `out`. ValueError says what is wrong."""
    how = instantiate(predictor)
    for name, value in (("prompts", prompts), ("images", images)):
        if not value:
            raise ValueError(f"predictor=sdipc needs {name}=")
    listed = [prompts] if isinstance(prompts, str) else prompts
    goal = goal_of(out, [*listed, *([truth] if truth else [])], None, False)
    bank = list(dict.fromkeys(read_prompt_files([Path(one) for one in listed])))
    if len(bank) < _FEWEST_PROMPTS:
        raise ValueError(f"prompts={prompts}: {len(bank)} distinct prompts; a bridge is fitted on many")
    answers = None if truth is None else Known(truth, read_prompts(truth))
    files, skipped = readable(images)
    ids = [file.id for file in files]
    if answers is not None:
        answers.rows_of(ids, str(images))
    device = pick_device(options["device"])
    model = located(options["text_model"])
    targets = embedded(bank, model, device, options["cache_dir"], None)
    if goal.suffix == ".csv" and targets.shape[1] != DIMENSION:
        raise ValueError(f"out={out}: a submission has {DIMENSION} values an image, {model.name} {targets.shape[1]}")
    found = _found(how, bank, targets, files, models_of(options, {}), device)
    chosen = found[f"{how.space}-space, {how.way}"]
    predicted = Prediction(ids, chosen.numpy(), {"path": [printable(file.path) for file in files]})
    if goal.suffix == ".csv":
        write_submission(goal, [predicted], ids)
    else:
        WRITERS[goal.suffix](goal, [predicted])
    for path, reason in skipped:
        print(f"{path} is left out: {reason}", file=sys.stderr)
    if answers is not None:
        kept = answers.rows_of(ids, str(images))
        named = answers.of([ids[row] for row in kept])
        found["constant mean of the bank"] = targets.mean(0, keepdim=True).expand(len(ids), -1)
        reality = embedded(named, model, device, options["cache_dir"], targets.shape[1])
        print(scores({name: each[kept] for name, each in found.items()}, reality, named))
    print(f"{len(ids)} images predicted by a bridge of {len(bank)} prompts: {goal}")


def _found(
    how: Any,
    bank: Sequence[str],
    targets: torch.Tensor,
    files: Sequence[ImageFile],
    models: dict[str, Any],
    device: str,
) -> dict[str, torch.Tensor]:
    """Embeddings of the images by each way in each space."""
    # Seconds of imports.
    from img2prompt.sdipc.bridge import SPACES, WAYS, Bridge, bridged, image_states, load_tokenizer, text_states
    from img2prompt.sdipc.converter import clip_pixels, load_clip
    from img2prompt.sdipc.projector import projector_of_clip

    if not Path(models["clip"]).is_dir():
        print(f"loading {describe(HubFile(models['clip'], 'model.safetensors'))}", file=sys.stderr)
    clip = load_clip(models["clip"], None).to(device).eval()
    projector = projector_of_clip(clip, models["norm"], models["floor"]).to(device)

    def pixels() -> Iterator[torch.Tensor]:
        for start in range(0, len(files), _BATCH):
            yield clip_pixels(clip, [decode(read_bytes(file.path)) for file in files[start : start + _BATCH]])

    texts, images = text_states(clip, load_tokenizer(models["clip"]), bank), image_states(clip, projector, pixels())
    return {
        f"{space}-space, {way}": bridged(
            Bridge(how.name, way, space, how.neighbours), texts[space], targets, images[space]
        )
        for space in SPACES
        for way in WAYS
    }
