"""The outline of every kind of thing, as polygons in a box from -1 to 1 with y pointing down.

Drawing takes the polygons from here, turns and scales them, and fills them in. A shape has a body, which
takes the named colour, and details, which take a darker one.
"""

from dataclasses import dataclass

import numpy as np

Polygon = np.ndarray


@dataclass(frozen=True)
class Shape:
    """Body and detail polygons, each float32 [P, 2] of (x, y) in -1..1."""

    body: tuple[Polygon, ...]
    detail: tuple[Polygon, ...] = ()


def _dense(points: list[tuple[float, float]], step: float = 0.3) -> Polygon:
    # Long edges get points in between, since only points can wobble.
    out = []
    for (x0, y0), (x1, y1) in zip(points, points[1:] + points[:1], strict=True):
        parts = max(1, round(float(np.hypot(x1 - x0, y1 - y0)) / step))
        out += [(x0 + (x1 - x0) * i / parts, y0 + (y1 - y0) * i / parts) for i in range(parts)]
    return np.array(out, np.float32)


def _ellipse(x: float, y: float, rx: float, ry: float, start: float = 0.0, stop: float = 360.0) -> Polygon:
    angle = np.radians(np.linspace(start, stop, 28))
    return np.stack([x + rx * np.cos(angle), y + ry * np.sin(angle)], 1).astype(np.float32)


def _star(tips: int, inner: float) -> Polygon:
    angle = np.pi * np.arange(2 * tips) / tips - np.pi / 2
    radius = np.where(np.arange(2 * tips) % 2, inner, 1.05)
    return _dense(list(zip(radius * np.cos(angle), radius * np.sin(angle), strict=True)))


def _heart() -> Polygon:
    t = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x / 16.5, -(y + 2.5) / 15.5], 1).astype(np.float32)


def _moon() -> Polygon:
    outer = _ellipse(0.1, 0, 1, 1, 50, 310)
    inner = _ellipse(0.42, 0, 0.72, 0.78, 300, 60)
    return np.concatenate([outer, inner])


def _flower() -> tuple[Polygon, ...]:
    angle = 2 * np.pi * np.arange(5) / 5 - np.pi / 2
    return tuple(_ellipse(0.56 * np.cos(a), 0.56 * np.sin(a), 0.42, 0.42) for a in angle)


SHAPES: dict[str, Shape] = {
    "circle": Shape((_ellipse(0, 0, 0.95, 0.95),)),
    "square": Shape((_dense([(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]),)),
    "triangle": Shape((_dense([(0, -1), (1.0, 0.8), (-1.0, 0.8)]),)),
    "star": Shape((_star(5, 0.45),)),
    "heart": Shape((_heart(),)),
    "moon": Shape((_moon(),)),
    "tree": Shape(
        (
            _dense([(0, -1.1), (0.5, -0.4), (0.28, -0.4), (0.72, 0.15), (0.4, 0.15), (0.95, 0.7),
                    (-0.95, 0.7), (-0.4, 0.15), (-0.72, 0.15), (-0.28, -0.4), (-0.5, -0.4)]),
        ),
        (_dense([(-0.17, 0.7), (0.17, 0.7), (0.17, 1.15), (-0.17, 1.15)]),),
    ),
    "flower": Shape(_flower(), (_ellipse(0, 0, 0.32, 0.32),)),
    "house": Shape(
        (_dense([(-0.75, -0.2), (0.75, -0.2), (0.75, 0.95), (-0.75, 0.95)]),),
        (
            _dense([(-1.05, -0.15), (0, -1.05), (1.05, -0.15)]),
            _dense([(-0.2, 0.95), (-0.2, 0.3), (0.2, 0.3), (0.2, 0.95)]),
        ),
    ),
    "boat": Shape(
        (
            _dense([(-1.05, 0.4), (1.05, 0.4), (0.65, 0.95), (-0.65, 0.95)]),
            _dense([(0.1, -1.0), (0.9, 0.2), (0.1, 0.2)]),
            _dense([(-0.08, -0.75), (-0.75, 0.2), (-0.08, 0.2)]),
        ),
        (_dense([(-0.05, -1.05), (0.07, -1.05), (0.07, 0.4), (-0.05, 0.4)]),),
    ),
    "fish": Shape(
        (_dense([(0.5, 0), (1.1, -0.55), (1.1, 0.55)]), _ellipse(-0.25, 0, 0.85, 0.56)),
        (_ellipse(-0.68, -0.12, 0.11, 0.11), _dense([(-0.2, -0.15), (0.2, 0.0), (-0.2, 0.2)])),
    ),
    "cat": Shape(
        (
            _dense([(-0.85, -1.0), (-0.2, -0.55), (-0.75, 0.0)]),
            _dense([(0.85, -1.0), (0.2, -0.55), (0.75, 0.0)]),
            _ellipse(0, 0.15, 0.88, 0.75),
        ),
        (
            _ellipse(-0.36, 0.05, 0.13, 0.18),
            _ellipse(0.36, 0.05, 0.13, 0.18),
            _dense([(-0.13, 0.36), (0.13, 0.36), (0, 0.52)]),
        ),
    ),
}  # fmt: skip
