"""Named colours as RGB, each with room to vary and still be called by its name.

Drawing asks here for the colour of a thing, of a gradient and of a texture.
"""

import colorsys

import numpy as np

_HSV = {
    "": (0.0, 0.0, 0.62),
    "red": (0.995, 0.88, 0.88),
    "orange": (0.075, 0.95, 0.99),
    "yellow": (0.145, 0.88, 0.98),
    "green": (0.36, 0.80, 0.64),
    "blue": (0.605, 0.82, 0.88),
    "purple": (0.77, 0.70, 0.66),
    "pink": (0.925, 0.42, 0.99),
    "brown": (0.065, 0.68, 0.45),
}


def shade(name: str, rng: np.random.Generator) -> np.ndarray:
    """One shade of a named colour, float32 [3] in 0..1; the empty name is a grey."""
    hue, saturation, value = _HSV[name]
    dh, ds, dv = rng.uniform(-1, 1, 3)
    hue = (hue + 0.014 * dh) % 1.0
    saturation = min(max(saturation * (1 + 0.08 * ds), 0.0), 1.0)
    return np.array(colorsys.hsv_to_rgb(hue, saturation, min(value * (1 + 0.05 * dv), 1.0)), np.float32)
