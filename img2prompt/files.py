"""Files that appear whole or not at all.

Checkpoints, run files and predictions are written through `replacing`: a
reader, or a crash at any moment, sees the old file or the new one and never half of either.
"""

import csv
import errno
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

_MOST_IN_CELL = 20_000  # characters


@contextmanager
def replacing(path: Path | str, size_bytes: int | None = None) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it takes the place of `path`, on an error it is removed.

    The temporary file is in the same folder, because a rename is atomic only within one filesystem. ValueError on a
    full disk, which says how much is missing where `size_bytes` tells how large the file will be.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{path}: its folder cannot be made ({error.strerror})") from None
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name[:40]}.", suffix=".tmp", dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes files that only their owner can read; results are ordinary files.
        temporary.chmod(0o666 & ~umask())
        _flush_to_disk(temporary)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if _is_disk_full(error):
            raise ValueError(_disk_full(path, size_bytes)) from None
        raise
    _flush_to_disk(path.parent)


def write_text(path: Path | str, text: str) -> None:
    """Writes UTF-8 text with exactly the line ends given."""
    with replacing(path) as temporary:
        temporary.write_bytes(text.encode())


def write_text_once(path: Path, text: str) -> None:
    """Writes a file that is not there yet; of several processes the first wins, and what is there stays."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name[:40]}.", suffix=".tmp", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(text.encode())
        temporary.chmod(0o666 & ~umask())
        _flush_to_disk(temporary)
        try:
            os.link(temporary, path)
        except FileExistsError:
            pass
        except OSError:
            # A filesystem without hard links.
            if not path.exists():
                os.replace(temporary, path)
    except OSError as error:
        if _is_disk_full(error):
            raise ValueError(_disk_full(path, len(text))) from None
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path | str, value: Any) -> None:
    """Writes plain data as indented JSON; NaN is refused, because other JSON readers refuse it."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    """Rows as CSV; the columns are all that occur, in the order of their first appearance."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = io.StringIO(newline="")
    # A lone \r ends a row for readers, and is not quoted for it.
    has_returns = any("\r" in str(cell) for row in rows for cell in row.values())
    dialect = csv.unix_dialect if has_returns else csv.excel
    writer = csv.DictWriter(text, columns, dialect=dialect, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def as_cell(text: str) -> str:
    """The text for a table: no more than readers of CSV take, and with a ' before it where a spreadsheet would take it
    for a formula, or where it begins with one.
    """
    text = text[:_MOST_IN_CELL]
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "'")) else text


def from_cell(text: str) -> str:
    return text.removeprefix("'")


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file; none when there is no such file."""
    if not path.is_file():
        return []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: damaged, no table ({error})") from None
    if any(None in row or None in row.values() for row in rows):
        raise ValueError(f"{path}: damaged, its rows are of other lengths than the first")
    return rows


def link_or_copy(existing: Path, path: Path) -> None:
    """Gives `existing` a second name without a second copy of its bytes, where the filesystem can."""
    if path.exists() and path.samefile(existing):
        return
    with replacing(path) as temporary:
        temporary.unlink()
        try:
            os.link(existing, temporary)
        except OSError:
            temporary.write_bytes(existing.read_bytes())


@contextmanager
def locked(path: Path, refusal: str) -> Iterator[None]:
    """Holds `path` for this process; ValueError(refusal) when another one does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = lock(path, refusal)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()


def remove_temporary_files(folder: Path) -> None:
    """Removes what a killed process left of `replacing` in `folder` and below; nobody else may be writing there."""
    for path in folder.rglob(".*.tmp"):
        path.unlink()


def lock(path: Path, refusal: str) -> IO[bytes]:
    """Holds `path` until the result is closed or the process ends; ValueError(refusal) when another one does."""
    # Windows has no such locks; there two jobs are not kept apart.
    if os.name == "nt":
        return path.open("wb")
    import fcntl

    while True:
        file = path.open("wb")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
                # A filesystem without locks.
                return file
            file.close()
            raise ValueError(refusal) from None
        # Whoever held it may have removed it since it was opened.
        if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
            return file
        file.close()


def _flush_to_disk(path: Path) -> None:
    # Windows cannot open a folder for fsync; the rename is still atomic there.
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_disk_full(error: BaseException) -> bool:
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    # Libraries written in Rust say it in words, and torch fails once more on the way out.
    told = getattr(error, "errno", None) in numbers or any(f"(os error {number})" in str(error) for number in numbers)
    return told or (error.__context__ is not None and _is_disk_full(error.__context__))


def _disk_full(path: Path, size_bytes: int | None) -> str:
    free = shutil.disk_usage(path.parent).free
    if os.name != "nt":
        import resource

        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        free = free if limit == resource.RLIM_INFINITY else min(free, limit)
    told = f"{free / 2**20:.1f} MiB can be written there"
    if size_bytes is not None:
        told = f"{size_bytes / 2**20:.1f} MiB are needed and {told}, {(size_bytes - free) / 2**20:.1f} MiB are missing"
    return f"{path}: the disk is full: {told}; what was there before is kept"


def umask() -> int:
    # The only portable way to read the mask is to set it.
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
