"""How a scene is drawn: flat, pencil, watercolour, pixel art, neon sign or ink.

A style prepares the ground before the things are put on it, lays each thing on the canvas from its masks,
and finishes the whole picture. The canvas is float32 [S, S, 3] in 0..1; nothing here changes it in place.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from img2prompt.synthesis.backdrops import blend, grid, rgb

Rng = np.random.Generator


@dataclass(frozen=True)
class Masks:
    """How much of each pixel a thing covers, float32 [S, S] in 0..1: body with details, details, border."""

    body: np.ndarray
    detail: np.ndarray
    edge: np.ndarray


@dataclass(frozen=True)
class Style:
    """`edge` is the width of the drawn border as a share of the picture."""

    edge: float
    ground: Callable[[np.ndarray, Rng], np.ndarray]
    lay: Callable[[np.ndarray, Masks, np.ndarray, Rng], np.ndarray]
    finish: Callable[[np.ndarray, Rng], np.ndarray]


def _blur(mask: np.ndarray, radius: float) -> np.ndarray:
    picture = Image.fromarray((np.clip(mask, 0, 1) * 255).astype(np.uint8))
    blurred = picture.filter(ImageFilter.BoxBlur(radius * mask.shape[0]))
    return np.asarray(blurred, np.float32) / 255


def _cloud(size_px: int, cells: int, rng: Rng) -> np.ndarray:
    coarse = Image.fromarray(rng.random((cells, cells), np.float32))
    return np.clip(np.asarray(coarse.resize((size_px, size_px), Image.Resampling.BICUBIC)), 0, 1)


def _strokes(size_px: int, turn: float, count: float, rng: Rng) -> np.ndarray:
    x, y = grid(size_px)
    along = x * np.cos(turn) + y * np.sin(turn) + 0.012 * np.sin(9 * (x - y) + rng.uniform(0, 6))
    return 0.5 + 0.5 * np.sin(2 * np.pi * (count * along + rng.random()))


def _grey(canvas: np.ndarray) -> np.ndarray:
    return (canvas @ rgb(0.3, 0.59, 0.11))[..., None]


def _same(canvas: np.ndarray, rng: Rng) -> np.ndarray:
    return canvas


def _grain(canvas: np.ndarray, rng: Rng) -> np.ndarray:
    size_px = canvas.shape[0]
    return canvas + (0.035 * (rng.random((size_px, size_px), np.float32) - 0.5))[..., None]


def _flat_lay(canvas: np.ndarray, masks: Masks, colour: np.ndarray, rng: Rng) -> np.ndarray:
    canvas = blend(canvas, colour, masks.body)
    canvas = blend(canvas, 0.45 * colour, masks.detail)
    return blend(canvas, 0.3 * colour, masks.edge)


def _pencil_ground(canvas: np.ndarray, rng: Rng) -> np.ndarray:
    size_px = canvas.shape[0]
    faded = 0.55 * _grey(canvas) + 0.45 * canvas
    hatch = _strokes(size_px, rng.uniform(0.6, 0.9), 13, rng)
    return blend(faded * 0.65 + 0.35, rgb(0.98, 0.97, 0.94), 0.65 * hatch)


def _pencil_lay(canvas: np.ndarray, masks: Masks, colour: np.ndarray, rng: Rng) -> np.ndarray:
    hatch = _strokes(canvas.shape[0], rng.uniform(2.1, 2.6), 15, rng)
    canvas = blend(canvas, rgb(0.97, 0.96, 0.93), 0.85 * masks.body)
    canvas = blend(canvas, colour, masks.body * (0.25 + 0.75 * hatch))
    canvas = blend(canvas, 0.4 * colour, masks.detail * (0.5 + 0.4 * hatch))
    return blend(canvas, rgb(0.25, 0.25, 0.27), 0.85 * masks.edge)


def _watercolour_ground(canvas: np.ndarray, rng: Rng) -> np.ndarray:
    wash = _cloud(canvas.shape[0], 6, rng)
    return blend(canvas * 0.72 + 0.28, rgb(1, 0.99, 0.96), 0.45 * wash)


def _watercolour_lay(canvas: np.ndarray, masks: Masks, colour: np.ndarray, rng: Rng) -> np.ndarray:
    soft = _blur(masks.body, 0.03)
    stain = np.clip(1.6 * soft - 0.3 + 0.25 * (_cloud(canvas.shape[0], 9, rng) - 0.5), 0, 1)
    # Pigment gathers where the wet patch ends, so the rim is darker than the middle.
    rim = 4 * stain * (1 - stain)
    pigment = 0.62 + 0.38 * _cloud(canvas.shape[0], 7, rng)
    canvas = blend(canvas, rgb(1, 0.99, 0.96), 0.8 * stain)
    canvas = blend(canvas, colour, stain * pigment)
    return blend(canvas, 0.55 * colour, np.clip(0.45 * rim + 0.75 * _blur(masks.detail, 0.012), 0, 1))


def _watercolour_finish(canvas: np.ndarray, rng: Rng) -> np.ndarray:
    size_px = canvas.shape[0]
    x, y = grid(size_px)
    # The paint ends before the paper does.
    border = np.minimum(np.minimum(x, 1 - x), np.minimum(y, 1 - y)) + 0.06 * (_cloud(size_px, 8, rng) - 0.5)
    paper = np.clip((0.055 - border) * 30, 0, 1)
    return _grain(blend(canvas, rgb(0.99, 0.98, 0.95), paper), rng)


def _pixel_finish(canvas: np.ndarray, rng: Rng) -> np.ndarray:
    size_px = canvas.shape[0]
    cells = 24
    small = Image.fromarray((np.clip(canvas, 0, 1) * 255).astype(np.uint8))
    small = small.resize((cells, cells), Image.Resampling.BOX)
    levels = np.round(np.asarray(small, np.float32) / 255 * 6) / 6
    place = np.arange(size_px) * cells // size_px
    return levels[place][:, place]


def _neon_ground(canvas: np.ndarray, rng: Rng) -> np.ndarray:
    return 0.38 * canvas + rgb(0.01, 0.0, 0.04)


def _neon_lay(canvas: np.ndarray, masks: Masks, colour: np.ndarray, rng: Rng) -> np.ndarray:
    glow = np.clip(_blur(masks.edge, 0.05) * 1.3 + 0.8 * _blur(masks.edge, 0.02), 0, 1)
    canvas = blend(canvas, 0.18 * colour, 0.85 * masks.body)
    canvas = canvas + glow[..., None] * colour * 0.9
    tube = np.clip(masks.edge + 0.8 * masks.detail, 0, 1)
    return blend(canvas, 0.8 * colour + 0.2 * colour.max(), tube)


def _ink_ground(canvas: np.ndarray, rng: Rng) -> np.ndarray:
    # Steps instead of ramps and much white: a print with few, pale colours.
    return 0.5 + 0.5 * np.floor(canvas * 4.99) / 4


def _ink_lay(canvas: np.ndarray, masks: Masks, colour: np.ndarray, rng: Rng) -> np.ndarray:
    canvas = blend(canvas, rgb(1, 1, 1), masks.body)
    inner = np.clip(1.7 * _blur(masks.body, 0.02) - 0.75, 0, 1) * masks.body
    canvas = blend(canvas, colour, 0.85 * inner)
    return blend(canvas, rgb(0.03, 0.03, 0.05), np.clip(masks.edge + masks.detail, 0, 1))


STYLES_DRAWN = {
    "": Style(0.014, _same, _flat_lay, _grain),
    "pencil": Style(0.022, _pencil_ground, _pencil_lay, _grain),
    "watercolour": Style(0.012, _watercolour_ground, _watercolour_lay, _watercolour_finish),
    "pixel": Style(0.012, _same, _flat_lay, _pixel_finish),
    "neon": Style(0.03, _neon_ground, _neon_lay, _same),
    "ink": Style(0.04, _ink_ground, _ink_lay, _same),
}
