"""What cannot be, by the settings and what was built of them: said in a sentence before anything is read or trained."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from img2prompt.commands.settings import brief
from img2prompt.data.split import check_split
from img2prompt.data.targets import TextModel
from img2prompt.encoders.encoder import Encoder
from img2prompt.losses import Loss
from img2prompt.provenance import checkpoint_of
from img2prompt.regressor import BLIND, outline, read_header
from img2prompt.training.augment import Augment
from img2prompt.training.curriculum import Curriculum
from img2prompt.training.finetune import FineTune
from img2prompt.training.stages import Stage

CACHES = ("ram", "disk", "none")
# A model may go on at another input size, where its weights allow that; all else would change what they mean.
_FREE_IN_INIT_FROM = ("image_size_px", "resize_mode", "drop_path")


def check_origin(settings: dict[str, Any], encoder: Encoder, text_model: TextModel) -> None:
    """ValueError when init_from or a weights file cannot be what this run starts from, as far as headers tell."""
    init_from, pretrained = settings["init_from"], settings["encoder"]["pretrained"]
    if init_from is None:
        if isinstance(pretrained, str) and not Path(pretrained).is_file():
            raise ValueError(
                f"encoder.pretrained={pretrained}: no such file; give true, false, or a local weights file"
            )
        if isinstance(pretrained, str):
            encoder.check_weights_file(pretrained)
        return
    path = checkpoint_of(Path(init_from))
    given = read_header(path)
    if given.encoder.get("_target_") == BLIND:
        raise ValueError(
            f"init_from={path}: the mean rung, which has no encoder; give another, such as "
            f"{path.with_name('finetune.safetensors')}"
        )
    if given.head.get("_target_") != settings["head"]["_target_"]:
        raise ValueError(f"init_from={path}: its head is {given.head.get('_target_')}; choose the same head")
    for key in sorted((settings["head"].keys() | given.head.keys()) - {"dropout", "vocabulary"}):
        ours, theirs = settings["head"].get(key), given.head.get(key)
        # A header of an earlier version lacks what has come since, and then stood for nothing.
        if ours != theirs and not (key not in given.head and not ours):
            raise ValueError(
                f"init_from={path}: its head has {key}={brief(theirs)}, this run's {brief(ours)}; choose the same"
            )
    if given.target.model != text_model.name:
        raise ValueError(f"init_from={path}: its target is {given.target.model}; choose the same target.model")
    for key in sorted(encoder.config.keys() | given.encoder.keys()):
        ours, theirs = encoder.config.get(key), given.encoder.get(key)
        if ours != theirs and key not in _FREE_IN_INIT_FROM:
            raise ValueError(
                f"init_from={path}: its encoder has {key}={brief(theirs)}, this run's {brief(ours)}; choose the same"
            )


def check_vocabulary(head: dict[str, Any], loss: Loss) -> None:
    """ValueError when head and loss do not agree on a vocabulary; ImportError when what makes one is not installed."""
    has_words = outline(head).vocabulary_size > 0
    if has_words != any(getattr(part, "reads_words", False) for part in loss.modules()):
        raise ValueError(
            "head=joint_vocabulary says words, which only loss=joint teaches it; choose both"
            if has_words
            else "loss=joint is of words, which only head=joint_vocabulary says; choose both"
        )
    if has_words:
        # Before the prompts are read.
        import img2prompt.data.vocabulary  # noqa: F401


def check_data(data: dict[str, Any]) -> None:
    """ValueError when a number or a choice of the data settings is none."""
    for key, least in (("batch_size", 1), ("threads", 1)):
        if data[key] < least:
            raise ValueError(f"data.{key} must be at least {least}, got {data[key]}")
    if data["cache"] not in CACHES:
        raise ValueError(f"data.cache={data['cache']}: must be one of {', '.join(CACHES)}")
    if not 0 <= data["max_bad_fraction"] <= 1:
        raise ValueError(f"data.max_bad_fraction must be between 0 and 1, got {data['max_bad_fraction']}")
    fraction = 0.5 if isinstance(data["val"], dict) else data["val"]
    check_split(fraction, data["group_threshold"], data["max_group_fraction"])
    for value in [
        *data["report_thresholds"],
        *([] if data["duplicate_threshold"] is None else [data["duplicate_threshold"]]),
    ]:
        if not isinstance(value, int | float) or not 0 < value <= 1:
            raise ValueError(
                f"data.duplicate_threshold and data.report_thresholds must be above 0 and at most 1, got {value}"
            )


def check_curriculum(
    curriculum: Curriculum,
    stages: Sequence[Stage],
    paced: FineTune | None,
    encoder: Encoder,
    start: Any,
    is_begun: bool,
) -> None:
    """ValueError when there is no stage that the curriculum is of, or no judge for it: files that are not there, or an
    encoder without a text tower. `start` is encoder.pretrained, or None with init_from; a run that has begun has its
    scores.
    """
    if paced is None:
        if curriculum.stages > 1 or curriculum.record:
            raise ValueError("a curriculum is of stages.finetune or, without it, of a probe; this run has neither")
        return
    if curriculum.stages == 1 or is_begun:
        return
    if curriculum.scorer == "clip_alignment":
        refusal = None if start is None else encoder.text_refusal(start if isinstance(start, str) else None)
        told = "the encoder has no pretrained weights" if start is False else refusal
        if told:
            raise ValueError(
                f"curriculum.scorer=clip_alignment: {told}; choose a pretrained open_clip encoder, or another scorer"
            )
    else:
        curriculum.check_files()
    before = [one for one in stages[: list(stages).index(paced)] if isinstance(one, FineTune)]
    learnt = next((one for one in before if one.unfrozen_blocks != 0), None)
    if curriculum.scorer == "clip_alignment" and learnt is not None:
        raise ValueError(
            f"curriculum.scorer=clip_alignment: stages.{learnt.name} takes the encoder out of the space of the prompts "
            "before; choose another scorer"
        )


def check_batches(augment: Augment, loss: Loss, encoder: Encoder, batch_size: int) -> None:
    """ValueError when what a batch is for cannot be had of it."""
    if augment.mixup and len(encoder.prefix_names) > 1:
        raise ValueError(
            f"augment.mixup={augment.mixup}: captions cannot be blended; set it to 0, or encoder.captioner=null"
        )
    if batch_size < 2 and any(getattr(part, "negatives", "") == "batch" for part in loss.modules()):
        raise ValueError("data.batch_size=1: a batch of one has no negatives; raise it, or set loss.negatives=all")
