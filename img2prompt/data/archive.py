"""Members of zip archives, read into memory one by one: nothing is unpacked, and hostile members are refused."""

import stat
import zipfile
from collections import Counter
from pathlib import Path, PurePosixPath

from img2prompt.data.decoding import MAX_BYTES, ImageError

MAX_MEMBERS = 1_000_000
# Images do not shrink; what is this much larger than its compressed form was made to fill the memory.
MAX_RATIO = 200


class ZipMembers:
    """The regular files in a zip archive, by name; `refused` lists the others with the reason.

    ValueError when the file is no zip archive or has too many members.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._zip = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise ValueError(
                f"{path}: cannot be read as a zip archive ({error}); fetch it again, or take it away"
            ) from None
        infos = self._zip.infolist()
        if len(infos) > MAX_MEMBERS:
            raise ValueError(f"{path}: {len(infos)} members, more than {MAX_MEMBERS}")
        self._infos: dict[str, zipfile.ZipInfo] = {}
        self.refused: list[tuple[str, str]] = []
        times = Counter(info.filename for info in infos)
        for info in infos:
            if info.is_dir():
                continue
            # Of two with one name, neither can be told to be the one that is meant.
            reason = "comes twice" if times[info.filename] > 1 else _refusal(info)
            if reason:
                self.refused.append((info.filename, reason))
            else:
                self._infos[info.filename] = info

    @property
    def names(self) -> list[str]:
        return list(self._infos)

    def read(self, name: str) -> bytes:
        """The bytes of a member, from several threads at once if need be; ImageError when it is damaged."""
        info = self._infos[name]
        try:
            with self._zip.open(info) as member:
                data = member.read(info.file_size + 1)
        except Exception as error:
            # A damaged member raises nearly anything: BadZipFile, zlib.error, EOFError, NotImplementedError …
            raise ImageError(f"damaged in its archive ({type(error).__name__})") from None
        if len(data) != info.file_size:
            raise ImageError("damaged in its archive (not of the size that it names)")
        return data


def leaves_archive(name: str) -> bool:
    """Whether a member's name is a path to somewhere else, on any system."""
    path = PurePosixPath(name.replace("\\", "/"))
    return path.is_absolute() or ".." in path.parts or ":" in "".join(path.parts[:1])


def _refusal(info: zipfile.ZipInfo) -> str:
    if leaves_archive(info.filename):
        return "a name that leaves its archive"
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind not in (0, stat.S_IFREG):
        return "not a regular file"
    if info.flag_bits & 1:
        return "encrypted"
    if info.file_size > MAX_BYTES:
        return f"of {info.file_size / 1e6:.0f} MB, more than {MAX_BYTES / 1e6:.0f} MB"
    if info.file_size > MAX_RATIO * max(1, info.compress_size):
        return f"expands more than {MAX_RATIO} times"
    return ""
