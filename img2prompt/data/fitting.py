"""RGB pixels become the square that an encoder wants. Images are tensors whose channels lie together in memory."""

import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.nn import functional

from img2prompt.data.decoding import MAX_PIXELS, ImageError


def fit(
    image: UInt8[Tensor, "3 H W"], image_size_px: int, interpolation: str, resize_mode: str
) -> UInt8[Tensor, "3 S S"]:
    """The RGB image as a square, antialiased as Pillow does it; `resize_mode` is one of an encoder's RESIZE_MODES."""
    height, width = image.shape[1:]
    side = image_size_px
    if resize_mode == "squash":
        return _resized(image, side, side, interpolation)
    if resize_mode == "shortest":
        scale = side / min(height, width)
        # As the published transforms do it: the whole image is resized, and its middle is cut out. Where the middle
        # lies between two pixels transformers takes the first, and so do we; torchvision takes the even one.
        high, wide = (max(side, int(length * scale)) for length in (height, width))
        if high * wide > MAX_PIXELS:
            raise ImageError(f"{width} x {height} pixels, too long and thin to cut a square out of")
        top, left = (high - side) // 2, (wide - side) // 2
        return _resized(image, high, wide, interpolation)[:, top : top + side, left : left + side]
    high, wide = (max(1, round(length * side / max(height, width))) for length in (height, width))
    square = torch.full((side, side, 3), 255, dtype=torch.uint8).permute(2, 0, 1)
    top, left = (side - high) // 2, (side - wide) // 2
    square[:, top : top + high, left : left + wide] = _resized(image, high, wide, interpolation)
    return square


def _resized(image: Tensor, height: int, width: int, interpolation: str) -> Tensor:
    if image.shape[1:] == (height, width):
        return image
    sizes = [(height, width)]
    # Pillow resizes columns first where most rows go; torch always rows first. The middle values are rounded.
    if image.shape[1] - height > max(0, 2 * (image.shape[2] - width)):
        sizes.insert(0, (height, image.shape[2]))
    batch = image[None]
    for size in sizes:
        batch = functional.interpolate(batch, size, mode=interpolation, antialias=True)
    return batch[0]
