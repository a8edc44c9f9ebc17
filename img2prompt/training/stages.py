"""The rungs of the ladder: mean, probe, fine-tune. Each leaves a usable regressor."""

import copy
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from lightning import Callback, Trainer
from lightning.pytorch.loggers import Logger
from safetensors.torch import load_file
from torch.nn.modules.batchnorm import _BatchNorm

from img2prompt import ranks
from img2prompt.build import build
from img2prompt.data.order import steps_per_epoch
from img2prompt.data.prompts import prompt_numbers
from img2prompt.encoders.encoder import Encoder
from img2prompt.losses import Loss
from img2prompt.regressor import Regressor, build_regressor
from img2prompt.ridge import fit_ridge
from img2prompt.training.augment import Augment
from img2prompt.training.callbacks import Keep, Log, Progress
from img2prompt.training.checkpoint import read_state
from img2prompt.training.datamodule import PairData
from img2prompt.training.ema import Ema
from img2prompt.training.guard import Guard
from img2prompt.training.loop import Loop
from img2prompt.training.module import RegressorModule
from img2prompt.training.optim import AdamW
from img2prompt.training.scoring import features_of
from img2prompt.training.signals import Signals


@dataclass(frozen=True)
class Start:
    """What is known before the first step, and decides which rungs there are and how long they take."""

    pretrained: bool  # the encoder brings weights: a published model's, a file's or a run's
    has_head: bool  # so does the head
    epoch_pairs: int  # one image of each prompt
    images_per_step: int
    is_affine: bool  # the head: ridge regression can solve it


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
    images_per_second: float | None = None
    # Of the current rung: what it took in processes before this one, and where it stopped before its end.
    earlier_seconds: float = 0.0
    unfinished: str = ""


class Stage(ABC):
    """One rung: what it does to the regressor."""

    name: str

    def refusal(self, start: Start) -> str | None:
        """Why this rung cannot be climbed; None when it can."""
        return None

    def steps(self, start: Start) -> int:
        """Optimiser steps; 0 for a closed form."""
        return 0

    @abstractmethod
    def run(self, climb: Climb) -> Regressor:
        """Climbs, and returns the regressor of this rung."""


class Mean(Stage):
    """The mean training embedding for every image: what a score is worth without looking."""

    name = "mean"

    def run(self, climb: Climb) -> Regressor:
        encoder = build({"_target_": "img2prompt.encoders.blind.Blind"}, Encoder)
        constant = build_regressor(encoder, {"_target_": "img2prompt.heads.Linear"}, climb.regressor.target)
        mean = climb.regressor.target_mean.cpu()
        constant.target_mean.copy_(mean)
        constant.head.set_affine(torch.zeros(len(mean), 0), mean)
        return constant.to(climb.regressor.target_mean.device)


