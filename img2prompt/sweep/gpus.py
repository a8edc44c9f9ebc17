"""Which GPUs each trial of a sweep has. They are counted without CUDA, which would take memory on each of them."""

import os
import subprocess
from collections.abc import Callable, Mapping, Sequence

_VISIBLE, _THREADS = "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"


def asked_driver() -> list[str]:
    """The numbers of the GPUs of this machine, as its driver says them; none without a driver."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []


def visible(
    wanted: str | Sequence[int | str], environment: Mapping[str, str], ask: Callable[[], list[str]] = asked_driver
) -> list[str]:
    """The GPUs that trials may use: `wanted`, or with auto those that the environment leaves visible, else all."""
    if not isinstance(wanted, str):
        numbers = [str(one) for one in wanted if str(one).isdigit()]
        there = ask() if numbers else []
        lacking = next((one for one in numbers if one not in there), None)
        if lacking is not None:
            told = f"there are {', '.join(there)}" if there else "nvidia-smi names none"
            raise ValueError(f"gpus={list(wanted)}: there is no GPU {lacking} here; {told}")
        if len({str(one) for one in wanted}) < len(wanted):
            raise ValueError(f"gpus={list(wanted)}: one is there twice; workers share GPUs where there are too few")
        return [str(one) for one in wanted]
    if wanted != "auto":
        raise ValueError(f"gpus={wanted}: must be auto, or a [list] of numbers or UUIDs such as [0,1]; [] is none")
    given = environment.get(_VISIBLE)
    if given is None:
        return ask()
    found = [one.strip() for one in given.split(",")]
    # CUDA takes them up to the first that is none.
    end = next((number for number, one in enumerate(found) if one in ("", "-1")), len(found))
    return found[:end]


def slots(workers: int, each: int, found: Sequence[str], environment: Mapping[str, str]) -> list[dict[str, str]]:
    """What is set in the environment of each worker's trials: GPUs of its own as long as there are enough, and its
    share of the threads. ValueError when a trial needs more GPUs than there are.
    """
    if found and each > len(found):
        raise ValueError(f"trainer.devices={each}, but there are {len(found)} GPUs; lower it, or name more with gpus=")
    sets = [found[start : start + each] for start in range(0, len(found) - each + 1, each)]
    own = [{_VISIBLE: ",".join(sets[number % len(sets)])} if sets else {} for number in range(workers)]
    if workers > 1 and _THREADS not in environment:
        own = [{**one, _THREADS: str(max(1, _cpus() // workers))} for one in own]
    return own


def told(workers: int, each: int, found: Sequence[str]) -> str:
    """What a user is to know of the division."""
    if not found:
        return "no GPU: trials run on the CPU"
    sets = len(found) // each
    beside = f"; {workers} workers share {sets} places, so that trials of one GPU share its memory"
    return f"GPUs {', '.join(found)}: {each} for each trial{beside if workers > sets else ''}"


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
