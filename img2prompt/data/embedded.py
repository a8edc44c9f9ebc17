"""The text that generators leave in an image file, by the name of its field: PNG chunks, EXIF, and stealth pixels.

Pixels are decoded only where nothing else was found: text may hide in their lowest bits. A damaged field is an error
and not a shorter text: a wrong label is worse than none.
"""

import io
import json
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

from img2prompt.data.decoding import FORMATS, MAX_PIXELS

MAX_TEXT_BYTES = 8 * 1024**2  # ComfyUI's graphs are long; what is longer is no prompt
_PNG = b"\x89PNG\r\n\x1a\n"
_EXIF_IFD, _USER_COMMENT = 0x8769, 0x9286
_STEALTH = (b"stealth_pnginfo", b"stealth_pngcomp", b"stealth_rgbinfo", b"stealth_rgbcomp")


class MetadataError(ValueError):
    """Text in an image that cannot be read as its prompt; the message is the reason, without the path."""


def embedded_text(data: bytes) -> dict[str, str]:
    """The text fields of an encoded image, by name; none for bytes that are no image. MetadataError when damaged."""
    fields = _png_text(data) if data.startswith(_PNG) else _exif_text(data)
    return fields or _stealth_text(data)


def _png_text(data: bytes) -> dict[str, str]:
    fields: dict[str, str] = {}
    place, total = len(_PNG), 0
    # Text may stand after the pixels as well, so every chunk is visited; pixels are stepped over.
    while place + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        if kind == b"IEND":
            break
        if kind != b"IDAT":
            body, checksum = data[place + 8 : place + 8 + length], data[place + 8 + length : place + 12 + length]
            if len(checksum) < 4 or zlib.crc32(kind + body) != int.from_bytes(checksum, "big"):
                raise MetadataError("damaged PNG chunk")
        if kind in (b"tEXt", b"zTXt", b"iTXt", b"eXIf"):
            found = _png_exif(body) if kind == b"eXIf" else _png_field(kind, body)
            for name, text in found.items():
                total += len(text)
                if total > MAX_TEXT_BYTES:
                    raise MetadataError(f"texts of more than {MAX_TEXT_BYTES >> 20} MiB together")
                if fields.setdefault(name, text) != text:
                    raise MetadataError(f"two different texts called {name}")
        place += 12 + length
    return fields


def _png_exif(body: bytes) -> dict[str, str]:
    exif = Image.Exif()
    try:
        exif.load(body)
    except Exception:
        raise MetadataError("damaged EXIF") from None
    return _exif_fields(exif)


def _png_field(kind: bytes, body: bytes) -> dict[str, str]:
    name, _, rest = body.partition(b"\0")
    compressed = kind == b"zTXt"
    if compressed:
        rest = rest[1:]
    elif kind == b"iTXt":
        compressed = rest[:1] == b"\1"
        # Language and translated keyword stand before the text.
        rest = rest[2:].partition(b"\0")[2].partition(b"\0")[2]
    return {name.decode("latin-1"): _decoded(_inflated(rest) if compressed else rest)}


def _inflated(data: bytes, gzipped: bool = False) -> bytes:
    stream = zlib.decompressobj(wbits=31 if gzipped else 15)
    try:
        text = stream.decompress(data, MAX_TEXT_BYTES)
    except zlib.error:
        raise MetadataError("damaged compressed text") from None
    if not stream.eof:
        raise MetadataError(f"compressed text that is cut off or of more than {MAX_TEXT_BYTES >> 20} MiB")
    return text


def _decoded(data: bytes) -> str:
    if len(data) > MAX_TEXT_BYTES:
        raise MetadataError(f"text of more than {MAX_TEXT_BYTES >> 20} MiB")
    try:
        # Chunks are Latin-1 by the standard, and UTF-8 as many tools write them; it is rarely both.
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def _exif_text(data: bytes) -> dict[str, str]:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            exif = image.getexif()
    except Exception:
        # No image, or one that the decoder will name as damaged: either way it says nothing about a prompt.
        return {}
    return _exif_fields(exif)


def _exif_fields(exif: Image.Exif) -> dict[str, str]:
    try:
        comment = exif.get_ifd(_EXIF_IFD).get(_USER_COMMENT)
        values = [value for value in exif.values() if isinstance(value, str)]
    except Exception:
        raise MetadataError("damaged EXIF") from None
    fields = {} if not isinstance(comment, bytes | str) else {"UserComment": _user_comment(comment)}
    for value in values:
        # ComfyUI writes "prompt:{…}" and "workflow:{…}" into tags that it has no other use for.
        name, _, text = value.partition(":")
        if name in ("prompt", "workflow") and text.lstrip().startswith("{"):
            fields[name] = text.rstrip("\0")
    return {name: text for name, text in fields.items() if text.strip("\0 ")}


def _user_comment(value: bytes | str) -> str:
    if isinstance(value, str):
        return value.strip("\0")
    code, text = value[:8], value[8:]
    if code == b"UNICODE\0":
        # UTF-16, mostly big-endian whatever the file's own byte order: the one that reads as more plain characters.
        readings = [text.decode(name, "replace") for name in ("utf-16-be", "utf-16-le")]
        return max(readings, key=lambda reading: sum(character.isascii() for character in reading)).strip("\0\ufeff")
    if code in (b"ASCII\0\0\0", b"\0" * 8):
        return _decoded(text).strip("\0")
    return _decoded(value).strip("\0")


def _stealth_text(data: bytes) -> dict[str, str]:
    """Text in the lowest bits of alpha (or of red, green, blue), column by column, as NovelAI hides it."""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "WEBP")) as image:
            if image.width * image.height > MAX_PIXELS or image.mode not in ("RGBA", "RGB"):
                return {}
            pixels = np.asarray(image)
    except Exception:
        return {}
    if pixels.shape[2] == 4 and (found := _hidden(pixels[..., 3:])):
        return found
    return _hidden(pixels[..., :3])


def _hidden(channels: np.ndarray) -> dict[str, str]:
    head = _packed(channels, 0, 19)
    if head[:15] not in _STEALTH:
        return {}
    # The length is given in bits.
    length = int.from_bytes(head[15:19], "big") // 8
    body = _packed(channels, 19, length) if length <= MAX_TEXT_BYTES else b""
    if len(body) < length or not length:
        raise MetadataError("damaged stealth text")
    text = _decoded(_inflated(body, gzipped=True) if head[:15].endswith(b"comp") else body)
    try:
        fields: Any = json.loads(text)
    except (ValueError, RecursionError):
        return {"parameters": text}
    return (
        {str(name): value for name, value in fields.items() if isinstance(value, str)}
        if isinstance(fields, dict)
        else {}
    )


def _packed(channels: np.ndarray, start: int, count: int) -> bytes:
    """Bytes start..start+count of the lowest bits, first down each column, then channel by channel."""
    height, width, depth = channels.shape
    columns = -(-(start + count) * 8 // (height * depth))
    bits = channels[:, :columns].transpose(1, 0, 2).reshape(-1) & 1
    return np.packbits(bits).tobytes()[start : start + count]
