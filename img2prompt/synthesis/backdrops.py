"""What is behind the things: places, gradients, and the texture that unknown words become.

Drawing starts with one of these and puts the things on top. Every backdrop is float32 [S, S, 3] in 0..1.
"""

from collections.abc import Callable
from functools import cache

import numpy as np

from img2prompt.synthesis.colours import shade
from img2prompt.synthesis.words import GRADIENT

Rng = np.random.Generator


@cache
def grid(size_px: int) -> tuple[np.ndarray, np.ndarray]:
    """x and y of every pixel centre, float32 [S, S] each, from 0 to 1 across the picture."""
    line = (np.arange(size_px, dtype=np.float32) + 0.5) / size_px
    x, y = np.meshgrid(line, line)
    x.flags.writeable = y.flags.writeable = False
    return x, y


def rgb(*channels: float) -> np.ndarray:
    return np.array(channels, np.float32)


def blend(low: np.ndarray, high: np.ndarray, amount: np.ndarray) -> np.ndarray:
    """From colours `low` to `high` ([3] or [S, S, 3]) by amount [S, S] in 0..1."""
    return low + (high - low) * amount[..., None]


def _step(edge: np.ndarray, size_px: int) -> np.ndarray:
    # A ramp one pixel wide instead of a jump: an anti-aliased border where `edge` crosses zero.
    return np.clip(edge * size_px + 0.5, 0, 1)


def _dots(count: int, radius: tuple[float, float], size_px: int, rng: Rng) -> np.ndarray:
    picture = np.zeros((size_px, size_px), np.float32)
    x, y = grid(size_px)
    for cx, cy, r in zip(rng.random(count), rng.random(count), rng.uniform(*radius, count), strict=True):
        reach = r + 1.5 / size_px
        rows = slice(max(int((cy - reach) * size_px), 0), int((cy + reach) * size_px) + 2)
        cols = slice(max(int((cx - reach) * size_px), 0), int((cx + reach) * size_px) + 2)
        away = np.hypot(x[rows, cols] - cx, y[rows, cols] - cy)
        picture[rows, cols] = np.maximum(picture[rows, cols], _step(r - away, size_px))
    return picture


def _night(size_px: int, rng: Rng) -> np.ndarray:
    _, y = grid(size_px)
    sky = blend(rgb(0.03, 0.04, 0.16), rgb(0.13, 0.15, 0.38), y)
    return blend(sky, rgb(1, 0.97, 0.85), _dots(26, (0.002, 0.014), size_px, rng))


def _sunset(size_px: int, rng: Rng) -> np.ndarray:
    x, y = grid(size_px)
    horizon = rng.uniform(0.74, 0.82)
    sky = blend(rgb(0.45, 0.22, 0.50), rgb(0.99, 0.52, 0.28), np.clip(y / 0.5, 0, 1))
    sky = blend(sky, rgb(1, 0.80, 0.35), np.clip((y - 0.5) / 0.3, 0, 1))
    sun = _step(0.17 - np.hypot(x - rng.uniform(0.3, 0.7), y - horizon), size_px)
    sky = blend(sky, rgb(1, 0.95, 0.65), sun)
    hill = horizon + 0.03 * np.sin(6 * x + rng.uniform(0, 6))
    return blend(sky, rgb(0.22, 0.10, 0.25), _step(y - hill, size_px))


def _sea(size_px: int, rng: Rng) -> np.ndarray:
    x, y = grid(size_px)
    lift = 0.018 * np.sin(2 * np.pi * (3 * x + rng.random()))
    wave = np.clip(4 * np.sin(2 * np.pi * (7 * (y + lift) + rng.random())) - 2.6, 0, 1)
    water = blend(rgb(0.30, 0.72, 0.85), rgb(0.04, 0.33, 0.60), y)
    return blend(water, rgb(0.85, 0.96, 1), 0.75 * wave)


