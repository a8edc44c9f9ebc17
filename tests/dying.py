"""`synthesize` that kills itself: `python tests/dying.py CALL key=value …` dies at the CALLth batch (from 1)."""

import os
import signal
import sys

from img2prompt.commands.door import main
from img2prompt.synthesis.procedural import Procedural

if __name__ == "__main__":
    draw, left = Procedural.generate, [int(sys.argv[1])]

    def dying(self, *args):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return draw(self, *args)

    Procedural.generate = dying
    main("synthesize", sys.argv[2:])
