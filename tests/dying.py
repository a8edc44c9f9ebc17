"""`synthesize` that kills itself: `python tests/dying.py CALL key=value …` dies at the CALLth batch (from 1)."""

import os
import signal
import sys

from img2prompt.commands.door import main
from img2prompt.synthesis import produce

if __name__ == "__main__":
    make, left = produce._made, [int(sys.argv[1])]

    def dying(*args, **options):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return make(*args, **options)

    produce._made = dying
    main("synthesize", sys.argv[2:])
