"""Ends training at a chosen moment: `python tests/killing.py MOMENT NUMBER key=value …`, or within a process.

batch   while a batch is put together (in the loader's thread where there is one)
step    when a step is done, before anything of it is kept
score   in the middle of a validation
best    while the best weights are written
save    while the state is written
rename  when the old state has moved and the new one is not there yet
"""

import os
import signal
import sys

from img2prompt.regressor import Regressor
from img2prompt.training import callbacks, checkpoint, datamodule


class Killed(BaseException):
    pass


def kill_process():
    os.kill(os.getpid(), signal.SIGKILL)


def raise_killed():
    raise Killed


def arm(moment, number, kill, setattr=setattr):
    """`kill()` is called at the `number`th time (from 1) that `moment` comes."""
    left = [number]

    def count():
        left[0] -= 1
        if left[0] == 0:
            kill()

    if moment == "batch":
        batch = datamodule.PairData.train_batch
        setattr(datamodule.PairData, "train_batch", lambda *args: (count(), batch(*args))[1])
    elif moment == "step":
        step = callbacks.Keep._after_step
        setattr(callbacks.Keep, "_after_step", lambda *args: (count(), step(*args))[1])
    elif moment == "score":
        batches = datamodule.PairData.batches_of

        def some(*arguments):
            for i, batch in enumerate(batches(*arguments)):
                if i == 0:
                    count()
                yield batch

        setattr(datamodule.PairData, "batches_of", some)
    elif moment == "best":
        save = Regressor.save

        def half(self, path, scores=None):
            if path.name == "finetune.safetensors":
                path.with_name(".finetune.half.tmp").write_bytes(b"half")
                count()
            save(self, path, scores)

        setattr(Regressor, "save", half)
    elif moment == "save":
        whole = checkpoint.torch.save

        def partly(state, file):
            file.write(b"PK\x03\x04 the first bytes")
            file.flush()
            count()
            file.seek(0)
            file.truncate()
            whole(state, file)

        setattr(checkpoint.torch, "save", partly)
    elif moment == "rename":
        replace = checkpoint.os.replace

        def then(source, goal):
            replace(source, goal)
            if os.path.basename(goal) == checkpoint.PREVIOUS:
                count()

        setattr(checkpoint.os, "replace", then)
    else:
        raise ValueError(moment)


if __name__ == "__main__":
    from img2prompt.commands.train import main

    arm(sys.argv[1], int(sys.argv[2]), kill_process)
    main(sys.argv[3:])
