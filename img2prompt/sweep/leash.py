"""Runs a command, and ends it with all that it has started when whoever started this ends, even by `kill -9`.

`python leash.py command …`, with a pipe as standard input that nobody else holds: its end is the end. The sweep starts
each training so, in a process group of its own. This file runs as a script and imports nothing of ours.
"""

import os
import signal
import subprocess
import sys
import threading


def main() -> None:
    # They are for the training; what is ignored, and not handled, it would inherit.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    threading.Thread(target=_watch, daemon=True).start()
    child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    code = child.wait()
    os._exit(code if code >= 0 else 128 - code)


def _watch() -> None:
    while os.read(0, 1):
        pass
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
