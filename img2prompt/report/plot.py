"""Where values lie in a chart, and its frame. Coordinates are those of the view box, in which text has 11 px."""

import math

from img2prompt.report.page import Html, element

WIDTH, HEIGHT = 440, 200
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 12, 30


class Plot:
    """Where values lie in the view box, with room for round numbers at the ends."""

    def __init__(
        self, left: float, right: float, low: float, high: float, margin: float = LEFT, height: float = HEIGHT
    ) -> None:
        self.margin, self.height = margin, height
        wide = max(0.5, abs(left) * 1e-9)
        self.left, self.right = (left, right) if right > left else (left - wide, right + wide)
        pad = max(abs(high) * 1e-3, 1e-9)
        low, high = (low, high) if high > low else (low - pad, high + pad)
        step = step_of((high - low) / 4)
        self.low, self.high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step

    def x(self, value: float) -> float:
        return self.margin + (value - self.left) / (self.right - self.left) * (WIDTH - self.margin - RIGHT)

    def y(self, value: float) -> float:
        return self.height - BOTTOM - (value - self.low) / (self.high - self.low) * (self.height - BOTTOM - TOP)

    def frame(self, x_title: str) -> list[Html]:
        shapes = []
        for value in ticks(self.low, self.high, 4):
            y = px(self.y(value))
            shapes.append(element("line", x1=self.margin, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid"))
            shapes.append(element("text", short(value), x=self.margin - 6, y=px(self.y(value) + 4), class_="end"))
        for value in ticks(self.left, self.right, 6):
            shapes.append(
                element("text", short(value), x=px(self.x(value)), y=px(self.height - BOTTOM + 15), class_="middle")
            )
        if x_title:
            shapes.append(element("text", x_title, x=WIDTH - RIGHT, y=px(self.height - 2), class_="end"))
        return shapes

    def columns(self, x_title: str) -> list[Html]:
        """Lines from top to bottom alone: what is below each other has no scale."""
        shapes = []
        for value in ticks(self.left, self.right, 5):
            x = px(self.x(value))
            shapes.append(element("line", x1=x, x2=x, y1=TOP, y2=px(self.height - BOTTOM), class_="grid"))
            shapes.append(element("text", short(value), x=x, y=px(self.height - BOTTOM + 15), class_="middle"))
        shapes.append(element("text", x_title, x=WIDTH - RIGHT, y=px(self.height - 2), class_="end"))
        return shapes


def step_of(least: float) -> float:
    """1, 2 or 5 times a power of ten, at least as large."""
    if not least > 1e-12:
        return 0.01
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))


def ticks(low: float, high: float, count: int) -> list[float]:
    step = step_of((high - low) / count)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def short(value: float) -> str:
    if value and abs(value) < 1e-3:
        return f"{value:.1e}".replace("e-0", "e-")
    if 1000 <= abs(value) < 1e7:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def px(value: float) -> str:
    return f"{value:.1f}"
