"""What watches a stage: it scores, keeps, records and shows, and ends it when it is asked to."""

import math
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from lightning import Callback, Trainer
from lightning.pytorch.loggers import Logger
from tqdm import tqdm

from img2prompt import ranks
from img2prompt.files import link_or_copy
from img2prompt.training.checkpoint import write_state
from img2prompt.training.curriculum import Records
from img2prompt.training.datamodule import PairData
from img2prompt.training.loop import Loop
from img2prompt.training.module import RegressorModule
from img2prompt.training.scoring import Interrupted, score
from img2prompt.training.signals import Signals


class Keep(Callback):
    """Scores the regressor after each epoch and keeps the best; saves the state to go on from there, in between as
    `loop` says, and when a signal asks the run to stop. Of several ranks the first writes, and all stop at one step.
    """

    def __init__(
        self,
        data: PairData,
        checkpoints: Path,
        bf16: bool,
        loop: Loop,
        signals: Signals,
        state: dict[str, Any] | None,
        records: Records | None = None,
    ) -> None:
        self.data = data
        self.checkpoints = checkpoints
        self.bf16 = bf16
        self.loop = loop
        self.signals = signals
        self.state = state
        self.records = records
        self.best: float = state["best"] if state else -math.inf
        self.kept: list[list[float]] = state["kept"] if state else []  # [cosine, step] of the best epochs
        self.last: float | None = None
        self.seconds = 0.0  # of scoring
        self.earlier_seconds = state["seconds"] if state else 0.0  # of the stage, in processes before this one
        self._began = self._saved = time.monotonic()
        self._scored_step = state["step"] if state and state["scored"] else -1

    def on_train_start(self, trainer: Trainer, module: RegressorModule) -> None:
        if self.state:
            trainer.optimizers[0].load_state_dict(self.state["optimizer"])
            self._take_back(module)
            is_scored, self.state = self.state["scored"], None
            if not is_scored:
                self._after_step(trainer, module)

    def finish(self, module: RegressorModule, loggers: list[Logger]) -> None:
        """Scores the last epoch of a stage that was stopped when its last step was done: nothing is left to train."""
        assert self.state is not None
        self._take_back(module)
        self._score(loggers, module, whole=True)
        for logger in loggers:
            logger.save()
        if not ranks.number():
            kept = {"best": self.best, "kept": self.kept, "scored": True}
            write_state(self.checkpoints, {**self.state, **kept})

    def _take_back(self, module: RegressorModule) -> None:
        # A model of an epoch that was cut short may stand in the place of the best.
        if self._whole(module).exists() and not ranks.number():
            self._whole(module).replace(self._best(module))
            # A rename of one name of a file to another of its names leaves both.
            self._whole(module).unlink(missing_ok=True)

    def on_train_batch_end(
        self, trainer: Trainer, module: RegressorModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if module.at_boundary:
            self._after_step(trainer, module)

    def on_train_end(self, trainer: Trainer, module: RegressorModule) -> None:
        # A run that was stopped by the clock ends within an epoch. It is scored as it is, but the next half of the run
        # must find the best of the whole epochs.
        if self._scored_step != module.step:
            if self._best(module).exists() and not ranks.number():
                link_or_copy(self._best(module), self._whole(module))
            self._score(trainer.loggers, module, whole=False)
            self._save(trainer, module, scored=True)

    def _after_step(self, trainer: Trainer, module: RegressorModule) -> None:
        step, loop = module.step, self.loop
        if step % loop.max_skipped_steps == 0:
            self._tell_skipped(module)
        is_due = self.data.is_epoch_end(step)
        signal, is_late = self._asked_to_stop()
        if is_due and not signal:
            self._score(trainer.loggers, module, whole=True)
            signal, is_late = self._asked_to_stop()
        every, minutes = loop.checkpoint_every_n_steps, loop.checkpoint_every_minutes
        is_time = minutes is not None and time.monotonic() - self._saved > 60 * minutes
        if is_due or is_time or (every is not None and step % every == 0) or signal:
            self._save(trainer, module, scored=not is_due or self._scored_step == step)
        if is_due and not signal:
            # The last chance of a signal that came while the last step was saved.
            signal, is_late = self._asked_to_stop()
        if signal:
            folder = shlex.quote(str(self.checkpoints.parent))
            print(f"saved at step {step} of {module.total}; go on with resume={folder}", file=sys.stderr)
            raise SystemExit(128 + signal)
        if is_late:
            trainer.should_stop = True

    def _asked_to_stop(self) -> tuple[int, bool]:
        """The signal that came (0: none) and whether the time is over, on whichever rank."""
        deadline = self.loop.deadline
        is_late = deadline is not None and time.monotonic() > deadline
        signal, late = ranks.largest(self.signals.received or 0, is_late)
        return int(signal), bool(late)

    def _score(self, loggers: list[Logger], module: RegressorModule, whole: bool) -> None:
        began = time.monotonic()
        try:
            with module.averaged():
                # Of several ranks, each has statistics of BatchNorm of its own.
                ranks.copy_first(module.regressor.buffers())
                is_over = lambda: self.signals.received is not None  # noqa: E731
                scored = score(module.regressor, self.data, self.bf16, is_over, together=True)
                cosine = float(scored.cosines.mean())
                if self.records and whole and self.records.is_due(cosine):
                    rows = self.data.train_rows.tolist()
                    own = score(module.regressor, self.data, self.bf16, is_over, together=True, rows=rows)
                    self.records.add(cosine, module.step, own.rows, own.cosines)
                self._keep(cosine, module, whole)
        except Interrupted:
            # The next half of the run begins with it.
            return
        finally:
            module.train()
            self.seconds += time.monotonic() - began
        self._scored_step = module.step
        if whole:
            for logger in loggers:
                words = {f"val/{name}": value for name, value in scored.words.items()}
                logger.log_metrics({"val/cosine": cosine, **words}, module.logged_step)

    def _keep(self, cosine: float, module: RegressorModule, whole: bool) -> None:
        if not math.isfinite(cosine):
            # The best epoch so far and the state before this one are on disk and stay there.
            raise ValueError(f"{module.stage}: not finite after step {module.step}; lower optim.lr")
        self.last = cosine
        if ranks.number():
            return
        best, scores = self._best(module), {"val_cosine": cosine, "rung": module.stage, "step": module.step}
        if not best.exists() or cosine > self.best:
            module.regressor.save(best, scores)
            self.best = cosine if whole else self.best
        if not whole or self.loop.keep_checkpoints == 1:
            return
        self.kept = sorted([*self.kept, [cosine, module.step]], key=lambda one: (-one[0], one[1]))
        self.kept = self.kept[: self.loop.keep_checkpoints]
        paths = {self.checkpoints / f"{module.stage}_step{int(step):07d}.safetensors": step for _, step in self.kept}
        for path, step in paths.items():
            if step == module.step:
                module.regressor.save(path, scores)
        for path in self.checkpoints.glob(f"{module.stage}_step*.safetensors"):
            if path not in paths:
                path.unlink()

    def _save(self, trainer: Trainer, module: RegressorModule, scored: bool) -> None:
        self._tell_skipped(module)
        if ranks.number():
            return
        for logger in trainer.loggers:
            logger.save()
        write_state(
            self.checkpoints,
            {
                "stage": module.stage,
                "step": module.step,
                "total": module.total,
                "scored": scored,
                "best": self.best,
                "kept": self.kept,
                "seconds": self.earlier_seconds + time.monotonic() - self._began,
                "skipped": module.guard.skipped,
                "regressor": module.regressor.state_dict(),
                "loss": module.loss.state_dict(),
                "optimizer": trainer.optimizers[0].state_dict(),
                "ema": module.ema.averages if module.ema else {},
            },
        )
        self._saved = time.monotonic()

    def _tell_skipped(self, module: RegressorModule) -> None:
        for step in module.guard.report(module.step):
            ids = ", ".join(self.data.ids_of(module.stage, step)[:8])
            told = f"{module.stage}: step {step} skipped, its loss or gradients were not finite"
            print(f"{told} (images {ids}, …)", file=sys.stderr)

    def _best(self, module: RegressorModule) -> Path:
        return self.checkpoints / f"{module.stage}.safetensors"

    def _whole(self, module: RegressorModule) -> Path:
        return self.checkpoints / f"{module.stage}.whole.safetensors"


class Log(Callback):
    """Writes losses and learning rate to the loggers every n steps."""

    def __init__(self, every_n_steps: int) -> None:
        self.every_n_steps = every_n_steps

    def on_train_batch_end(
        self, trainer: Trainer, module: RegressorModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if module.at_boundary and module.step % self.every_n_steps == 0:
            metrics = {f"train/{name}": float(value) for name, value in module.losses.items()}
            metrics["lr"] = trainer.optimizers[0].param_groups[0]["lr"]
            for logger in trainer.loggers:
                logger.log_metrics(metrics, module.logged_step)


class Progress(Callback):
    """A bar with ETA, images/s and validation cosine; where there is no terminal, one line an epoch."""

    def __init__(self, keep: Keep, images_per_step: int) -> None:
        self.keep = keep
        self.images_per_step = images_per_step
        self._bar: Any = None
        self._began = 0.0

    def on_train_start(self, trainer: Trainer, module: RegressorModule) -> None:
        self._began = time.monotonic()
        self._bar = tqdm(
            total=module.total * self.images_per_step,
            initial=module.start * self.images_per_step,
            desc=module.stage,
            unit=" images",
            unit_scale=True,
            mininterval=0.5,
            disable=not sys.stderr.isatty(),
        )

    def on_train_batch_end(
        self, trainer: Trainer, module: RegressorModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not module.at_boundary:
            return
        keep = self.keep
        validation = "" if keep.last is None else f"val cosine {keep.last:.4f}"
        if self._bar.disable:
            if keep.data.is_epoch_end(module.step):
                done = module.step - module.start
                seconds = time.monotonic() - self._began
                left = seconds / done * (module.total - module.step)
                print(
                    f"{module.stage}: step {module.step}/{module.total}, "
                    f"{done * self.images_per_step / seconds:.0f} images/s, {validation}, ETA {left:.0f} s",
                    file=sys.stderr,
                )
        else:
            self._bar.set_postfix_str(validation, refresh=False)
            self._bar.update(self.images_per_step)

    def on_train_end(self, trainer: Trainer, module: RegressorModule) -> None:
        self._bar.close()
