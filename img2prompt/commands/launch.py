"""Several devices: one process for each, started here or by torchrun. The first trains as one alone would, and the
others follow it (commands/follow.py): they are told settings and rows, and never read a command line.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from img2prompt import ranks

# Set for processes that are started here: their standard input ends when the first rank does.
STARTED = "IMG2PROMPT_STARTED"
# The exit code of a process that ends only because another has: it has nothing to say.
LOST = 3
# How long a rank has to find out by itself that another is gone, and to say why it goes.
GRACE_S = 10.0


def check_started(devices: int) -> None:
    """ValueError when torchrun has started other than `devices` processes, or some of them elsewhere."""
    there = ranks.started()
    if there not in (1, devices):
        raise ValueError(f"trainer.devices={devices}, but torchrun started {there} processes; start as many")
    if there != int(os.environ.get("LOCAL_WORLD_SIZE", there)):
        raise ValueError("torchrun started processes on several machines; a run is on one")


@contextmanager
def others(devices: int) -> Iterator[None]:
    """Within it there are processes for the other devices, which end with it; with one device, or under torchrun,
    nothing is started. ValueError when another process was lost, SystemExit when it has said why.
    """
    if devices == 1 or ranks.started() > 1:
        try:
            yield
        except RuntimeError as error:
            if ranks.is_lost(error):
                raise ValueError(f"another process of this run is gone, and the run ends: {_short(error)}") from None
            raise
        return
    threads = torch.get_num_threads()
    # As torchrun does it: what the user set is for each process.
    each = threads if "OMP_NUM_THREADS" in os.environ else max(1, threads // devices)
    environment, store = _environment(devices, each)
    children: list[subprocess.Popen[bytes]] = []
    ending = threading.Event()
    try:
        for number in range(1, devices):
            children.append(_child(environment, number))
            threading.Thread(target=_watch, args=(children[-1], number, ending), daemon=True).start()
        torch.set_num_threads(each)
        with _set({**environment, "RANK": "0", "LOCAL_RANK": "0"}):
            yield
        ranks.join()
        ending.set()
        ranks.from_first(None)
        ranks.leave()
        for child in children:
            with suppress(subprocess.TimeoutExpired):
                child.wait(GRACE_S)
    except RuntimeError as error:
        if ranks.is_lost(error):
            raise _why(children, error) from None
        raise
    finally:
        ending.set()
        torch.set_num_threads(threads)
        for child in children:
            _end(child)
        with suppress(RuntimeError):
            ranks.leave()
        del store


def _environment(devices: int, threads: int) -> tuple[dict[str, str], Any]:
    """What torchrun would tell each of the processes, and the store where they meet: on the loopback alone."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    store = distributed.TCPStore(
        "127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )
    package = str(Path(__file__).parent.parent.parent)
    interface = {"GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo")} if sys.platform == "linux" else {}
    return {
        "WORLD_SIZE": str(devices),
        "LOCAL_WORLD_SIZE": str(devices),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": os.pathsep.join(part for part in (package, os.environ.get("PYTHONPATH")) if part),
        **interface,
    }, store


def _child(environment: dict[str, str], number: int) -> subprocess.Popen[bytes]:
    own = {**os.environ, **environment, "RANK": str(number), "LOCAL_RANK": str(number), STARTED: "1"}
    # -P: not what lies in the working folder under our name.
    command = [sys.executable, "-P", "-m", "img2prompt", "train"]
    return subprocess.Popen(command, env=own, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)


def _watch(child: "subprocess.Popen[bytes]", number: int, ending: threading.Event) -> None:
    child.wait()
    # This process may wait for that one where nothing interrupts it, in a kernel of NCCL, or be busy for an hour.
    if not ending.wait(2 * GRACE_S if child.returncode == LOST else GRACE_S):
        if child.returncode not in (1, LOST):
            print(f"train: {_told(child, number)}", file=sys.stderr, flush=True)
        os._exit(1)


def _why(children: "list[subprocess.Popen[bytes]]", error: BaseException) -> BaseException:
    """What to say of a process that is gone; SystemExit when it has spoken itself."""
    until = time.monotonic() + GRACE_S
    while True:
        gone = [(child, number) for number, child in enumerate(children, 1) if child.poll() not in (None, LOST)]
        for child, number in gone:
            return SystemExit(1) if child.returncode == 1 else ValueError(_told(child, number))
        if time.monotonic() > until:
            return ValueError(f"a process of this run does not answer, and the run ends: {_short(error)}")
        time.sleep(0.05)


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _told(child: "subprocess.Popen[bytes]", number: int) -> str:
    code = child.returncode
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return f"the process of device {number} {how}, and the run ends with it; resume= goes on from its last saved step"


def _end(child: "subprocess.Popen[bytes]") -> None:
    assert child.stdin is not None
    child.stdin.close()
    try:
        child.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


@contextmanager
def _set(environment: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
