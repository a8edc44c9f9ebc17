"""What a run will do, said before it does it."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from img2prompt import hub
from img2prompt.data.sample import Sample
from img2prompt.encoders.encoder import Encoder
from img2prompt.training.pairs import Rows
from img2prompt.training.stages import Stage, Start


@dataclass
class Plan:
    """The facts of a run; `lines` is what people read."""

    rows: Rows
    stages: list[Stage]
    start: Start
    encoder: Encoder
    origin: str
    lr: float
    device: str
    precision: str
    pixels: str
    target: str
    folder: Path
    downloads: list[hub.HubFile] = field(default_factory=list)

    def lines(self) -> list[str]:
        samples, skips = self.rows.samples, self.rows.found.skipped
        train = [sample for sample, held in zip(samples, self.rows.validates, strict=True) if not held]
        val = [sample for sample, held in zip(samples, self.rows.validates, strict=True) if held]
        reasons = Counter(reason for _, reason in skips)
        skipped = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common()) or "none"
        found = len(self.rows.found.samples) + len(skips)
        kind = "combinations never seen in training" if samples[0].combinations else "prompts never in training"
        parameters = sum(parameter.numel() for parameter in self.encoder.parameters()) / 1e6
        want = self.encoder.preprocessing
        changed = sum(sample.raw_prompt != "" for sample in samples)
        facts = [
            ("pairs", f"{found} found, {len(samples)} used, skipped: {skipped}; {changed} prompts cleaned"),
            ("split", f"{len(train)} train ({_distinct(train)} prompts), {len(val)} validation ({kind})"),
            ("target", self.target),
            ("encoder", f"{self.encoder.config.get('name')}, {parameters:.1f} M parameters, {self.origin}"),
            ("input", f"{want.image_size_px} px, {want.resize_mode}, {want.interpolation}; pixels: {self.pixels}"),
            ("stages", "; ".join(self._stage(stage) for stage in self.stages)),
            ("batches", f"of {self.start.batch_size}{self._left_out()}"),
            ("training", f"peak lr {self.lr:g}, {self.device}, {self.precision}"),
            ("downloads", "; ".join(hub.describe(file) for file in self.downloads) or "none"),
            ("run folder", str(self.folder)),
        ]
        return [f"{name:<11} {text}" for name, text in facts]

    def _left_out(self) -> str:
        pairs, size = self.start.train_pairs, self.start.batch_size
        count = pairs % size if pairs > size else 0
        return f" ({count} pairs left out of each epoch, others each time)" if count else ""

    def _stage(self, stage: Stage) -> str:
        reason, steps = stage.refusal(self.start), stage.steps(self.start)
        return f"{stage.name} " + (
            f"(skipped: {reason})" if reason else f"({steps} steps)" if steps else "(closed form)"
        )


def _distinct(samples: list[Sample]) -> int:
    return len({sample.prompt for sample in samples})
