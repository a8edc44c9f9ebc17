"""What watches a stage: it scores, keeps, records and shows. None of it changes model, data or schedule."""

import math
import sys
import time
from pathlib import Path
from typing import Any

from lightning import Callback, Trainer
from tqdm import tqdm

from img2prompt.training.checkpoint import write_state
from img2prompt.training.datamodule import PairData
from img2prompt.training.module import RegressorModule
from img2prompt.training.scoring import score


class KeepBest(Callback):
    """Scores the regressor after each epoch and at the end, keeps the best, and saves the state to go on from."""

    def __init__(
        self, data: PairData, best_path: Path, state_path: Path, bf16: bool, state: dict[str, Any] | None
    ) -> None:
        self.data = data
        self.best_path = best_path
        self.state_path = state_path
        self.bf16 = bf16
        self.state = state
        self.best = state["best"] if state else float("-inf")
        self.last: float | None = None
        self.seconds = 0.0  # of scoring
        self.earlier_seconds = state["seconds"] if state else 0.0  # of the stage, in processes before this one
        self._began = time.monotonic()
        self._scored_step = state["step"] if state else -1

    def on_train_start(self, trainer: Trainer, module: RegressorModule) -> None:
        if self.state:
            trainer.optimizers[0].load_state_dict(self.state["optimizer"])

    def on_train_batch_end(
        self, trainer: Trainer, module: RegressorModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if module.step % self.data.steps_per_epoch == 0:
            self._score(trainer, module)

    def on_train_end(self, trainer: Trainer, module: RegressorModule) -> None:
        # A run that was stopped by the clock ends within an epoch.
        if self._scored_step != module.step:
            self._score(trainer, module)

    def _score(self, trainer: Trainer, module: RegressorModule) -> None:
        began = time.monotonic()
        values, _, _ = score(module.regressor, self.data, self.bf16)
        module.train()
        self.last = float(values.mean())
        if not math.isfinite(self.last):
            # The best epoch so far and the state before this one are on disk and stay there.
            raise ValueError(f"{module.stage}: not finite after step {module.step}; lower optim.lr")
        if not self.best_path.exists() or self.last > self.best:
            self.best = self.last
            module.regressor.save(self.best_path, {"val_cosine": self.last, "rung": module.stage, "step": module.step})
        for logger in trainer.loggers:
            logger.log_metrics({"val/cosine": self.last}, module.step)
        write_state(
            self.state_path,
            {
                "stage": module.stage,
                "step": module.step,
                "total": module.total,
                "best": self.best,
                "seconds": self.earlier_seconds + time.monotonic() - self._began,
                "regressor": module.regressor.state_dict(),
                "optimizer": trainer.optimizers[0].state_dict(),
            },
        )
        self._scored_step = module.step
        self.seconds += time.monotonic() - began


class Log(Callback):
    """Writes losses and learning rate to the loggers every n steps."""

    def __init__(self, every_n_steps: int) -> None:
        self.every_n_steps = every_n_steps

    def on_train_batch_end(
        self, trainer: Trainer, module: RegressorModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if module.step % self.every_n_steps == 0:
            metrics = {f"train/{name}": float(value) for name, value in module.losses.items()}
            metrics["lr"] = trainer.optimizers[0].param_groups[0]["lr"]
            for logger in trainer.loggers:
                logger.log_metrics(metrics, module.step)


class Progress(Callback):
    """A bar with ETA, images/s and validation cosine; where there is no terminal, one line an epoch."""

    def __init__(self, keep: KeepBest, batch_size: int) -> None:
        self.keep = keep
        self.batch_size = batch_size
        self._bar: Any = None
        self._began = 0.0

    def on_train_start(self, trainer: Trainer, module: RegressorModule) -> None:
        self._began = time.monotonic()
        self._bar = tqdm(
            total=module.total * self.batch_size,
            initial=module.start * self.batch_size,
            desc=module.stage,
            unit=" images",
            unit_scale=True,
            mininterval=0.5,
            disable=not sys.stderr.isatty(),
        )

    def on_train_batch_end(
        self, trainer: Trainer, module: RegressorModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        keep = self.keep
        validation = "" if keep.last is None else f"val cosine {keep.last:.4f}"
        if self._bar.disable:
            if module.step % keep.data.steps_per_epoch == 0:
                done = module.step - module.start
                seconds = time.monotonic() - self._began
                left = seconds / done * (module.total - module.step)
                print(
                    f"{module.stage}: step {module.step}/{module.total}, "
                    f"{done * self.batch_size / seconds:.0f} images/s, {validation}, ETA {left:.0f} s",
                    file=sys.stderr,
                )
        else:
            self._bar.set_postfix_str(validation, refresh=False)
            self._bar.update(self.batch_size)

    def on_train_end(self, trainer: Trainer, module: RegressorModule) -> None:
        self._bar.close()