def _meadow(size_px: int, rng: Rng) -> np.ndarray:
    x, y = grid(size_px)
    hill = rng.uniform(0.33, 0.42) + 0.04 * np.sin(5 * x + rng.uniform(0, 6))
    blades = np.repeat(rng.random((size_px // 4 + 1, size_px), np.float32), 4, 0)[:size_px]
    grass = blend(rgb(0.30, 0.55, 0.14), rgb(0.62, 0.83, 0.32), blades)
    return blend(blend(rgb(0.55, 0.80, 0.98), rgb(0.85, 0.94, 1), y / 0.4), grass, _step(y - hill, size_px))


def _snow(size_px: int, rng: Rng) -> np.ndarray:
    _, y = grid(size_px)
    air = blend(rgb(0.56, 0.65, 0.75), rgb(0.80, 0.86, 0.92), y)
    return blend(air, rgb(1, 1, 1), _dots(38, (0.012, 0.03), size_px, rng))


def _desert(size_px: int, rng: Rng) -> np.ndarray:
    x, y = grid(size_px)
    picture = blend(rgb(0.98, 0.93, 0.75), rgb(0.99, 0.97, 0.88), y)
    for level, colour in (
        (0.32, rgb(0.93, 0.77, 0.48)),
        (0.56, rgb(0.86, 0.66, 0.36)),
        (0.8, rgb(0.76, 0.55, 0.28)),
    ):
        dune = level + 0.09 * np.sin(rng.uniform(4, 6) * x + rng.uniform(0, 6))
        picture = blend(picture, colour, _step(y - dune, size_px))
    return picture


def _brick(size_px: int, rng: Rng) -> np.ndarray:
    x, y = grid(size_px)
    rows = 7 * y + rng.random()
    columns = 3.5 * x + 0.5 * (np.floor(rows) % 2) + rng.random()
    tone = rng.random((9, 7), np.float32)[np.floor(rows).astype(int), np.floor(columns).astype(int)]
    joint = (np.minimum(rows % 1, 1 - rows % 1) < 0.1) | (np.minimum(columns % 1, 1 - columns % 1) < 0.06)
    return blend(blend(rgb(0.60, 0.27, 0.20), rgb(0.76, 0.40, 0.30), tone), rgb(0.84, 0.80, 0.75), joint * 1.0)


def _checkered(size_px: int, rng: Rng) -> np.ndarray:
    x, y = grid(size_px)
    cell = (np.floor(6 * x + rng.random()) + np.floor(6 * y + rng.random())) % 2
    return blend(rgb(0.28, 0.28, 0.30), rgb(0.93, 0.93, 0.91), cell)


def _lined(size_px: int, rng: Rng) -> np.ndarray:
    x, y = grid(size_px)
    rows = (8 * y + rng.random()) % 1
    paper = blend(rgb(0.99, 0.98, 0.92), rgb(0.48, 0.66, 0.90), (rows < 0.15) * 0.9)
    return blend(paper, rgb(0.92, 0.40, 0.45), (np.abs(x - 0.14) < 0.012) * 0.9)


def _gradient(colour: str, size_px: int, rng: Rng) -> np.ndarray:
    x, y = grid(size_px)
    turn = rng.uniform(0, 2 * np.pi)
    along = 0.5 + ((x - 0.5) * np.cos(turn) + (y - 0.5) * np.sin(turn)) * 0.75
    full = shade(colour, rng)
    return blend(0.25 + 0.75 * (0.35 * full + 0.65), 0.94 * full, np.clip(along, 0, 1))


def texture(size_px: int, rng: Rng) -> np.ndarray:
    """Crossing waves in a palette of three colours, all of them chosen by `rng`."""
    x, y = grid(size_px)
    height = np.zeros_like(x)
    for _ in range(4):
        fx, fy = rng.normal(0, 2.2, 2)
        height = height + np.sin(2 * np.pi * (fx * x + fy * y + rng.random()) + 0.8 * height)
    first, second, third = rng.uniform(0.1, 0.95, (3, 3)).astype(np.float32)
    return blend(blend(first, second, 0.5 + 0.5 * np.sin(height)), third, np.clip(np.cos(2 * height), 0, 1))


_PLACES: dict[str, Callable[[int, Rng], np.ndarray]] = {
    "night": _night, "sunset": _sunset, "sea": _sea, "meadow": _meadow, "snow": _snow,
    "desert": _desert, "brick": _brick, "checkered": _checkered, "lined": _lined,
}  # fmt: skip


def backdrop(name: str, size_px: int, rng: Rng) -> np.ndarray:
    """The background called `name`, float32 [S, S, 3] in 0..1; the empty name is a plain light one."""
    if name in _PLACES:
        return _PLACES[name](size_px, rng)
    if name:
        return _gradient(name.removesuffix(" " + GRADIENT), size_px, rng)
    _, y = grid(size_px)
    return blend(rgb(0.97, 0.97, 0.96), rgb(0.88, 0.88, 0.87), y)
