"""What a run will do, said before it does it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from img2prompt import hub
from img2prompt.data.sample import Sample
from img2prompt.encoders.encoder import Encoder
from img2prompt.training.pairs import Rows
from img2prompt.training.stages import Stage, Start


@dataclass
class Plan:
    """What is known of a run before its prompts are embedded; `lines` is what people read."""

    encoder: Encoder
    origin: str
    lr: float
    device: str
    precision: str
    target: str
    folder: Path
    downloads: list[hub.HubFile] = field(default_factory=list)
    devices: int = 1

    def lines(self) -> list[str]:
        parameters = sum(parameter.numel() for parameter in self.encoder.parameters()) / 1e6
        want = self.encoder.preprocessing
        return _told(
            ("target", self.target),
            ("encoder", f"{self.encoder.config.get('name')}, {parameters:.1f} M parameters, {self.origin}"),
            ("input", f"{want.image_size_px} px, {want.resize_mode}, {want.interpolation}"),
            ("training", f"peak lr {self.lr:g}, {self._devices()}, {self.precision}"),
            ("downloads", "; ".join(hub.describe(file) for file in self.downloads) or "none"),
            ("run folder", str(self.folder)),
        )

    def _devices(self) -> str:
        return self.device if self.devices == 1 else f"{self.devices} x {self.device}"


def found_lines(
    found: int, used: int, left_out: Sequence[tuple[str, str]], by_source: Mapping[str, tuple[int, int]]
) -> list[str]:
    """How many pairs the sources hold, and what is left out with its reason; for several sources also for each."""
    reasons = Counter(reason for _, reason in left_out)
    skipped = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common()) or "none"
    each = [f"  {name}: {held} found, {kept} used" for name, (held, kept) in by_source.items()]
    return [*_told(("pairs", f"{found} found, {used} used, skipped: {skipped}")), *each]


def data_lines(rows: Rows, earlier: Sequence[str], stages: list[Stage], start: Start, pixels: str) -> list[str]:
    """What the prompts' embeddings decide: duplicates, the split, and how long the stages take; `earlier` are the runs
    that it goes on from.
    """
    samples, sides = rows.samples, rows.sides
    train = [sample for sample, held in zip(samples, rows.validates, strict=True) if not held]
    val = [sample for sample, held in zip(samples, rows.validates, strict=True) if held]
    kind = "combinations never seen in training" if val[0].combinations else "prompts never in training"
    apart = f"largest cosine between a training and a validation prompt {rows.leak['largest_train_val_cosine']:.3f}"
    if sides.too_large:
        apart += f"; {sides.too_large} pairs train in groups too large to validate (largest {sides.largest_group})"
    kept = ""
    if earlier:
        more = f" and {len(earlier) - 1} more" if len(earlier) > 1 else ""
        kept = f"what trained in {earlier[0]}{more} trains, with what is close to it: {sides.trained_before} pairs"
    if sides.moved:
        kept += f"; {sides.moved} prompts that validated before train now"
    return rows.lineage.lines() + _told(
        ("split", f"{len(train)} train ({_distinct(train)} prompts), {len(val)} validation ({kind})"),
        ("apart", apart),
        *([("earlier", kept)] if kept else []),
        ("pixels", pixels),
        ("stages", "; ".join(_stage(stage, start) for stage in stages)),
        ("steps", f"of {start.images_per_step} images{_epoch(start, len(train))}"),
    )


def _told(*facts: tuple[str, str]) -> list[str]:
    return [f"{name:<11} {text}" for name, text in facts]


def _epoch(start: Start, train: int) -> str:
    pairs, size = start.epoch_pairs, start.images_per_step
    count = pairs % size if pairs > size else 0
    told = [f"{pairs} of {train} pairs in an epoch, no prompt and no image twice"] if pairs < train else []
    told += [f"{count} pairs left out of each epoch, others each time"] if count else []
    return f" ({'; '.join(told)})" if told else ""


def _stage(stage: Stage, start: Start) -> str:
    reason, steps = stage.refusal(start), stage.steps(start)
    return f"{stage.name} " + (f"(skipped: {reason})" if reason else f"({steps} steps)" if steps else "(closed form)")


def _distinct(samples: list[Sample]) -> int:
    return len({sample.prompt for sample in samples})
