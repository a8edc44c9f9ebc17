"""What the process of a further device does: it takes its part in the stages that the first one tells it of.

It reads no command line and writes nothing, and says nothing but why it fails.
"""

import os
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from img2prompt import ranks
from img2prompt.commands import assembly
from img2prompt.commands.launch import GRACE_S, LOST, STARTED
from img2prompt.commands.sentences import sentence_of
from img2prompt.commands.train import climb_of, pairs_of
from img2prompt.training.pairs import Rows


def main() -> None:
    """Follows the first rank from run to run until that one is done. Exits with 1 and one sentence on an error, and
    without one when only another rank is gone.
    """
    if STARTED in os.environ:
        threading.Thread(target=_end_with_the_first, daemon=True).start()
    sys.stdout = sys.stderr = open(os.devnull, "w")
    try:
        ranks.join()
        while (run := ranks.from_first()) is not None:
            _follow(*run)
        ranks.leave()
    except Exception as error:
        if ranks.is_lost(error):
            os._exit(LOST)
        # What is wrong here is often wrong everywhere, and then the first rank says it and ends this process.
        time.sleep(GRACE_S / 3)
        sentence = None if os.environ.get("IMG2PROMPT_TRACEBACK") else sentence_of("train", error)
        told = sentence or "".join(traceback.format_exception(error))
        print(f"train: device {ranks.number()}: {told}", file=sys.__stderr__, flush=True)
        # A thread of a pool, or a collective that waits, must not hold up the others' end.
        os._exit(1)


def _follow(settings: dict[str, Any], folder: Path, table: dict[str, Any]) -> None:
    rows = Rows(**table | {"targets": torch.from_numpy(table["targets"])})
    prepared = assembly.prepare({**settings, "logger": {}}, folder)
    start = assembly.start(settings, rows, prepared.encoder)
    pixels, _ = assembly.pixels(settings, rows.samples, prepared.encoder)
    pairs = pairs_of(settings, rows, pixels, lambda count: None)
    climb = climb_of(settings, folder, prepared, start, pairs)
    while (told := ranks.from_first()) is not None:
        name, image_size_px = told
        climb.resize(image_size_px)
        ranks.copy_first(climb.regressor.state_dict().values())
        next(stage for stage in prepared.recipe.stages if stage.name == name).run(climb)


def _end_with_the_first() -> None:
    # Nothing is ever written to it.
    os.read(0, 1)
    os._exit(1)
