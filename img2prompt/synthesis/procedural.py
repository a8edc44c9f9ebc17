"""Draws the demo's prompts: a scene language picture maker that needs no model, only numpy and Pillow.

First step of an item's way: prompt and seed come in, pixels go out to be stored and encoded. The prompt is
parsed into a scene; a backdrop is painted, things are laid on it in the scene's style, back to front.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from img2prompt.synthesis.backdrops import backdrop, texture
from img2prompt.synthesis.colours import shade
from img2prompt.synthesis.scenes import Scene, Thing, parse
from img2prompt.synthesis.shapes import SHAPES, Polygon
from img2prompt.synthesis.styles import STYLES_DRAWN, Masks

_RADIUS = {"tiny": 0.165, "": 0.25, "huge": 0.355}

# Two things share the picture, so each is drawn a little smaller.
_SHARED = 0.82

_POSITION = {
    "": (0.5, 0.5),
    "left": (0.27, 0.5),
    "right": (0.73, 0.5),
    "top": (0.5, 0.27),
    "bottom": (0.5, 0.73),
}

_RELATION = {
    "": ((0.29, 0.70), (0.71, 0.30)),
    "above": ((0.5, 0.26), (0.5, 0.74)),
    "left": ((0.26, 0.5), (0.74, 0.5)),
    "front": ((0.41, 0.60), (0.64, 0.40)),
}


def _rng(*parts: object) -> np.random.Generator:
    text = "\0".join(map(str, parts)).encode("utf-8", "surrogatepass")
    return np.random.default_rng(int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little"))


def _placed(polygon: Polygon, frame: tuple[np.ndarray, ...], size_px: float) -> list[tuple[float, float]]:
    turn, stretch, centre, phases, wobble = frame
    # The same slow waves for every polygon of a thing, so that details stay on the body they belong to.
    waves = np.sin(3.5 * polygon[:, ::-1] + phases[:2]) + 0.6 * np.sin(7.0 * polygon[:, ::-1] + phases[2:])
    points = ((polygon + wobble * waves) * stretch) @ turn + centre
    return list(map(tuple, (points * size_px).tolist()))


def _masks(thing: Thing, centre: tuple[float, float], scale: float, edge: float, size_px: int,
           rng: np.random.Generator) -> Masks:  # fmt: skip
    radius = scale * _RADIUS[thing.size] * rng.uniform(0.92, 1.08)
    angle = rng.uniform(-0.16, 0.16)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    middle = np.clip(np.array(centre) + rng.uniform(-0.035, 0.035, 2), 1.02 * radius, 1 - 1.02 * radius)
    frame = (turn, radius * rng.uniform(0.93, 1.07, 2), middle, rng.uniform(0, 6.3, 4), np.array(0.025))
    # Drawn larger and averaged down, which is what makes the borders smooth.
    finer = 4 if size_px <= 96 else 2
    sheet = Image.new("RGB", (size_px * finer, size_px * finer))
    pen = ImageDraw.Draw(sheet)
    width = max(round(edge * size_px * finer), 1)
    shape = SHAPES[thing.kind]
    body = [_placed(polygon, frame, size_px * finer) for polygon in shape.body]
    detail = [_placed(polygon, frame, size_px * finer) for polygon in shape.detail]
    # Borders first and fills over them: only the silhouette keeps its line where pieces overlap.
    for points in body + detail:
        pen.line(points + points[:2], (0, 0, 255), 2 * width, joint="curve")
    for points in body:
        pen.polygon(points, (255, 0, 0))
    for points in detail:
        pen.polygon(points, (255, 255, 0))
    planes = np.asarray(sheet.reduce(finer), np.float32) / 255
    return Masks(planes[..., 0], planes[..., 1], planes[..., 2])


def _layout(scene: Scene) -> list[tuple[Thing, tuple[float, float], float]]:
    # Back to front: the first thing named is the one in front.
    if len(scene.things) == 2:
        couples = zip(scene.things, _RELATION[scene.where], strict=True)
        return [(thing, centre, _SHARED) for thing, centre in couples][::-1]
    return [(thing, _POSITION[scene.where], 1.0) for thing in scene.things]


def draw(scene: Scene, dice: str, size_px: int) -> np.ndarray:
    """The scene as uint8 [S, S, 3]; every chance in it hangs on the text `dice` and the leftover words."""
    style = STYLES_DRAWN[scene.style]
    canvas = backdrop(scene.background, size_px, _rng(dice, "backdrop"))
    if scene.leftover:
        strength = 0.3 if scene.things or scene.background else 1.0
        canvas = canvas + strength * (texture(size_px, _rng(dice, "texture", *scene.leftover)) - canvas)
    canvas = style.ground(canvas, _rng(dice, "ground"))
    for number, (thing, centre, scale) in enumerate(_layout(scene)):
        rng = _rng(dice, "thing", number)
        colour = shade(thing.colour, rng)
        canvas = style.lay(canvas, _masks(thing, centre, scale, style.edge, size_px, rng), colour, rng)
    canvas = style.finish(canvas, _rng(dice, "finish"))
    return (np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8)


class Procedural:
    """A `Generator` that draws what the words say, with chance in everything that they leave open."""

    def __init__(self, image_size_px: int = 64) -> None:
        if image_size_px < 8:
            raise ValueError(f"image_size_px must be at least 8, not {image_size_px}")
        self.image_size_px = image_size_px

    @property
    def settings(self) -> dict[str, Any]:
        return {"model": "procedural", "image_size_px": self.image_size_px}

    @property
    def size_px(self) -> tuple[int, int]:
        return self.image_size_px, self.image_size_px

    @property
    def saved_px(self) -> None:
        return None

    @property
    def download(self) -> None:
        return None

    def check(self) -> None:
        pass

    def load(self) -> None:
        pass

    def details(self, seed: int) -> dict[str, Any]:
        return {}

    def generate(self, prompts: Sequence[str], seeds: Sequence[int], precise: bool = False) -> np.ndarray:
        """Pictures uint8 [B, S, S, 3], one for each (prompt, seed) couple, drawn independently."""
        pictures = np.empty((len(prompts), self.image_size_px, self.image_size_px, 3), np.uint8)
        for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            pictures[index] = draw(parse(prompt), f"{seed}\0{prompt}", self.image_size_px)
        return pictures
