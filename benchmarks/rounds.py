"""Paired rounds: every way takes its turn in each round, and the order turns round from one round to the next."""

import statistics
from collections.abc import Callable


def paired(ways: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each way returned (a rate, or seconds), one value a round. A round before the first is not counted."""
    values: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()
    for number in range(rounds):
        for name in list(ways) if number % 2 == 0 else list(ways)[::-1]:
            values[name].append(ways[name]())
    return values


def ratio(ours: list[float], theirs: list[float]) -> dict[str, str]:
    """Median, smallest and largest of the paired ratios ours / theirs."""
    ratios = sorted(one / other for one, other in zip(ours, theirs, strict=True))
    return {
        "median_ratio": f"{statistics.median(ratios):.2f}",
        "min_ratio": f"{ratios[0]:.2f}",
        "max_ratio": f"{ratios[-1]:.2f}",
    }
