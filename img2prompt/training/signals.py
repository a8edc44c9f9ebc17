"""Signals while a stage trains: the first is obeyed when a step is done, a second ends the process at once."""

import os
import signal
import threading
from types import FrameType
from typing import Any

from lightning import Callback

from img2prompt import ranks

_NOTED = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]


class Signals(Callback):
    """Takes the signals over when training starts, after Lightning has set handlers of its own, until `restore`."""

    def __init__(self) -> None:
        self.received: int | None = None
        # Other threads may not set handlers.
        self._usual: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self._usual = {number: signal.getsignal(number) for number in _NOTED}

    def on_train_start(self, trainer: Any, module: Any) -> None:
        for number in self._usual:
            signal.signal(number, self._note)

    def restore(self) -> None:
        for number, handler in self._usual.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            os._exit(128 + number)
        self.received = number
        if ranks.number():
            return
        name = signal.Signals(number).name
        # The handler may have interrupted a print: write past Python's buffers.
        os.write(2, f"\n{name}: stopping after this step; once more to stop at once\n".encode())
