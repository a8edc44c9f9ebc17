"""Which image files an argument names: a file, a folder, a glob, a list of these, a list file, or standard input."""

import glob
import os
import stat
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from img2prompt.data.decoding import EXTENSIONS, MAX_BYTES, ImageError
from img2prompt.data.fitting import fit
from img2prompt.data.images import decode


@dataclass(frozen=True, slots=True)
class ImageFile:
    """A file to read, and the id that its results carry."""

    id: str
    path: Path


@dataclass
class Listing:
    files: list[ImageFile]
    skipped: list[tuple[str, str]]  # (path, reason)


def list_images(images: str | Path | Sequence[str | Path]) -> Listing:
    """Finds the image files that `images` names, sorted by path within each folder.

    A folder is searched with all its subfolders, by the extensions in `EXTENSIONS`; links to folders are followed
    once. A `.txt` file holds one path a line, relative to the working folder or to the list; "-" reads such lines from
    standard input. An id is the file's name without its ending, or its path where that would not be unique.
    ValueError when nothing of that name exists.
    """
    found: list[Path] = []
    skipped: list[tuple[str, str]] = []
    single = isinstance(images, str | Path)
    names = [str(images)] if isinstance(images, str | Path) else [str(one) for one in images]
    for text in names:
        if text == "-":
            # File names need not be UTF-8.
            lines = sys.stdin.buffer.read().decode("utf-8", "surrogateescape").split("\n")
            _add_lines(lines, Path(), found, skipped)
        elif os.path.isdir(text):
            _add_folder(Path(text), found, skipped)
        elif os.path.lexists(text):
            if text.lower().endswith(".txt"):
                with open(text, encoding="utf-8-sig", errors="surrogateescape") as lines:
                    _add_lines(lines, Path(text).parent, found, skipped)
            else:
                found.append(Path(text))
        elif glob.has_magic(text):
            matches = sorted(glob.glob(os.path.expanduser(text), recursive=True))
            if not matches:
                raise ValueError(f"images={text}: the pattern matches no file")
            for match in matches:
                if os.path.isdir(match):
                    _add_folder(Path(match), found, skipped)
                else:
                    found.append(Path(match))
        elif single:
            raise ValueError(f"images={text}: no such file or folder")
        else:
            skipped.append((text, "no such file"))
    # A file that is named twice is read once.
    paths = list(dict.fromkeys(found))
    files = [ImageFile(one, path) for one, path in zip(unique_ids(paths), paths, strict=True)]
    return Listing(files, skipped)


def readable(
    images: str | Path | Sequence[str | Path], square_px: int = 512
) -> tuple[list[ImageFile], list[tuple[str, str]]]:
    """The images that can be decoded and cut to squares of a side up to `square_px`, and the others as (path, reason);
    ValueError when none can be.
    """
    listing = list_images(images)
    files, skipped = [], list(listing.skipped)
    for file in listing.files:
        try:
            fit(decode(read_bytes(file.path)), square_px, "bilinear", "shortest")
            files.append(file)
        except ImageError as error:
            skipped.append((printable(file.path), str(error)))
    if not files:
        told = f" among {len(skipped)} files (first: {skipped[0][0]}: {skipped[0][1]})" if skipped else ""
        raise ValueError(f"images={images}: no readable image{told}; endings: {', '.join(EXTENSIONS)}")
    return files, skipped


def read_bytes(path: Path) -> bytes:
    """The bytes of a regular file; ImageError for pipes, devices, folders, what is gone and what is too large."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            # Opening a named pipe would wait forever.
            raise ImageError("not a regular file")
        if status.st_size > MAX_BYTES:
            raise ImageError(f"file of {status.st_size / 1e6:.0f} MB, more than {MAX_BYTES / 1e6:.0f} MB")
        return path.read_bytes()
    except OSError as error:
        raise ImageError(error.strerror or type(error).__name__) from None


def file_stamp(path: Path) -> str:
    """The file's path, size and time of change: another one when its bytes may be others."""
    try:
        status = os.stat(path)
    except OSError:
        return f"{os.path.abspath(path)} gone"
    return f"{os.path.abspath(path)} {status.st_size} {status.st_mtime_ns}"


def _add_lines(lines: Iterable[str], folder: Path, found: list[Path], skipped: list[tuple[str, str]]) -> None:
    for line in lines:
        name = line.rstrip("\r\n")
        if not name.strip():
            continue
        path = Path(name) if os.path.lexists(name) else folder / name
        if os.path.lexists(path):
            found.append(path)
        else:
            skipped.append((printable(name), "no such file"))


def _add_folder(folder: Path, found: list[Path], skipped: list[tuple[str, str]]) -> None:
    seen: set[str] = set()

    def unreadable(error: OSError) -> None:
        skipped.append((printable(error.filename), error.strerror or type(error).__name__))

    for parent, subfolders, names in os.walk(folder, onerror=unreadable, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        # Hidden folders hold thumbnails and version control, not somebody's images.
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(names):
            path = Path(parent, name)
            if name.startswith("."):
                continue
            if path.suffix.lower() in EXTENSIONS:
                found.append(path)
            else:
                skipped.append((printable(path), f"not an image by its name ({path.suffix or 'no ending'})"))


def unique_ids(paths: Sequence[Path]) -> list[str]:
    """An id for each of these files: its name without the ending, or its path where that would not be unique."""
    ids = [printable(path.stem) for path in paths]
    # Twice, because the path "x.png", which is in the way of x.jpg, may be the stem of x.png.jpg.
    for _ in range(2):
        times = Counter(ids)
        ids = [one if times[one] == 1 else printable(path) for one, path in zip(ids, paths, strict=True)]
    return ids


def printable(path: Path | str) -> str:
    """The path as text that any file can hold: bytes that are no UTF-8 are written as escapes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
