"""Charts as inline SVG: they take the page's colours, and their numbers can be read aloud or pointed at.

Coordinates are those of the view box, in which text has 11 px; the page scales it.
"""

import base64
import io
import math
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from img2prompt.report.page import Html, clipped, element
from img2prompt.report.plot import BOTTOM, HEIGHT, TOP, WIDTH, Plot, px, short, step_of

_MOST_POINTS = 240
_MOST_BINS = 40
_ROW_PX, _NAME_PX = 26, 186
_NAME_CHARACTERS = 28
# Blue, of which the page's background takes what is missing, be it light or dark.
_HEAT = (70, 140, 205)


def curve(points: Sequence[tuple[float, float]], title: str, x_title: str) -> Html:
    """A line through (x, y); of very many points it goes through means of neighbours, and it breaks where y is no
    number. Nothing without a point.
    """
    finite = [y for _, y in points if _is_number(y)]
    if not finite:
        return Html("")
    each = -(-len(points) // _MOST_POINTS)
    drawn = [_mean(points[start : start + each]) for start in range(0, len(points), each)]
    xs, ys = [x for x, _ in drawn], [y for _, y in drawn if _is_number(y)]
    plot = Plot(min(xs), max(xs), min(ys), max(ys))
    parts, pen = [], "M"
    for x, y in drawn:
        if not _is_number(y):
            pen = "M"
            continue
        parts.append(f"{pen}{plot.x(x):.1f} {plot.y(y):.1f}")
        pen = "L"
    shapes = [*plot.frame(x_title), element("path", d="".join(parts), class_="line")]
    if len(drawn) <= _MOST_POINTS // 4:
        shapes += [
            element(
                "circle",
                element("title", f"{x:g}: {y:.6g}"),
                cx=px(plot.x(x)),
                cy=px(plot.y(y)),
                r="2.6",
                class_="dot",
            )
            for x, y in drawn
            if _is_number(y)
        ]
    count = "1 point" if len(points) == 1 else f"{len(points):,} points"
    last = f"{count}, from {short(min(finite))} to {short(max(finite))}, last {short(finite[-1])}"
    averaged = f"; drawn as means of {each} neighbours" if each > 1 else ""
    return _chart(title, last + averaged, HEIGHT, shapes)


def histogram(
    values: Sequence[float],
    title: str,
    marks: Mapping[str, float] | None = None,
    span: tuple[float, float] | None = None,
) -> Html:
    """How many of the finite values are in each of equal bins, and named lines at `marks`; `span` makes several
    comparable. Nothing without a finite value.
    """
    finite = sorted(value for value in values if _is_number(value))
    if not finite:
        return Html("")
    lines = {name: value for name, value in (marks or {}).items() if _is_number(value)}
    reach = [finite[0], finite[-1], *lines.values()]
    low, high = span or (min(reach), max(reach))
    width = step_of((high - low) / min(_MOST_BINS, max(6, math.isqrt(len(finite)) * 2)))
    first = math.floor(low / width)
    counts = [0] * (math.floor(high / width) - first + 1)
    for value in finite:
        counts[min(max(math.floor(value / width) - first, 0), len(counts) - 1)] += 1
    plot = Plot(first * width, (first + len(counts)) * width, 0, max(counts))
    shapes = plot.frame("")
    for number, count in enumerate(counts):
        left = (first + number) * width
        if count:
            name = element("title", f"{left:.4g} to {left + width:.4g}: {count:,}")
            shapes.append(_bar(plot, left, left + width, count, name))
    for number, (mark, value) in enumerate(lines.items()):
        x = plot.x(value)
        shapes.append(element("line", x1=px(x), x2=px(x), y1=TOP, y2=HEIGHT - BOTTOM, class_="mean"))
        side = "end" if x > WIDTH / 2 else None
        y = TOP + 9 + 13 * number
        shapes.append(element("text", f"{mark} {value:.3f}", x=px(x + (-4 if side else 4)), y=y, class_=side))
    median = finite[len(finite) // 2]
    told = f"{len(finite):,} values, from {finite[0]:.4f} to {finite[-1]:.4f}, median {median:.4f}"
    odd = len(values) - len(finite)
    return _chart(title, told + (f"; {odd:,} are no numbers" if odd else ""), HEIGHT, shapes)


def shares(counts: Mapping[str, Mapping[int, int]], title: str, x_title: str) -> Html:
    """Of up to two kinds of items, which share has each whole number: the first as bars, the second as a line. What
    is above the 99th percentile is in the last bin.
    """
    totals = {name: sum(one.values()) for name, one in counts.items() if one}
    if not totals:
        return Html("")
    top = max(_percentile(counts[name], 0.99) for name in totals)
    width = -(-(top + 1) // _MOST_BINS)
    bins = top // width + 1
    heights = {name: [0.0] * bins for name in totals}
    for name, total in totals.items():
        for number, count in counts[name].items():
            heights[name][min(number // width, bins - 1)] += 100 * count / total
    plot = Plot(0, bins * width, 0, max(max(one) for one in heights.values()))
    shapes = plot.frame(x_title)
    for place, (name, values) in enumerate(heights.items()):
        if place:
            steps = [
                f"L{plot.x(n * width):.1f} {plot.y(y):.1f}L{plot.x((n + 1) * width):.1f} {plot.y(y):.1f}"
                for n, y in enumerate(values)
            ]
            start = f"M{plot.x(0):.1f} {plot.y(0):.1f}"
            shapes.append(element("path", element("title", name), d=start + "".join(steps), class_="outline"))
            continue
        for number, share in enumerate(values):
            if share:
                last = " or more" if number == bins - 1 else f" to {(number + 1) * width - 1}" if width > 1 else ""
                title_of_bar = element("title", f"{name}: {number * width}{last} words: {share:.1f} %")
                shapes.append(_bar(plot, number * width, (number + 1) * width, share, title_of_bar))
    told = "; ".join(
        f"{name}: {total:,}, median {_percentile(counts[name], 0.5)}, longest {max(counts[name])}"
        for name, total in totals.items()
    )
    key = ", bars and line" if len(totals) > 1 else ""
    return _chart(f"{title} (percent{key})", told, HEIGHT, shapes)


def intervals(rows: Sequence[tuple[str, float, float, float, bool]], title: str) -> Html:
    """Means with their intervals, one below the other: (name, mean, low, high, whether it is a floor)."""
    finite = [row for row in rows if all(_is_number(value) for value in row[1:4])]
    if not finite:
        return Html("")
    height = TOP + _ROW_PX * len(finite) + BOTTOM
    plot = Plot(min(row[2] for row in finite), max(row[3] for row in finite), 0, 1, _NAME_PX, height)
    shapes = plot.columns("mean cosine")
    for number, (name, mean, low, high, is_floor) in enumerate(finite):
        y = TOP + _ROW_PX * (number + 0.5)
        kind = ("floor-whisker", "floor") if is_floor else ("whisker", "dot")
        told = element("title", f"{name}: {mean:.4f} ({low:.4f} to {high:.4f})")
        shapes += [
            element("text", _shortened(name), x=_NAME_PX - 8, y=px(y + 4), class_="end name"),
            element("line", x1=px(plot.x(low)), x2=px(plot.x(high)), y1=px(y), y2=px(y), class_=kind[0]),
            element("circle", told, cx=px(plot.x(mean)), cy=px(y), r="4.5", class_=kind[1]),
        ]
    return _chart(title, "mean cosine with 95 % interval", height, shapes)


def history(values: Sequence[tuple[int, float, bool]], title: str) -> Html:
    """Trials in their order, (number, value, whether it was finished), with the best so far of those that were."""
    finite = [one for one in values if _is_number(one[1])]
    if not finite:
        return Html("")
    plot = Plot(finite[0][0], finite[-1][0], min(one[1] for one in finite), max(one[1] for one in finite))
    shapes, best = plot.frame("trial"), -math.inf
    steps: list[str] = []
    for number, value, is_whole in finite:
        if is_whole and value > best:
            start = f"L{plot.x(number):.1f} {plot.y(best):.1f}" if steps else ""
            steps.append(f"{start}{'L' if steps else 'M'}{plot.x(number):.1f} {plot.y(value):.1f}")
            best = value
    if steps:
        steps.append(f"L{plot.x(finite[-1][0]):.1f} {plot.y(best):.1f}")
        shapes.append(element("path", d="".join(steps), class_="line"))
    for number, value, is_whole in finite:
        told = element("title", f"trial {number}: {value:.4f}{'' if is_whole else ', pruned'}")
        kind = "dot" if is_whole else "floor"
        shapes.append(element("circle", told, cx=px(plot.x(number)), cy=px(plot.y(value)), r="3.2", class_=kind))
    pruned = sum(not one[2] for one in finite)
    count = "1 trial" if len(finite) == 1 else f"{len(finite):,} trials"
    grey = f", {pruned:,} of them pruned (grey)" if pruned else ""
    return _chart(title, f"{count}{grey}{f'; best {best:.4f}, the line' if steps else ''}", HEIGHT, shapes)


def bars(shares: Mapping[str, float], title: str, told: str) -> Html:
    """Named shares of a whole, one below the other, the largest first."""
    rows = sorted(((name, one) for name, one in shares.items() if _is_number(one)), key=lambda row: (-row[1], row[0]))
    if not rows:
        return Html("")
    height = TOP + _ROW_PX * len(rows) + BOTTOM
    plot = Plot(0, max(*(share for _, share in rows), 1e-9), 0, 1, _NAME_PX, height)
    shapes = plot.columns("share")
    for number, (name, share) in enumerate(rows):
        y = TOP + _ROW_PX * number
        shapes.append(element("text", _shortened(name), x=_NAME_PX - 8, y=px(y + _ROW_PX / 2 + 4), class_="end name"))
        width = max(plot.x(share) - plot.x(0), 0.5)
        told_of_one = element("title", f"{name}: {share:.3f}")
        shapes.append(
            element("rect", told_of_one, x=px(plot.x(0)), y=px(y + 4), width=px(width), height="18", class_="bar")
        )
    return _chart(title, told, height, shapes)


def heat(rows: Sequence[Sequence[float]], title: str) -> Html:
    """A square per value of a matrix [N, M], darker where it is higher: predictions below each other, references beside
    each other. A picture of as many pixels: thousands of shapes would be megabytes.
    """
    values = np.array(rows, dtype=np.float64)
    finite = values[np.isfinite(values)]
    if not finite.size:
        return Html("")
    low, high = float(finite.min()), float(finite.max())
    alpha = np.nan_to_num(0.04 + 0.96 * (values - low) / (high - low or 1), posinf=0, neginf=0)
    pixels = np.empty((*values.shape, 4), dtype=np.uint8)
    pixels[..., :3], pixels[..., 3] = _HEAT, (255 * alpha).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    address = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    told = f"rows are predictions, columns the true prompts; from {low:.3f} to {high:.3f}, stronger is higher"
    drawing = element("img", src=address, alt=f"{clipped(title, 120)}: {told}", class_="heat")
    return _figure(title, told, drawing)


def reliability(points: Sequence[tuple[float, float, int]], title: str, told: str) -> Html:
    """What was expected against what was found, (expected, found, images), with the diagonal where they are equal."""
    finite = [point for point in points if _is_number(point[0]) and _is_number(point[1]) and point[2] > 0]
    if not finite:
        return Html("")
    both = [value for expected, found, _ in finite for value in (expected, found)]
    plot = Plot(min(both), max(both), min(both), max(both))
    # The plot reaches further from top to bottom than from side to side.
    low, high = max(plot.low, plot.left), min(plot.high, plot.right)
    shapes = plot.frame("expected cosine")
    diagonal = {"x1": plot.x(low), "y1": plot.y(low), "x2": plot.x(high), "y2": plot.y(high)}
    shapes.append(element("line", class_="mean", **{key: px(value) for key, value in diagonal.items()}))
    most = max(images for _, _, images in finite)
    for expected, found, images in finite:
        name = element("title", f"expected {expected:.3f}, found {found:.3f}, {images:,} images")
        radius = px(2.5 + 5 * math.sqrt(images / most))
        shapes.append(element("circle", name, cx=px(plot.x(expected)), cy=px(plot.y(found)), r=radius, class_="dot"))
    return _chart(title, told, HEIGHT, shapes)


def _chart(title: str, told: str, height: float, shapes: Sequence[Html]) -> Html:
    name = f"{clipped(title, 120)}: {told}"
    box = f"0 0 {WIDTH} {height:.0f}"
    return _figure(title, told, element("svg", *shapes, viewBox=box, role="img", aria_label=name))


def _figure(title: str, told: str, drawing: Html) -> Html:
    return element("figure", element("figcaption", element("strong", clipped(title, 120)), " ", told), drawing)


def _shortened(name: str) -> str:
    half = _NAME_CHARACTERS // 2
    return name if len(name) <= _NAME_CHARACTERS else f"{name[: half - 1]}…{name[-half:]}"


def _bar(plot: Plot, left: float, right: float, value: float, told: Html) -> Html:
    x, y = plot.x(left), plot.y(value)
    width, height = max(plot.x(right) - x - 1, 0.5), plot.y(0) - y
    return element("rect", told, x=px(x), y=px(y), width=px(width), height=px(height), class_="bar")


def _mean(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Of those that have a y, if any has."""
    known = [point for point in points if _is_number(point[1])] or points
    return sum(x for x, _ in known) / len(known), sum(y for _, y in known) / len(known)


def _is_number(value: float) -> bool:
    """One that differences and powers of ten can be taken of."""
    return abs(value) < 1e100


def _percentile(counts: Mapping[int, int], share: float) -> int:
    left = share * sum(counts.values())
    for number in sorted(counts):
        left -= counts[number]
        if left <= 0:
            return number
    return max(counts)
