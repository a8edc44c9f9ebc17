"""Where pictures are kept: webdataset shards that `data=shards` reads, each with its manifest, whole or not at all.

synthesis.json   what made them; other settings are refused
prompts.jsonl    of what; others are refused but for more at the end
00000.tar        000000000.webp, .txt (the prompt) and .json (its line of the manifest), and so on
00000.jsonl      the manifest: one line an image, those included that went wrong and are in no tar
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from img2prompt.data.sample import Found
from img2prompt.data.shards import Shards
from img2prompt.files import locked, replacing, write_text, write_text_once
from img2prompt.synthesis.pairs import Pair, Wanted

SETTINGS = "synthesis.json"
PROMPTS = "prompts.jsonl"
# Lossless, as the competition's winners kept theirs; method 2 takes half the time of Pillow's 4 for 2 % more bytes.
ENCODINGS: dict[str, dict[str, Any]] = {
    "webp": {"format": "WEBP", "lossless": True, "method": 2, "quality": 50},
    "png": {"format": "PNG", "compress_level": 3},
    "jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
}
FORMATS = tuple(ENCODINGS)
# Per pixel, of what a diffusion model makes; for the disk's sake rather too much.
BYTES_PER_PIXEL = {"webp": 1.6, "png": 2.0, "jpg": 0.7}
# Per image: its text, its settings twice, and what a tar fills up.
BYTES_BESIDE = 6000


class PictureStore:
    """The folder of one synthesis: `settings` are all that its pictures depend on besides prompt, replica and seed.

    What is None in them is not known before the generator is loaded, and compared then.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        versions: Mapping[str, str],
        shard_size: int = 1000,
        image_format: str = "webp",
        saved_px: int | None = None,
        threads: int = 4,
    ) -> None:
        if image_format not in FORMATS:
            raise ValueError(f"format={image_format}: must be one of {', '.join(FORMATS)}")
        self.folder = folder
        self.settings = {**settings, "format": image_format, "saved_px": saved_px}
        self.versions = dict(versions)
        self.shard_size = shard_size
        self.image_format = image_format
        self.saved_px = saved_px
        self.threads = threads

    def check(self, wanted: Wanted) -> None:
        """ValueError, which shows the difference, when the folder was made with other settings or of other prompts."""
        path = self.folder / SETTINGS
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"out={self.folder}: a file; it must be a folder, or nothing yet")
        if not path.exists():
            others = sorted(one.name for one in self.folder.glob("*.tar"))
            if others:
                raise ValueError(f"out={self.folder}: it holds {others[0]} and no {SETTINGS}; choose another folder")
            return
        now = self._identity(wanted)
        try:
            there = json.loads(path.read_text(encoding="utf-8"))
            keys = [key for key in {**there, **now} if there.get(key) != now.get(key)]
        except (ValueError, TypeError, AttributeError):
            raise ValueError(f"{path}: damaged; choose another out=, or remove it with the shards beside it") from None
        different = [key for key in keys if key != "weights" or None not in (there.get(key), now.get(key))]
        if different:
            told = "; ".join(f"{key}: {there.get(key)} there, {now.get(key)} now" for key in different)
            raise ValueError(f"out={self.folder} was made with other settings ({told}); choose another folder")
        prompts = self._prompts()
        for number, (one, other) in enumerate(zip(prompts, wanted.prompts, strict=False)):
            if one != other:
                raise ValueError(
                    f"out={self.folder} was made of other prompts: number {number} is {one!r} there and {other!r} now; "
                    "choose another folder, or put new prompts at the end"
                )
        more = len(prompts) - len(wanted.prompts)
        if more > 0 and wanted.prompts and wanted.count is None:
            # They would be trained on with the others, whatever they were left out for.
            raise ValueError(f"out={self.folder} holds {more} prompts more than are wanted now; choose another folder")

    def claim(self, wanted: Wanted) -> None:
        """Makes the folder one of these settings and prompts; ValueError when it is of others."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"out={self.folder}: cannot be made ({error.strerror}); choose another folder") from None
        text = json.dumps(self._identity(wanted), indent=2, ensure_ascii=False)
        write_text_once(self.folder / SETTINGS, f"{text}\n")
        self.check(wanted)
        if len(self._prompts()) < len(wanted.prompts):
            lines = [json.dumps(prompt, ensure_ascii=False) for prompt in wanted.prompts]
            write_text(self.folder / PROMPTS, "".join(f"{line}\n" for line in lines))

    def is_done(self, shard: int, pairs: Sequence[Pair]) -> bool:
        """Whether the shard is there with these pairs, and maybe more; ValueError when it is there with others."""
        rows = self.rows(shard)
        for pair, row in zip(pairs, rows, strict=False):
            if (pair.prompt, pair.replica, pair.seed) != (row["prompt"], row["replica"], row["seed"]):
                raise ValueError(
                    f"{self._tar(shard)}: made of other prompts: {row['prompt']!r}, replica {row['replica']}, where "
                    f"{pair.prompt!r}, replica {pair.replica}, is wanted; take it away"
                )
            other = [key for key in self.settings if self._differs(key, row.get(key))]
            if other:
                told = "; ".join(f"{key}: {row.get(key)} there, {self.settings[key]} now" for key in other)
                raise ValueError(f"{self._tar(shard)}: made with other settings ({told}); take it away")
        return len(rows) >= len(pairs) > 0

    @contextmanager
    def writing(self, shard: int, pairs: Sequence[Pair]) -> Iterator["ShardWriter | None"]:
        """Takes the pictures of these pairs for a shard, which appears when all are there; None when another process
        has made them by now.
        """
        tar = self._tar(shard)
        with locked(tar.with_suffix(".lock"), f"{tar}: another process is making this shard"):
            if self.is_done(shard, pairs):
                yield None
                return
            for left in self.folder.glob(f".{tar.stem}.*.tmp"):
                left.unlink()
            with replacing(tar) as temporary:
                with ThreadPoolExecutor(self.threads) as pool, tarfile.open(temporary, "w") as archive:
                    writer = ShardWriter(self, archive, pool, shard * self.shard_size)
                    yield writer
                    writer.flush()
                # A tar must never lie beside the manifest of another: the old one goes first, the new one comes last.
                tar.unlink(missing_ok=True)
                lines = [json.dumps(row, ensure_ascii=False) for row in writer.rows]
                write_text(self._manifest(shard), "".join(f"{line}\n" for line in lines))

    def rows(self, shard: int) -> list[dict[str, Any]]:
        """The manifest of a shard; empty when the shard is not there, or its tar holds other pictures than these."""
        path = self._manifest(shard)
        if not path.is_file():
            return []
        rows = [_row(path, line) for line in _lines(path)]
        keys = [row["key"] for row in rows if "quarantined" not in row]
        names = [f"{key}.{ending}" for key in keys for ending in (self.image_format, "txt", "json")]
        return rows if names == _members(self._tar(shard)) else []

    def _differs(self, key: str, value: Any) -> bool:
        usual = self.settings[key]
        # Of several one is drawn for each picture, and a blank one was made again.
        is_own = isinstance(usual, list) or (key == "dtype" and value == "fp32")
        return value != usual and not is_own and not (key == "weights" and None in (value, usual))

    def count_blank(self, count: int) -> tuple[int, int]:
        """How many of the first `count` pairs are in quarantine, and how many pairs there are behind them."""
        numbers = sorted(int(path.stem) for path in self.folder.glob("*.jsonl") if path.stem.isdecimal())
        rows = [_row(path, line) for path in map(self._manifest, numbers) for line in _lines(path)]
        blank = sum("quarantined" in row and int(row["key"]) < count for row in rows)
        return blank, sum(int(row["key"]) >= count for row in rows)

    def encode(self, picture: np.ndarray) -> bytes:
        """uint8 [H, W, 3] as a file, of `saved_px` on its shorter side if that is given."""
        image = Image.fromarray(picture)
        if self.saved_px is not None and min(image.size) != self.saved_px:
            scale = self.saved_px / min(image.size)
            size = (round(image.width * scale), round(image.height * scale))
            image = image.resize(size, Image.Resampling.LANCZOS)
        file = io.BytesIO()
        image.save(file, **ENCODINGS[self.image_format])
        return file.getvalue()

    def _identity(self, wanted: Wanted) -> dict[str, Any]:
        own = {"base_seed": wanted.base_seed, "replicas": wanted.replicas, "shard_size": self.shard_size}
        return {**self.settings, **own}

    def _prompts(self) -> list[str]:
        path = self.folder / PROMPTS
        try:
            return [json.loads(line) for line in _lines(path)] if path.is_file() else []
        except ValueError:
            raise ValueError(f"{path}: damaged; remove it, and it is written anew") from None

    def _tar(self, shard: int) -> Path:
        return self.folder / f"{shard:05d}.tar"

    def _manifest(self, shard: int) -> Path:
        return self.folder / f"{shard:05d}.jsonl"


class Made(Shards):
    """The first `count` pairs of a synthesis, as a source of training; ValueError when some are gone."""

    name = "synthesis"

    def __init__(self, store: PictureStore, count: int) -> None:
        super().__init__(store.folder)
        self.store = store
        self.count = count

    def _tars(self) -> list[str]:
        # What somebody has put into a folder within is none of it.
        return [tar for tar in super()._tars() if Path(tar).parent == Path(self._path)]

    def find(self) -> Found:
        found = super().find()
        shards = range(-(-self.count // self.store.shard_size))
        rows = {row["key"]: row for shard in shards for row in self.store.rows(shard) if int(row["key"]) < self.count}
        found.samples = [sample for sample in found.samples if sample.id in rows]
        blank = [(key, row["quarantined"]) for key, row in rows.items() if "quarantined" in row]
        if len(found.samples) + len(blank) < self.count:
            told = f"{len(found.samples)} of {self.count} made pairs are there"
            raise ValueError(f"{self.store.folder}: {told}; the others have gone, or other workers are still at them")
        found.skipped += blank
        return found


class ShardWriter:
    """Encodes pictures in threads and adds them to a tar in their order; what waits is bounded."""

    def __init__(self, store: PictureStore, tar: tarfile.TarFile, pool: ThreadPoolExecutor, first: int) -> None:
        self.rows: list[dict[str, Any]] = []
        self._store, self._tar, self._pool, self._next = store, tar, pool, first
        self._waiting: list[tuple[dict[str, Any], Future[bytes] | None]] = []

    def add(self, pair: Pair, details: Mapping[str, Any], picture: np.ndarray, reason: str = "") -> None:
        """The next picture, uint8 [H, W, 3]. With a `reason` it is in quarantine: in the manifest, and not kept."""
        row = {
            "key": f"{self._next:09d}",
            "prompt": pair.prompt,
            "replica": pair.replica,
            "seed": pair.seed,
            **self._store.settings,
            **details,
            "versions": self._store.versions,
        }
        self._next += 1
        if reason:
            self._waiting.append((row | {"quarantined": reason}, None))
        else:
            self._waiting.append((row, self._pool.submit(self._store.encode, picture)))
        if len(self._waiting) >= 4 * self._store.threads:
            self._take(2 * self._store.threads)

    def flush(self) -> None:
        self._take(len(self._waiting))

    def _take(self, count: int) -> None:
        for row, encoded in self._waiting[:count]:
            if encoded is not None:
                data = encoded.result()
                row["sha256"] = hashlib.sha256(data).hexdigest()
                self._add_member(f"{row['key']}.{self._store.image_format}", data)
                self._add_member(f"{row['key']}.txt", row["prompt"].encode())
                self._add_member(f"{row['key']}.json", json.dumps(row, ensure_ascii=False).encode())
            self.rows.append(row)
        del self._waiting[:count]

    def _add_member(self, name: str, data: bytes) -> None:
        # Without owner and clock: the bytes of a shard depend on nothing but its pictures.
        member = tarfile.TarInfo(name)
        member.size = len(data)
        self._tar.addfile(member, io.BytesIO(data))


def _lines(path: Path) -> list[bytes]:
    # Other ends of lines may be within a prompt.
    return path.read_bytes().rstrip(b"\n").split(b"\n")


def _row(path: Path, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
        if not {"key", "prompt", "replica", "seed"} <= row.keys():
            raise ValueError
    except (ValueError, AttributeError):
        raise ValueError(f"{path}: damaged; remove it, and its shard is made again") from None
    return row


def _members(tar: Path) -> list[str] | None:
    """The names in a tar; None where it is gone, or was cut short or damaged."""
    try:
        if tar.stat().st_size % tarfile.RECORDSIZE:
            return None
        with tarfile.open(tar) as archive:
            return archive.getnames()
    except (OSError, tarfile.TarError):
        return None
