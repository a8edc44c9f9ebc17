"""Steps whose loss or gradients are not finite change nothing: they are skipped, counted, and at last end the run."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class Guard:
    """Judges each step on the device, and tells the host what it found every `most` steps: to read a number at every
    step would make the host wait for the GPU.
    """

    def __init__(self, most: int, device: torch.device, start: int = 0, skipped: Iterable[int] = ()) -> None:
        self.most = most
        self.skipped = list(skipped)  # numbers of the steps, from 0
        self._recent = torch.zeros(most, device=device)
        for step in self.skipped:
            if step >= start - most:
                self._recent[step % most] = 1
        self._norms: list[_BatchNorm] | None = None
        self._buffers: list[Tensor] = []
        self._before: list[Tensor] = []

    def remember(self, module: nn.Module) -> None:
        """Before a step: what its forward pass changes, the running statistics of live BatchNorm layers."""
        if self._norms is None:
            self._norms = [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]
        live = [layer for layer in self._norms if layer.training]
        self._buffers = [buffer for layer in live for buffer in layer.buffers() if buffer.is_floating_point()]
        self._before = [buffer.clone() for buffer in self._buffers]

    def judge(self, step: int, *values: Tensor) -> Tensor:
        """1 on the device where any of `values` is not finite and the step must be skipped, else 0."""
        bad = (~torch.stack([value.detach().float().sum() for value in values]).isfinite().all()).float()
        self._recent[step % self.most] = bad
        for buffer, before in zip(self._buffers, self._before, strict=True):
            buffer.copy_(torch.where(bad > 0, before, buffer))
        return bad

    def report(self, done: int) -> list[int]:
        """The steps that were skipped since the last report, `done` steps being done. ValueError when as many as are
        allowed were skipped one after another.
        """
        first = max(0, done - self.most)
        flags = self._recent.tolist()
        found = [step for step in range(first, done) if flags[step % self.most]]
        new = [step for step in found if not self.skipped or step > self.skipped[-1]]
        self.skipped += new
        if self._streak(first) >= self.most:
            raise ValueError(
                f"the loss or its gradients were not finite in {self.most} steps one after another, up to step {done}; "
                "nothing of them was kept. Lower optim.lr or look at the data; trainer.max_skipped_steps is the limit"
            )
        return new

    def _streak(self, first: int) -> int:
        """The longest row of skipped steps that reaches `first` or later."""
        longest = length = 0
        for before, step in zip([-2, *self.skipped], self.skipped, strict=False):
            length = length + 1 if step == before + 1 else 1
            longest = max(longest, length) if step >= first else longest
        return longest
