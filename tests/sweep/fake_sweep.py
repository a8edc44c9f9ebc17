"""`img2prompt sweep` whose trainings are fake: python tests/sweep/fake_sweep.py +sweep=lr …"""

import sys
from pathlib import Path

from img2prompt.commands import door, sweep

if __name__ == "__main__":
    fake = (sys.executable, str(Path(__file__).with_name("fake_training.py")))
    sweep.main = lambda arguments: sweep.sweep(arguments, command=fake)
    door.main("sweep")
