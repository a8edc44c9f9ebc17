"""What a rung of the ladder is, what decides whether it can be climbed, and what it climbs with."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from lightning import Callback, Trainer
from lightning.pytorch.loggers import Logger
from torch import Tensor

from img2prompt.data.pixels import Pixels
from img2prompt.encoders.encoder import Encoder
from img2prompt.losses import Loss
from img2prompt.regressor import Regressor
from img2prompt.training.augment import Augment
from img2prompt.training.curriculum import Curriculum
from img2prompt.training.datamodule import PairData
from img2prompt.training.loop import Loop
from img2prompt.training.optim import AdamW


@dataclass(frozen=True)
class Start:
    """What is known before the first step, and decides which rungs there are and how long they take."""

    pretrained: bool  # the encoder brings weights: a published model's, a file's or a run's
    has_head: bool  # so does the head
    epoch_pairs: int  # one image of each prompt
    images_per_step: int
    is_affine: bool  # the head: ridge regression can solve it
    reads_tokens: bool  # so does the head, not the pooled features alone
    no_text: str | None  # why the encoder has no features of prompts
    growth: int = 1  # epochs until a curriculum has all pairs


@dataclass
class Climb:
    """What the stages share: the regressor that climbs, and what it climbs with."""

    regressor: Regressor
    start: Start
    data: PairData
    loss: Loss
    optim: AdamW
    augment: Augment
    loop: Loop
    bf16: bool
    checkpoints: Path
    make_trainer: Callable[[list[Callback], list[Logger]], Trainer]
    loggers: list[Logger]
    rewind: Callable[[int], None]  # takes what was logged up to a step into the loggers of a resumed run
    pixels_at: Callable[[int, bool], Pixels]  # of the same rows, at another image_size_px, and whether to keep them
    text_features: Callable[[list[str]], Tensor]  # of prompts, in the space of the pooled features
    curriculum: Curriculum = field(default_factory=Curriculum)
    kept_folder: Path | None = None  # where the word of an encoder's prefix is kept, if anywhere
    images_per_second: float | None = None
    # Of the current rung: what it took in processes before this one, and where it stopped before its end.
    earlier_seconds: float = 0.0
    unfinished: str = ""
    steps_before: int = 0  # of the rungs before the current one
    head_is_fitted: bool = False  # what the head says means something

    def resize(self, image_size_px: int) -> None:
        """From here on encoder and data have images of this size."""
        self.regressor.encoder.set_image_size(image_size_px)
        if self.data.pixels.image_size_px != image_size_px:
            # Two sizes would take more memory than data.cache_gib.
            self.data.pixels.release()
            self.data = self.data.with_pixels(self.pixels_at(image_size_px, True))

    def steps(self, stage: "Stage") -> int:
        """Optimiser steps of a stage; 0 when it is not climbed."""
        # Bad images leave fewer pairs than were planned with.
        start = replace(self.start, epoch_pairs=self.data.draws.count)
        return 0 if stage.refusal(start) else stage.steps(start)

    def data_at(self, image_size_px: int) -> PairData:
        """The data with images of this size, decoded when they are asked for if they are not kept."""
        if self.data.pixels.image_size_px == image_size_px:
            return self.data
        return self.data.with_pixels(self.pixels_at(image_size_px, False))


class Stage(ABC):
    """One rung: what it does to the regressor."""

    name: str

    def refusal(self, start: Start) -> str | None:
        """Why this rung cannot be climbed; None when it can."""
        return None

    def steps(self, start: Start) -> int:
        """Optimiser steps; 0 for a closed form."""
        return 0

    def check(self, encoder: Encoder) -> None:
        """ValueError where the stage asks for what the encoder is not; before anything is decoded."""
        return None

    @abstractmethod
    def run(self, climb: Climb) -> Regressor:
        """Climbs, and returns the regressor of this rung."""
