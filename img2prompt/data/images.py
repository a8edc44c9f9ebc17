"""Encoded bytes become RGB pixels, JPEGs by a faster way than the other kinds; see `decoding` for these."""

import io

import numpy as np
import simplejpeg
import torch
from jaxtyping import UInt8
from PIL import ExifTags, Image
from torch import Tensor

from img2prompt.data.decoding import LARGE_PIXELS, MAX_BYTES, decode_with_pillow


def decode(data: bytes) -> UInt8[Tensor, "3 H W"]:
    """The image in `data` as 8-bit RGB at its native size; ImageError when there is none. Several threads may decode
    at once.
    """
    if data.startswith(b"\xff\xd8") and len(data) <= MAX_BYTES:
        pixels = _decode_jpeg(data)
        if pixels is not None:
            return torch.from_numpy(pixels).permute(2, 0, 1)
    return decode_with_pillow(data)


def as_picture(image: UInt8[Tensor, "3 H W"]) -> Image.Image:
    """The RGB image as other libraries take it."""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def small_jpeg(image: UInt8[Tensor, "3 H W"], side_px: int) -> bytes:
    """A JPEG of the image for people, no side of it longer than `side_px`."""
    small = as_picture(image)
    small.thumbnail((side_px, side_px), reducing_gap=3.0)
    file = io.BytesIO()
    small.save(file, "JPEG", quality=82, optimize=True)
    return file.getvalue()


def _decode_jpeg(data: bytes) -> np.ndarray | None:
    """The pixels [H, W, 3] that Pillow would give, a third faster; None where Pillow is to decide."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours in ("CMYK", "YCCK") or height * width > LARGE_PIXELS or _is_rotated(data):
            return None
        return simplejpeg.decode_jpeg(data, "RGB")
    except ValueError:
        # Damaged in some way; Pillow reads more of these, and says of the others what is wrong.
        return None


def _is_rotated(data: bytes) -> bool:
    if b"Exif\0\0" not in data and b"tiff:Orientation" not in data:
        return False
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            # In EXIF or in XMP, as `exif_transpose` looks for it.
            return image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    except Exception:
        return True
