"""webdataset shards, as img2dataset writes them: tar files with 000000000.jpg, .txt and .json side by side.

A tar is indexed once, by its headers, and its members are then read at random by their offsets; local or remote.
"""

import json
import tarfile
import uuid
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from img2prompt.data.archive import MAX_MEMBERS, leaves_archive
from img2prompt.data.decoding import EXTENSIONS, MAX_BYTES, ImageError
from img2prompt.data.embedded import MAX_TEXT_BYTES
from img2prompt.data.sample import Found, Sample

# What filesystems say of the version of a file.
_VERSIONS = ("mtime", "ETag", "etag", "LastModified", "Last-Modified", "last_modified", "updated", "md5Hash")
_CAPTION_KEYS = ("caption", "prompt", "text")


@dataclass(frozen=True)
class _Member:
    """Where the bytes of a member lie in its tar."""

    offset: int
    size: int


class Shards:
    """All images of the .tar files in `root` (a folder, one tar, a glob, or an address that fsspec knows).

    Members of one key, the name up to its first dot, belong together; the prompt is the `.txt`, else the caption,
    prompt or text of the `.json`. ValueError when there is no tar, or one cannot be read.
    """

    name = "shards"
    images: Path | None = None

    def __init__(self, root: str | Path | None) -> None:
        if root is None:
            raise ValueError("data=shards needs data.root=FOLDER, a folder with .tar files")
        self.root = str(root)
        self._stamps: dict[str, str] = {}
        try:
            self._files, self._path = fsspec.core.url_to_fs(self.root)
        except (ImportError, ValueError) as error:
            raise ValueError(f"data.root={root}: {error}") from None

    def find(self) -> Found:
        tars = self._tars()
        if not tars:
            raise ValueError(f"data.root={self.root}: no .tar file there")
        found = Found([])
        keyed: dict[str, list[tuple[str, dict[str, _Member]]]] = defaultdict(list)
        for tar in tars:
            for key, members in self._index(tar, found).items():
                keyed[key].append((tar, members))
        for key, places in sorted(keyed.items()):
            tar, members = places[0]
            images = [ending for ending in members if f".{ending}" in EXTENSIONS]
            if len(places) > 1 or len(images) > 1:
                found.skipped.append((key, "several images of this key"))
            elif not images:
                dotted = any(f".{ending.rpartition('.')[2]}" in EXTENSIONS for ending in members)
                found.skipped.append((key, "an image with several dots in its name" if dotted else "no image"))
            else:
                try:
                    prompt = self._prompt(tar, members)
                except ImageError as error:
                    found.skipped.append((key, str(error)))
                    continue
                member = members[images[0]]
                if prompt.strip():
                    found.samples.append(Sample(key, prompt, self, f"{tar}\0{member.offset}\0{member.size}"))
                else:
                    found.skipped.append((key, "no .txt, nor a caption in its .json"))
        return found

    def read(self, location: str) -> bytes:
        tar, offset, size = location.split("\0")
        return self._read(tar, _Member(int(offset), int(size)))

    def stamp(self, location: str) -> str:
        tar, offset, size = location.split("\0")
        if tar not in self._stamps:
            info = self._files.info(tar)
            known = [f"{name} {info[name]}" for name in _VERSIONS if info.get(name)]
            # Of a file that may have changed unseen, nothing is kept for the next run.
            version = f"{info.get('size')} {known}" if known else uuid.uuid4().hex
            self._stamps[tar] = f"{self._files.unstrip_protocol(tar)} {version}"
        return f"{self._stamps[tar]} {offset} {size}"

    def _tars(self) -> list[str]:
        try:
            if self._files.isdir(self._path):
                return sorted(path for path in self._files.find(self._path) if path.endswith(".tar"))
            return sorted(path for path in self._files.glob(self._path) if path.endswith(".tar"))
        except OSError as error:
            raise ValueError(f"data.root={self.root}: cannot be listed ({error})") from None

    def _index(self, tar: str, found: Found) -> dict[str, dict[str, _Member]]:
        """The members of a tar by key and ending; only headers are read."""
        keyed: dict[str, dict[str, _Member]] = defaultdict(dict)
        try:
            with self._files.open(tar, "rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
                members = []
                for member in archive:
                    members.append((member.name, member.isfile(), member.isdir(), member.offset_data, member.size))
                    if len(members) > MAX_MEMBERS:
                        raise ValueError(f"{tar}: more than {MAX_MEMBERS} members")
        except (tarfile.TarError, OSError, EOFError) as error:
            raise ValueError(
                f"{tar}: cannot be read as an uncompressed tar ({error}); fetch it again, or take it away"
            ) from None
        times = Counter(name for name, *_ in members)
        twice: list[str] = []
        for name, is_file, is_dir, offset, size in members:
            if is_dir:
                continue
            reason = _refusal(name, is_file, size, times[name])
            if reason:
                found.skipped.append((f"{tar}/{name}", reason))
                continue
            folder, _, base = name.rpartition("/")
            key, _, ending = base.partition(".")
            full = f"{folder}/{key}" if folder else key
            if ending.lower() in keyed[full]:
                twice.append(full)
            keyed[full][ending.lower()] = _Member(offset, size)
        for full in dict.fromkeys(twice):
            # One of them would be read for the other.
            del keyed[full]
            found.skipped.append((f"{tar}/{full}", "several members of this key and ending"))
        return keyed

    def _prompt(self, tar: str, members: dict[str, _Member]) -> str:
        text = _text(self._read(tar, members["txt"])).strip() if "txt" in members else ""
        if text or "json" not in members:
            return text
        try:
            values: Any = json.loads(_text(self._read(tar, members["json"])))
        except (ValueError, RecursionError):
            raise ImageError("its .json is damaged") from None
        texts = [values.get(name) for name in _CAPTION_KEYS] if isinstance(values, dict) else []
        return next((text for text in texts if isinstance(text, str) and text.strip()), "")

    def _read(self, tar: str, member: _Member) -> bytes:
        try:
            data = self._files.cat_file(tar, start=member.offset, end=member.offset + member.size)
        except Exception as error:
            # Besides OSError, remote filesystems raise what their own libraries raise.
            raise ImageError(getattr(error, "strerror", None) or type(error).__name__) from None
        if len(data) != member.size:
            raise ImageError("cut off in its tar")
        return data


def _refusal(name: str, is_file: bool, size: int, times: int) -> str:
    if not is_file:
        return "not a regular file"
    if leaves_archive(name):
        return "a name that leaves its archive"
    if times > 1:
        return "comes twice"
    return f"of {size / 1e6:.0f} MB, more than {MAX_BYTES / 1e6:.0f} MB" if size > MAX_BYTES else ""


def _text(data: bytes) -> str:
    if len(data) > MAX_TEXT_BYTES:
        raise ImageError(f"text of more than {MAX_TEXT_BYTES >> 20} MiB")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ImageError("its text is not UTF-8") from None
