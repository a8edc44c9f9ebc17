"""The Lightning module: one training step, and the optimiser that makes it."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from img2prompt.data.order import step_seed
from img2prompt.data.sample import Batch
from img2prompt.regressor import Regressor
from img2prompt.training.augment import Augment
from img2prompt.training.optim import AdamW


class RegressorModule(LightningModule):
    """Fits a regressor so that image embeddings land on their prompt's embedding.

    Steps are absolute: `start` is where a resumed stage goes on, and everything random in a step depends on
    (seed, stage, step) alone.
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
        self.losses: dict[str, Tensor] = {}

    @property
    def step(self) -> int:
        """How many steps of the stage are done."""
        return self.start + self.global_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optim.build(self.regressor, self.pretrained)

    def on_train_start(self) -> None:
        # Lightning leaves the mode of every layer as it finds it.
        self.train()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        torch.manual_seed(step_seed(self.seed, self.stage, self.step))
        factor = self.optim.lr_factor(self.step, self.total)
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = group["peak_lr"] * factor

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any, gradient_clip_algorithm: Any) -> None:
        # Lightning refuses to clip for a fused optimiser under autocast; bf16 has no scaled gradients to undo.
        if gradient_clip_val:
            nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        inputs = {**batch.inputs, "images": self.augment(batch.inputs["images"], batch.mirrorable)}
        outputs = self.regressor(inputs)  # embedding [B, D]
        losses: Mapping[str, Tensor] = self.loss(outputs, batch)
        # Kept on the device: reading a number here would make the host wait for every step.
        self.losses = {name: value.detach() for name, value in losses.items()}
        return torch.stack(list(losses.values())).sum()

    def train(self, mode: bool = True) -> "RegressorModule":
        super().train(mode)
        if self.frozen_batchnorm:
            for module in self.modules():
                # Running statistics of pretraining are better than those of a few thousand images of another kind.
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self
