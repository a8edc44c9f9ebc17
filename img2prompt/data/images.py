"""Encoded bytes become RGB pixels, and RGB pixels become the square that an encoder wants.

Every kind of file has one outcome: transparency is composited on white, 16-bit and float grey is scaled to 8 bits,
EXIF rotation is applied, of an animation the first frame counts, and what is too large or no image is refused with
an `ImageError` that says why. Images are tensors whose channels lie together in memory.
"""

import io
import threading
import warnings
from contextlib import nullcontext

import numpy as np
import simplejpeg
import torch
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional

# Pillow opens by content, whatever the name; without this list an EPS named .png would start Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
# Above this Pillow warns of a decompression bomb, and at twice as many it refuses; we refuse from here on.
MAX_PIXELS = 89_478_485
MAX_BYTES = 512 * 1024**2
LARGE_PIXELS = 16_000_000

_WHITE = (255, 255, 255)
_one_large = threading.Semaphore(1)

warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


class ImageError(ValueError):
    """A file that cannot be used as an image; the message is the reason, without the path."""


def decode(data: bytes) -> UInt8[Tensor, "3 H W"]:
    """The image in `data` as 8-bit RGB at its native size; ImageError when there is none.

    Several threads may decode at once; images above LARGE_PIXELS wait for one another, or they would fill the memory.
    """
    if not data:
        raise ImageError("empty file")
    if len(data) > MAX_BYTES:
        raise ImageError(f"file of {len(data) / 1e6:.0f} MB, more than {MAX_BYTES / 1e6:.0f} MB")
    pixels = _decode_jpeg(data) if data.startswith(b"\xff\xd8") else None
    if pixels is None:
        pixels = _decode_with_pillow(data)
    return torch.from_numpy(pixels).permute(2, 0, 1)


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


def _decode_with_pillow(data: bytes) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ImageError(f"{width} x {height} pixels, more than {MAX_PIXELS / 1e6:.0f} megapixels")
            with _one_large if width * height > LARGE_PIXELS else nullcontext():
                image.load()
                try:
                    ImageOps.exif_transpose(image, in_place=True)
                except Exception:
                    # Unreadable EXIF of a sound image: it stays as it lies.
                    pass
                return np.array(_to_rgb(image))
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(f"not an image of a known format ({', '.join(FORMATS)})") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageError(f"more than {MAX_PIXELS / 1e6:.0f} megapixels") from None
    except MemoryError:
        raise ImageError("needs more memory than there is") from None
    except Exception as error:
        # Pillow's readers raise nearly anything on a damaged file: OSError, SyntaxError, struct.error, IndexError …
        raise ImageError(f"damaged: {error or type(error).__name__}") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _scaled_grey(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        # A plain convert("RGB") would show whatever colour lies under the transparent pixels.
        layer = image if image.mode == "RGBA" else image.convert("RGBA")
        white = Image.new("RGB", layer.size, _WHITE)
        white.paste(layer, mask=layer.getchannel("A"))
        return white
    return image.convert("RGB")


def _scaled_grey(image: Image.Image) -> Image.Image:
    # convert("RGB") would clip 16-bit values at 255. Float images are in 0..1, or else scaled by their maximum.
    values = np.nan_to_num(np.asarray(image, dtype=np.float32), posinf=0, neginf=0)
    largest = values.max(initial=0)
    if image.mode == "F":
        full = 1.0 if largest <= 1 else largest
    else:
        full = 65535.0 if largest <= 65535 else float(2**31 - 1)
    grey = np.rint(np.clip(values / np.float32(full), 0, 1) * 255).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")
