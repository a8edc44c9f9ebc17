"""The rungs of gradient descent: encoder and head together, or the head on frozen features."""

import copy
import math
import time
from typing import Any

import torch
from lightning import Callback
from safetensors.torch import load_file
from torch.nn.modules.batchnorm import _BatchNorm

from img2prompt import ranks
from img2prompt.build import build
from img2prompt.data.order import rows_in_epoch, step_seed, steps_of
from img2prompt.data.prompts import prompt_numbers
from img2prompt.encoders.encoder import Encoder
from img2prompt.regressor import Regressor
from img2prompt.ridge import fit_ridge, fit_upon
from img2prompt.training.callbacks import Keep, Log, Progress
from img2prompt.training.checkpoint import read_state
from img2prompt.training.curriculum import Records, grown
from img2prompt.training.datamodule import PairData
from img2prompt.training.ema import Ema
from img2prompt.training.guard import Guard
from img2prompt.training.kept import KeptFeatures, keep_prefix
from img2prompt.training.module import RegressorModule
from img2prompt.training.scoring import features_of
from img2prompt.training.signals import Signals
from img2prompt.training.stages import Climb, Stage, Start
from img2prompt.training.words import fit_words


class FineTune(Stage):
    """Gradient descent on encoder and head together; the epoch with the best validation cosine is kept.

    `epochs` None chooses `epochs_pretrained` or `epochs_scratch`, as the optimiser chooses its learning rate.
    `unfrozen_blocks` of the encoder learn, the last ones; the others run without gradients. Several such stages with
    more and more of them are gradual unfreezing. BatchNorm layers keep the running statistics of pretraining where
    `frozen_batchnorm` is true. At `patch_dropout` above 0 a transformer sees a part of each image's patches, but in
    the last `unmasked_epochs` all. `image_size_px` makes it a rung of larger input, from the rung before it. Its peaks
    are `lr_factor` times the optimiser's. With `lora_rank` the encoder's weights stay, and what is added to those of
    its blocks is learnt, of this rank (see `encoders.lora`); checkpoints hold the sums.
    """

    name = "finetune"
    has_curriculum = False  # one stage of a run has it: others see all pairs in every epoch

    def __init__(
        self,
        epochs: int | None = None,
        epochs_pretrained: int = 5,
        epochs_scratch: int = 14,
        frozen_batchnorm: bool = True,
        log_every_n_steps: int = 10,
        unfrozen_blocks: int | None = None,
        patch_dropout: float = 0.0,
        unmasked_epochs: int = 1,
        image_size_px: int | None = None,
        lr_factor: float = 1.0,
        lora_rank: int | None = None,
        lora_alpha: int = 32,
    ) -> None:
        self.epochs = epochs
        self.epochs_pretrained = epochs_pretrained
        self.epochs_scratch = epochs_scratch
        self.unfrozen_blocks = unfrozen_blocks
        self.patch_dropout = patch_dropout
        self.unmasked_epochs = unmasked_epochs
        self.image_size_px = image_size_px
        self.lr_factor = lr_factor
        self.lora_rank = lora_rank
        self.lora_alpha = lora_alpha
        self.frozen_batchnorm = frozen_batchnorm
        self.log_every_n_steps = log_every_n_steps

    def refusal(self, start: Start) -> str | None:
        return None if self.steps(start) > 0 else "no epochs"

    def steps(self, start: Start) -> int:
        epochs = self.epochs
        if epochs is None:
            epochs = self.epochs_pretrained if start.pretrained else self.epochs_scratch
        if self.patch_dropout and 0 < epochs <= self.unmasked_epochs:
            raise ValueError(
                f"stages.{self.name}.patch_dropout={self.patch_dropout} is without effect: unmasked_epochs="
                f"{self.unmasked_epochs} of its {epochs} epochs see every patch; train for more"
            )
        stages = start.growth if self.has_curriculum else 1
        if stages > 1 and 0 < epochs < stages:
            raise ValueError(
                f"curriculum.stages={stages}: stages.{self.name} has {epochs} epochs, and would never see all pairs"
            )
        first = rows_in_epoch(start.epoch_pairs, 0, stages)
        if stages > 1 and 0 < epochs and first < min(start.images_per_step, start.epoch_pairs):
            raise ValueError(
                f"curriculum.stages={stages}: the first epoch has {first} images, fewer than a step's "
                f"{start.images_per_step}; lower it, or data.batch_size"
            )
        return steps_of(start.epoch_pairs, start.images_per_step, epochs, stages)

    def check(self, encoder: Encoder) -> None:
        self._check_ranges()
        count = len(encoder.blocks())
        if self.unfrozen_blocks is not None and self.unfrozen_blocks > count:
            raise ValueError(
                f"stages.{self.name}.unfrozen_blocks={self.unfrozen_blocks}: the encoder has {count} blocks"
            )
        if self.lora_rank is not None:
            self._check_adapters(encoder, self.lora_rank)
        encoder.set_patch_dropout(self.patch_dropout)
        encoder.set_patch_dropout(0.0)
        if self.image_size_px is not None:
            self._check_size(encoder, self.image_size_px)

    def _check_ranges(self) -> None:
        at_least = {
            "epochs": 0,
            "epochs_pretrained": 0,
            "epochs_scratch": 0,
            "log_every_n_steps": 1,
            "unfrozen_blocks": 0,
            "unmasked_epochs": 0,
            "image_size_px": 1,
            "lr_factor": 0,
            "lora_rank": 1,
            "lora_alpha": 1,
        }
        for key, least in at_least.items():
            value = getattr(self, key)
            if value is not None and not value >= least:
                raise ValueError(f"stages.{self.name}.{key} must be at least {least}, got {value}")
        if not 0 <= self.patch_dropout < 1:
            raise ValueError(
                f"stages.{self.name}.patch_dropout must be from 0 to below 1, a share, got {self.patch_dropout}"
            )
        if self.lora_rank is not None and self.unfrozen_blocks == 0:
            raise ValueError(
                f"stages.{self.name}.lora_rank with unfrozen_blocks=0: no block would learn; leave one of them out"
            )

    def _check_adapters(self, encoder: Encoder, rank: int) -> None:
        from img2prompt.encoders.lora import largest_rank

        largest = largest_rank(encoder)
        if not largest:
            raise ValueError(f"stages.{self.name}.lora_rank={rank}: no block has a linear layer")
        if rank > largest:
            raise ValueError(
                f"stages.{self.name}.lora_rank={rank}: no layer of the blocks has a weight of a rank above {largest}"
            )

    def _check_size(self, encoder: Encoder, image_size_px: int) -> None:
        with torch.device("meta"):
            larger = build(encoder.config, Encoder)
        try:
            larger.set_image_size(image_size_px)
            larger.dry_run()
        except Exception as error:
            # Libraries raise nearly anything for a size that their patches or windows cannot divide.
            reason = " ".join(str(error).split())[:160]
            raise ValueError(f"stages.{self.name}.image_size_px={image_size_px}: {reason}") from None

    def run(self, climb: Climb) -> Regressor:
        self._prepare(climb)
        regressor, device = climb.regressor, climb.regressor.target_mean.device
        total = climb.steps(self)
        state = self._state(climb, total)
        if state:
            regressor.load_state_dict(state["regressor"])
        climb.rewind(climb.steps_before + (state["step"] if state else 0))
        data = self._given(climb)
        module = self._module(climb, data, total, state)
        signals = Signals()
        is_recorded = climb.curriculum.record and self.has_curriculum
        records = Records(climb.checkpoints.parent) if is_recorded else None
        keep = Keep(data, climb.checkpoints, climb.bf16, climb.loop, signals, state, records)
        # What a step has to log is logged before the step is saved.
        callbacks: list[Callback] = [
            signals,
            Log(self.log_every_n_steps),
            keep,
            Progress(keep, data.images_per_step),
        ]
        climb.earlier_seconds = keep.earlier_seconds
        first, began = module.start, time.monotonic()
        is_scored, state = state is None or state["scored"], None
        try:
            if first == total and not is_scored:
                keep.finish(module, climb.loggers)
            elif first < total:
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
            climb.unfinished = f"stopped by trainer.max_time at step {module.step} of {total}"
        seconds = time.monotonic() - began - keep.seconds
        climb.images_per_second = (
            (module.step - first) * data.images_per_step / seconds if module.step > first else None
        )
        regressor.requires_grad_(True)
        regressor.encoder.set_patch_dropout(0.0)
        if self.lora_rank is not None:
            from img2prompt.encoders.lora import remove_adapters

            remove_adapters(regressor.encoder)
        regressor.load_state_dict(load_file(climb.checkpoints / f"{self.name}.safetensors"))
        return regressor.to(device)

    def _prepare(self, climb: Climb) -> None:
        """Makes the encoder what trains here."""
        if self.image_size_px is not None:
            climb.resize(self.image_size_px)
        regressor, loop = climb.regressor, climb.loop
        if self.lora_rank is not None:
            from img2prompt.encoders.lora import add_adapters

            # Drawn alike, whether or not the stages before it ran in this process.
            torch.manual_seed(step_seed(climb.data.seed, f"{self.name} adapters", 0))
            add_adapters(regressor.encoder, self.lora_rank, self.lora_alpha)
            regressor.to(regressor.target_mean.device)
        self._freeze(regressor.encoder)
        if loop.activation_checkpointing:
            regressor.encoder.checkpoint_activations()
        if loop.compile:
            regressor.encoder.compile_blocks()

    def _state(self, climb: Climb, total: int) -> dict[str, Any] | None:
        """Where this stage was stopped; None when it begins."""
        state = read_state(climb.checkpoints)
        if not state or state["stage"] != self.name:
            return None
        if state["total"] != total:
            raise ValueError(
                f"{climb.checkpoints.parent}: the run began with {state['total']} steps and would go on with {total}: "
                "images have become unreadable, or readable, since; put them back"
            )
        best = climb.checkpoints / f"{self.name}.safetensors"
        # A stage that was stopped within an epoch has put its best aside.
        if state["best"] > -math.inf and not best.exists() and not best.with_suffix(".whole.safetensors").exists():
            raise ValueError(f"{best}: the best epoch so far ({state['best']:.4f}) is gone; put it back, or start anew")
        return state

    def _module(self, climb: Climb, data: PairData, total: int, state: dict[str, Any] | None) -> RegressorModule:
        regressor, loop, decay = climb.regressor, climb.loop, climb.optim.ema_decay
        device, first = regressor.target_mean.device, state["step"] if state else 0
        # A stage's own, so that it starts alike whether or not the stage before it ran in this process.
        loss = copy.deepcopy(climb.loss)
        loss.prepare(data.targets[data.train_rows])
        if state:
            loss.load_state_dict(state["loss"])
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
            steps_before=climb.steps_before,
            lr_factor=self.lr_factor,
            patch_dropout=self.patch_dropout,
            unmasked_steps=self.unmasked_epochs * data.steps_per_epoch,
        )
        if ranks.count() > 1:
            module.freeze_unused(next(data.batches_of(data.train_rows[:2])))
        alone = data.images_per_step // (data.accumulated * ranks.count()) == 1
        if alone and any(isinstance(layer, _BatchNorm) and layer.training for layer in module.train().modules()):
            raise ValueError("BatchNorm cannot learn from batches of one image; use a larger data.batch_size")
        return module

    def _given(self, climb: Climb) -> PairData:
        """What the stage trains on and validates with."""
        data = self._kept(climb)
        is_growing = self.has_curriculum and climb.start.growth > 1
        return data.with_draws(grown(climb, data)) if is_growing else data

    def _kept(self, climb: Climb) -> PairData:
        """The data, with what is computed once in place of pixels."""
        # A blend of what the prefix said is not what it says of a blend.
        is_live = climb.augment.changes_images or climb.augment.mixup > 0
        return climb.data if is_live else _with_prefix(climb)

    def _freeze(self, encoder: Encoder) -> None:
        """Leaves gradients to the last blocks. What lies before them needs none and has none: autograd records nothing
        until the first parameter that learns.
        """
        if self.unfrozen_blocks is None:
            return
        blocks = encoder.blocks()
        for block in blocks[: len(blocks) - self.unfrozen_blocks]:
            for parameter in block:
                parameter.requires_grad_(False)


