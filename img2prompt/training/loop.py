"""How the steps of a stage are taken and kept, whatever it trains: conf/trainer."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Loop:
    """`deadline` is a time.monotonic(): the first step that ends after it is the last."""

    accumulate_grad_batches: int = 1
    gradient_clip_norm: float | None = 1.0
    max_skipped_steps: int = 10
    checkpoint_every_n_steps: int | None = None
    checkpoint_every_minutes: float | None = 30.0
    keep_checkpoints: int = 1
    activation_checkpointing: bool = False
    compile: bool = False
    deadline: float | None = None

    def __post_init__(self) -> None:
        for name in ("accumulate_grad_batches", "max_skipped_steps", "checkpoint_every_n_steps", "keep_checkpoints"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"trainer.{name} must be at least 1, got {value}")
        if (self.gradient_clip_norm or 0) < 0:
            raise ValueError(f"trainer.gradient_clip_norm must be at least 0, or null, got {self.gradient_clip_norm}")
        if self.checkpoint_every_minutes is not None and self.checkpoint_every_minutes <= 0:
            raise ValueError(
                f"trainer.checkpoint_every_minutes must be above 0, or null, got {self.checkpoint_every_minutes}"
            )


def seconds_of(max_time: str) -> int:
    """DD:HH:MM:SS in seconds; ValueError for anything else."""
    if not re.fullmatch(r"\d+(:\d\d){3}", max_time):
        raise ValueError(f"trainer.max_time={max_time}: must be DD:HH:MM:SS")
    days, hours, minutes, seconds = (int(part) for part in max_time.split(":"))
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
