"""A contact sheet: samples of what was made, each with its prompt, to be looked at before anybody trains on it."""

import io
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

from img2prompt.files import replacing

_COLUMNS = 6
_MOST = 24
_SIDE_PX = 192
_TEXT_PX = 44
_LINE_PX = 16
_GAP_PX = 12  # between references and what was made of them


def samples_of(folder: Path, image_format: str) -> list[tuple[Image.Image, str]]:
    """Up to 24 pictures with their prompts, spread evenly over the shards of `folder`."""
    tars = sorted(path.with_suffix(".tar") for path in folder.glob("*.jsonl") if path.stem.isdecimal())
    each = Counter(tars[number * len(tars) // _MOST] for number in range(_MOST)) if tars else {}
    return [one for tar, count in sorted(each.items()) for one in _of(tar, image_format, count)]


def contact_sheet(samples: Sequence[tuple[Image.Image, str]], path: Path) -> None:
    """Writes a JPEG with the pictures in rows of six, each above the beginning of its prompt."""
    rows = -(-len(samples) // _COLUMNS)
    columns = min(_COLUMNS, len(samples))
    sheet = Image.new("RGB", (columns * _SIDE_PX, rows * (_SIDE_PX + _TEXT_PX)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    for number, (image, prompt) in enumerate(samples):
        left, top = number % _COLUMNS * _SIDE_PX, number // _COLUMNS * (_SIDE_PX + _TEXT_PX)
        small = image.convert("RGB").resize((_SIDE_PX - 4, _SIDE_PX - 4), Image.Resampling.LANCZOS)
        sheet.paste(small, (left + 2, top + 2))
        lines = _wrapped(prompt, font, _SIDE_PX - 6, 3)
        pen.multiline_text((left + 3, top + _SIDE_PX), "\n".join(lines), "black", font, spacing=2)
    with replacing(path) as temporary:
        sheet.save(temporary, "JPEG", quality=90)


def comparison_sheet(rows: Sequence[tuple[Sequence[Image.Image], Sequence[Image.Image], str]], path: Path) -> None:
    """Writes a JPEG with a row of each reference, or of several that were blended, on the left; what was made of it on
    the right; and a text above them.
    """
    left = max(len(references) for references, _, _ in rows)
    columns = left + max(len(made) for _, made, _ in rows)
    height = _SIDE_PX + _LINE_PX
    sheet = Image.new("RGB", (columns * _SIDE_PX + _GAP_PX, len(rows) * height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    for row, (references, made, text) in enumerate(rows):
        top = row * height
        pen.text((3, top + 2), _wrapped(text, font, columns * _SIDE_PX, 1)[0], "black", font)
        places = [*(number * _SIDE_PX for number in range(len(references)))]
        places += [(left + number) * _SIDE_PX + _GAP_PX for number in range(len(made))]
        for place, image in zip(places, [*references, *made], strict=True):
            fitted = ImageOps.contain(image.convert("RGB"), (_SIDE_PX - 4, _SIDE_PX - 4), Image.Resampling.LANCZOS)
            sheet.paste(fitted, (place + 2, top + _LINE_PX))
    with replacing(path) as temporary:
        sheet.save(temporary, "JPEG", quality=90)


def _of(tar: Path, image_format: str, count: int) -> list[tuple[Image.Image, str]]:
    with tarfile.open(tar) as archive:
        keys = [name.partition(".")[0] for name in archive.getnames() if name.endswith(f".{image_format}")]
        found: list[tuple[Image.Image, str]] = []
        for key in _evenly(keys, count):
            try:
                image = Image.open(io.BytesIO(_read(archive, f"{key}.{image_format}")))
                image.load()
            except OSError as error:
                raise ValueError(f"{tar}: {key} is damaged ({error}); remove the tar, and it is made again") from None
            found.append((image, _read(archive, f"{key}.txt").decode()))
        return found


def _evenly(items: Sequence[Any], most: int) -> list[Any]:
    count = min(most, len(items))
    return [items[number * len(items) // count] for number in range(count)]


def _read(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    assert file is not None
    return file.read()


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width_px: int, most: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if not lines[-1] or font.getlength(longer) <= width_px:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines if len(lines) <= most else [*lines[: most - 1], f"{lines[most - 1]} …"]