def _with_prefix(climb: Climb) -> PairData:
    """The data with what the encoder's prefix says of each image, from the disk, if there is such a thing."""
    encoder, data = climb.regressor.encoder, climb.data
    kept = keep_prefix(encoder, data, climb.kept_folder) if encoder.prefix_names and climb.kept_folder else None
    return data if kept is None else data.with_kept(kept)


class Probe(FineTune):
    """The head alone on frozen features, which are computed once. Ridge regression in closed form or, with `epochs` and
    for heads that no affine map makes up, gradient descent, without augmentation. The fine-tune starts from it.
    """

    name = "probe"

    def __init__(self, epochs: int | None = None, epochs_descent: int = 20, log_every_n_steps: int = 10) -> None:
        super().__init__(
            epochs=epochs,
            epochs_pretrained=epochs_descent,
            epochs_scratch=epochs_descent,
            log_every_n_steps=log_every_n_steps,
            unfrozen_blocks=0,
        )

    def refusal(self, start: Start) -> str | None:
        if start.has_head:
            return "init_from brings its own head"
        if not start.pretrained:
            return "the encoder has no pretrained weights: its features mean nothing yet"
        if not start.is_affine and not self.steps(start):
            return "no epochs, and the head is no linear map that ridge could solve"
        if self.steps(start) and start.reads_tokens:
            return "the head reads tokens, and descends on pooled features alone"
        return None

    def steps(self, start: Start) -> int:
        return 0 if start.is_affine and self.epochs is None else super().steps(start)

    def run(self, climb: Climb) -> Regressor:
        data = climb.data
        if self.steps(climb.start):
            return super().run(climb)
        rows, features = features_of(climb.regressor, _with_prefix(climb), data.train_rows.tolist(), climb.bf16)
        groups = torch.from_numpy(prompt_numbers([data.samples[row].prompt for row in rows]))
        targets, head = data.targets[rows], climb.regressor.head
        if climb.head_is_fitted:
            known_weight, known_bias = (one.float().cpu() for one in head.affine())
            weight, bias = fit_upon(known_weight, known_bias, features, targets, groups)
        else:
            ridge = fit_ridge(features, targets, groups)
            weight, bias = ridge.weight, ridge.bias
        head.set_affine(weight, bias)
        if data.labels is not None:
            fit_words(head, features, rows, data.labels)
        return climb.regressor

    def _kept(self, climb: Climb) -> PairData:
        data = climb.data
        every = [*data.train_rows.tolist(), *data.val_rows.tolist()]
        rows, features = features_of(climb.regressor, _with_prefix(climb), every, climb.bf16, together=True)
        return data.with_kept(KeptFeatures(rows, features))
