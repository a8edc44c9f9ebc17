"""The Lightning module: one training step, and the optimiser that makes it."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from img2prompt import ranks
from img2prompt.data.order import step_seed
from img2prompt.data.sample import Batch
from img2prompt.regressor import Regressor
from img2prompt.training.augment import Augment, mixed
from img2prompt.training.ema import Ema
from img2prompt.training.guard import Guard
from img2prompt.training.loop import Loop
from img2prompt.training.optim import AdamW


class RegressorModule(LightningModule):
    """Fits a regressor so that image embeddings land on their prompt's embedding.

    Steps are absolute: `start` is where a resumed stage goes on, and everything random in a step depends on
    (seed, stage, step) alone, and of several ranks on which of them it is.
    """

    def __init__(
        self,
        regressor: Regressor,
        loss: nn.Module,
        optim: AdamW,
        pretrained: bool,
        seed: int,
        stage: str,
        start: int,
        total: int,
        augment: Augment,
        frozen_batchnorm: bool,
        loop: Loop,
        guard: Guard,
        ema: Ema | None,
        steps_before: int = 0,
        lr_factor: float = 1.0,
        patch_dropout: float = 0.0,
        unmasked_steps: int = 0,
    ) -> None:
        super().__init__()
        self.regressor = regressor
        self.loss = loss
        self.optim = optim
        self.pretrained = pretrained
        self.seed = seed
        self.stage = stage
        self.start = start
        self.total = total
        self.augment = augment
        self.frozen_batchnorm = frozen_batchnorm
        self.loop = loop
        self.guard = guard
        self.ema = ema
        self.steps_before = steps_before  # of the stages before this one
        self.lr_factor = lr_factor
        self.patch_dropout = patch_dropout
        self.unmasked_steps = unmasked_steps  # at the end
        self.losses: dict[str, Tensor] = {}  # of the current step, means over its batches
        self.at_boundary = False  # between two steps, where the run can be stopped and gone on with
        # They are alike on all ranks: a VAE or a captioner would be sent before each step.
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, still_buffers(self))

    @property
    def step(self) -> int:
        """How many steps of the stage are done."""
        return self.start + self.global_step

    @property
    def logged_step(self) -> int:
        """How many steps of the run are done."""
        return self.steps_before + self.step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optim.build(self.regressor, self.pretrained, self.loss)

    def on_train_start(self) -> None:
        # Lightning leaves the mode of every layer as it finds it.
        self.train()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        accumulated = self.loop.accumulate_grad_batches
        torch.manual_seed(step_seed(self.seed, ranks.own(self.stage), self.start * accumulated + batch_idx))
        self.at_boundary = False
        if batch_idx % accumulated:
            return
        self.losses = {}
        self.guard.remember(self)
        if self.patch_dropout:
            masked = self.step < self.total - self.unmasked_steps
            self.regressor.encoder.set_patch_dropout(self.patch_dropout if masked else 0.0)
        factor = self.lr_factor * self.optim.lr_factor(self.step, self.total)
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = group["peak_lr"] * factor

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        step = self.step
        optimizer_closure()
        # Gradients are means over the ranks by now, so what is not finite on one of them is so on all.
        self.losses = ranks.means(self.losses)
        adamw: Any = self.trainer.optimizers[0]
        learning = [parameter for group in adamw.param_groups for parameter in group["params"]]
        norm = nn.utils.get_total_norm([parameter.grad for parameter in learning if parameter.grad is not None])
        if self.loop.gradient_clip_norm:
            nn.utils.clip_grads_with_norm_(learning, self.loop.gradient_clip_norm, norm)
        bad = self.guard.judge(step, norm, *self.losses.values())
        if adamw.defaults["fused"]:
            # The fused kernel looks at this itself, so the host need not wait for the number.
            adamw.found_inf = bad
            adamw.step()
        elif not bad:
            adamw.step()
        if self.ema:
            self.ema.update(step)
        self.at_boundary = True

    def freeze_unused(self, batch: Batch) -> None:
        """Takes the gradient from parameters that the loss of a batch does not depend on: several ranks would wait for
        it.
        """
        device = self.regressor.target_mean.device
        inputs = {name: value.to(device) for name, value in batch.inputs.items()}
        # Without dropout, and without a trace in the statistics of BatchNorm.
        self.eval()
        labels = None if batch.labels is None else batch.labels.to(device)
        batch = replace(batch, inputs=inputs, targets=batch.targets.to(device), labels=labels)
        losses = self.loss(self.regressor(inputs), batch)
        learns = [parameter for parameter in self.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(torch.stack(list(losses.values())).sum(), learns, allow_unused=True)
        for parameter, gradient in zip(learns, gradients, strict=True):
            parameter.requires_grad_(gradient is not None)

    def averaged(self) -> AbstractContextManager[None]:
        """Within it the regressor has the weights that are scored and kept."""
        return self.ema.applied() if self.ema else nullcontext()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        inputs = dict(batch.inputs)
        if "images" in inputs:
            inputs["images"] = self.augment(inputs["images"], batch.mirrorable)
        if self.augment.mixup > 0:
            # Images, or the features that stand for them.
            ((name, values),) = inputs.items()
            inputs[name], batch = mixed(values, batch, self.augment.mixup)
        outputs = self.regressor(inputs)  # embedding [B, D]
        losses: Mapping[str, Tensor] = self.loss(outputs, batch)
        # Kept on the device: reading a number here would make the host wait for every step.
        for name, value in losses.items():
            part = value.detach() / self.loop.accumulate_grad_batches
            self.losses[name] = self.losses[name] + part if name in self.losses else part
        return torch.stack(list(losses.values())).sum()

    def train(self, mode: bool = True) -> "RegressorModule":
        super().train(mode)
        for module in self.regressor.encoder.modules():
            # Running statistics of pretraining are better than those of a few thousand images of another kind.
            if self.frozen_batchnorm and isinstance(module, _BatchNorm):
                module.eval()
            # What does not learn is not to be trained around: no dropout, no new statistics.
            learns = [parameter.requires_grad for parameter in module.parameters()]
            if learns and not any(learns):
                module.eval()
        return self


def still_buffers(module: nn.Module) -> list[str]:
    """The names of the buffers that no step changes: all but those of BatchNorm."""
    moving = {id(buffer) for layer in module.modules() if isinstance(layer, _BatchNorm) for buffer in layer.buffers()}
    return [name for name, buffer in module.named_buffers() if id(buffer) not in moving]
