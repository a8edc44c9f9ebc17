"""Encoded bytes become RGB pixels, by Pillow alone.

Every kind of file has one outcome: transparency is composited on white, 16-bit and float grey is scaled to 8 bits,
EXIF rotation is applied, of an animation the first frame counts, and what is too large or no image is refused with
an `ImageError` that says why.
"""

import io
import threading
import warnings
from contextlib import nullcontext
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

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


def decode_with_pillow(data: bytes) -> UInt8[Tensor, "3 H W"]:
    """The image in `data` as 8-bit RGB at its native size; ImageError when there is none.

    Several threads may decode at once; images above LARGE_PIXELS wait for one another, or they would fill the memory.
    """
    if not data:
        raise ImageError("empty file")
    if len(data) > MAX_BYTES:
        raise ImageError(f"file of {len(data) / 1e6:.0f} MB, more than {MAX_BYTES / 1e6:.0f} MB")
    return torch.from_numpy(_pixels(data)).permute(2, 0, 1)


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    # Pillow before 11.3 knows no AVIF, and fails at a name that it does not know.
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _pixels(data: bytes) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(data), formats=_formats()) as image:
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
        raise ImageError(f"not an image of a known format ({', '.join(_formats())})") from None
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