class FineTune(Stage):
    """Gradient descent on encoder and head together; the epoch with the best validation cosine is kept.

    `epochs` None chooses `epochs_pretrained` or `epochs_scratch`, as the optimiser chooses its learning rate.
    `unfrozen_blocks` of the encoder learn, the last ones; the others run without gradients. Several such stages with
    more and more of them are gradual unfreezing. BatchNorm layers keep the running statistics of pretraining where
    `frozen_batchnorm` is true.
    """

    name = "finetune"

    def __init__(
        self,
        epochs: int | None = None,
        epochs_pretrained: int = 5,
        epochs_scratch: int = 14,
        frozen_batchnorm: bool = True,
        log_every_n_steps: int = 10,
        unfrozen_blocks: int | None = None,
    ) -> None:
        if min(epochs or 0, epochs_pretrained, epochs_scratch) < 0:
            raise ValueError(f"trainer.max_epochs must be at least 0, got {epochs}")
        if log_every_n_steps < 1:
            raise ValueError(f"stages.finetune.log_every_n_steps must be at least 1, got {log_every_n_steps}")
        self.epochs = epochs
        self.epochs_pretrained = epochs_pretrained
        self.epochs_scratch = epochs_scratch
        if unfrozen_blocks is not None and unfrozen_blocks < 0:
            raise ValueError(f"stages.finetune.unfrozen_blocks must be at least 0, or null, got {unfrozen_blocks}")
        self.unfrozen_blocks = unfrozen_blocks
        self.frozen_batchnorm = frozen_batchnorm
        self.log_every_n_steps = log_every_n_steps

    def refusal(self, start: Start) -> str | None:
        return None if self.steps(start) > 0 else "trainer.max_epochs=0"

    def steps(self, start: Start) -> int:
        epochs = self.epochs
        if epochs is None:
            epochs = self.epochs_pretrained if start.pretrained else self.epochs_scratch
        return epochs * steps_per_epoch(start.epoch_pairs, start.images_per_step)

    def run(self, climb: Climb) -> Regressor:
        data, regressor = climb.data, climb.regressor
        # Bad images leave fewer pairs than were planned with.
        total = self.steps(replace(climb.start, epoch_pairs=data.draws.count))
        state = read_state(climb.checkpoints)
        if state and state["stage"] != self.name:
            state = None
        first = 0
        if state:
            if state["total"] != total:
                raise ValueError(
                    f"{climb.checkpoints.parent}: the run began with {state['total']} steps and would go on with "
                    f"{total}: images have become unreadable, or readable, since; put them back"
                )
            first = state["step"]
            regressor.load_state_dict(state["regressor"])
            climb.rewind(first)
        data = self._given(climb)
        self._freeze(regressor.encoder)
        # A stage's own, so that it starts alike whether or not the stage before it ran in this process.
        loss = copy.deepcopy(climb.loss)
        loss.prepare(data.targets[data.train_rows].to(regressor.target_mean.device))
        if state:
            loss.load_state_dict(state["loss"])
        loop, device = climb.loop, regressor.target_mean.device
        decay = climb.optim.ema_decay
        module = RegressorModule(
            regressor=regressor,
            loss=loss,
            optim=climb.optim,
            pretrained=climb.start.pretrained,
            seed=data.seed,
            stage=self.name,
            start=first,
            total=total,
            augment=climb.augment,
            frozen_batchnorm=self.frozen_batchnorm and climb.start.pretrained,
            loop=loop,
            guard=Guard(loop.max_skipped_steps, device, first, state["skipped"] if state else ()),
            ema=Ema(regressor, decay, state["ema"] if state else None) if decay is not None else None,
        )
        if ranks.count() > 1:
            module.freeze_unused(next(data.batches_of(data.train_rows[:2])))
        if data.images_per_step // (data.accumulated * ranks.count()) == 1 and any(
            isinstance(m, _BatchNorm) and m.training for m in module.train().modules()
        ):
            raise ValueError("BatchNorm cannot learn from batches of one image; use a larger data.batch_size")
        signals = Signals()
        keep = Keep(data, climb.checkpoints, climb.bf16, loop, signals, state)
        # What a step has to log is logged before the step is saved.
        callbacks: list[Callback] = [
            signals,
            Log(self.log_every_n_steps),
            keep,
            Progress(keep, data.images_per_step),
        ]
        climb.earlier_seconds = keep.earlier_seconds
        began = time.monotonic()
        try:
            if first < total or (state and not state["scored"]):
                climb.make_trainer(callbacks, climb.loggers).fit(module, data.train_batches(self.name, first, total))
        except SystemExit as stop:
            # Lightning makes an exit of Ctrl-C.
            if isinstance(stop.__context__, KeyboardInterrupt):
                raise stop.__context__ from None
            raise
        finally:
            signals.restore()
        # What the first rank keeps is on the disk.
        ranks.wait()
        if module.step < total:
            climb.unfinished = f"stopped at step {module.step} of {total}"
        seconds = time.monotonic() - began - keep.seconds
        climb.images_per_second = (
            (module.step - first) * data.images_per_step / seconds if module.step > first else None
        )
        regressor.requires_grad_(True)
        regressor.load_state_dict(load_file(climb.checkpoints / f"{self.name}.safetensors"))
        return regressor.to(device)

    def _given(self, climb: Climb) -> PairData:
        """What the stage trains on and validates with."""
        return climb.data

    def _freeze(self, encoder: Encoder) -> None:
        """Leaves gradients to the last blocks. What lies before them needs none and has none: autograd records nothing
        until the first parameter that learns.
        """
        blocks, count = encoder.blocks(), self.unfrozen_blocks
        if count is None:
            return
        if count > len(blocks):
            raise ValueError(f"stages.{self.name}.unfrozen_blocks={count}: the encoder has {len(blocks)} blocks")
        for block in blocks[: len(blocks) - count]:
            for parameter in block:
                parameter.requires_grad_(False)


class Probe(FineTune):
    """The head alone on frozen features, which are computed once. Ridge regression in closed form or, with `epochs` and
    for heads that no affine map makes up, gradient descent, without augmentation. The fine-tune starts from it.
    """

    name = "probe"

    def __init__(self, epochs: int | None = None, epochs_descent: int = 20, log_every_n_steps: int = 10) -> None:
        super().__init__(epochs, epochs_descent, epochs_descent, True, log_every_n_steps, unfrozen_blocks=0)

    def refusal(self, start: Start) -> str | None:
        if start.has_head:
            return "init_from brings its own head"
        if not start.pretrained:
            return "the encoder has no pretrained weights: its features mean nothing yet"
        return None

    def steps(self, start: Start) -> int:
        return 0 if start.is_affine and self.epochs is None else super().steps(start)

    def run(self, climb: Climb) -> Regressor:
        data = climb.data
        if self.steps(climb.start):
            return super().run(climb)
        rows, features = features_of(climb.regressor, data, data.train_rows.tolist(), climb.bf16)
        groups = torch.from_numpy(prompt_numbers([data.samples[row].prompt for row in rows]))
        ridge = fit_ridge(features, data.targets[rows], groups)
        climb.regressor.head.set_affine(ridge.weight, ridge.bias)
        return climb.regressor

    def _given(self, climb: Climb) -> PairData:
        data = climb.data
        every = [*data.train_rows.tolist(), *data.val_rows.tolist()]
        rows, features = features_of(climb.regressor, data, every, climb.bf16, together=True)
        return data.with_features(rows, features)
