"""What happens to pictures on their way through the world: recompressed, scaled, cut, marked."""

import io
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps
from torch import Tensor

from img2prompt.data.decoding import ImageError

_BLUR_SHARE = 1 / 200  # its radius, of the shorter side
_CROP_SHARE = 0.75
_MARK = "SAMPLE"


def _jpeg(quality: int) -> Callable[[Image.Image], Image.Image]:
    def again(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        return Image.open(file).convert("RGB")

    return again


def _half(image: Image.Image) -> Image.Image:
    return image.resize((max(1, image.width // 2), max(1, image.height // 2)), Image.Resampling.BICUBIC)


def _middle(image: Image.Image) -> Image.Image:
    wide, high = (max(1, round(_CROP_SHARE * side)) for side in image.size)
    left, top = (image.width - wide) // 2, (image.height - high) // 2
    return image.crop((left, top, left + wide, top + high))


def _blurred(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(max(1.0, min(image.size) * _BLUR_SHARE)))


def _marked(image: Image.Image) -> Image.Image:
    """A word across the middle, half transparent."""
    font = ImageFont.load_default(max(6, image.width // len(_MARK)))
    over = Image.new("RGBA", image.size)
    centre = (image.width / 2, image.height / 2)
    ImageDraw.Draw(over).text(centre, _MARK, (255, 255, 255, 128), font, anchor="mm")
    return Image.alpha_composite(image.convert("RGBA"), over).convert("RGB")


def _grey(image: Image.Image) -> Image.Image:
    return image.convert("L").convert("RGB")


_CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "jpeg 95": _jpeg(95),
    "jpeg 75": _jpeg(75),
    "jpeg 50": _jpeg(50),
    "half size": _half,
    "middle": _middle,
    "flip": ImageOps.mirror,
    "blur": _blurred,
    "watermark": _marked,
    "grey": _grey,
}
CORRUPTIONS = tuple(_CHANGES)


def corrupted(image: UInt8[Tensor, "3 H W"], name: str) -> UInt8[Tensor, "3 _ _"]:
    """An RGB image after one of `CORRUPTIONS`."""
    try:
        changed = _CHANGES[name](Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()))
    except Image.DecompressionBombError as error:
        # Of an extreme shape, on which a mark would be larger than any image.
        raise ImageError(f"{name}: {error}") from None
    return torch.from_numpy(np.array(changed)).permute(2, 0, 1)
