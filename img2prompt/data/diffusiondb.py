"""DiffusionDB: parts of a thousand images, as zip archives or folders, each with a JSON of their prompts."""

import json
import threading
from collections import OrderedDict
from collections.abc import Set
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from img2prompt.data.archive import ZipMembers
from img2prompt.data.decoding import EXTENSIONS
from img2prompt.data.listing import file_stamp, read_bytes
from img2prompt.data.sample import Found, Sample

_OPEN_ARCHIVES = 64


class DiffusionDB:
    """All images of the parts in `root` and below: `part-000001.zip`, or folders of that name.

    A prompt comes from the part's own JSON ({image: {"p": prompt}}), else from `metadata*.parquet` in `root` (columns
    image_name and prompt). ValueError when there is no part.
    """

    name = "diffusiondb"
    images: Path | None = None

    def __init__(self, root: str | Path | None) -> None:
        if root is None:
            raise ValueError("data=diffusiondb needs data.root=FOLDER, a folder with part-000001.zip or part-000001/")
        self.root = Path(root)
        self._archives: OrderedDict[Path, ZipMembers] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process opens the archives anew.
        return type(self), (self.root,)

    def find(self) -> Found:
        parts = sorted(path for path in self.root.rglob("part-*") if path.is_dir() or path.suffix == ".zip")
        # Unpacking may put a folder of the same name into it, whose images are already those of the outer one.
        parts = [part for part in parts if not any(parent in parts for parent in part.parents)]
        if not parts:
            raise ValueError(f"data.root={self.root}: no part-*.zip and no folder part-* there")
        found = Found([])
        locations: dict[str, str] = {}
        prompts: dict[str, str] = {}
        twice: set[str] = set()
        for part in parts:
            names, own = self._part(part, found)
            for name in names:
                image = PurePosixPath(name).name
                if image in locations:
                    twice.add(image)
                locations[image] = f"{part.relative_to(self.root)}\0{name}"
                if image in own:
                    prompts[image] = own[image]
        prompts |= self._table(locations.keys() - prompts.keys())
        for image, location in sorted(locations.items()):
            if image in twice:
                # One of them would get a prompt that may not be its own.
                found.skipped.append((image, "several images of this name"))
            elif not prompts.get(image, "").strip():
                found.skipped.append((image, "no prompt in its part, nor in metadata.parquet"))
            else:
                found.samples.append(Sample(PurePosixPath(image).stem, prompts[image], self, location))
        return found

    def read(self, location: str) -> bytes:
        part, _, name = location.partition("\0")
        path = self.root / part
        return read_bytes(path / name) if path.is_dir() else self._archive(path).read(name)

    def stamp(self, location: str) -> str:
        part, _, name = location.partition("\0")
        path = self.root / part
        return file_stamp(path / name) if path.is_dir() else f"{file_stamp(path)} {name}"

    def _part(self, part: Path, found: Found) -> tuple[list[str], dict[str, str]]:
        """The names of the images in a part, and the prompts in its JSON by image name."""
        if part.is_dir():
            names = [path.relative_to(part).as_posix() for path in sorted(part.rglob("*")) if path.is_file()]
            texts = [(name, read_bytes(part / name)) for name in names if name.endswith(".json")]
        else:
            archive = self._archive(part)
            found.skipped += [(f"{part.name}/{name}", reason) for name, reason in archive.refused]
            names = archive.names
            texts = [(name, archive.read(name)) for name in names if name.endswith(".json")]
        prompts: dict[str, str] = {}
        for name, text in texts:
            try:
                rows = json.loads(text)
                prompts |= {image: row["p"] for image, row in rows.items() if isinstance(row["p"], str)}
            except (ValueError, RecursionError, AttributeError, TypeError, KeyError):
                raise ValueError(f"{part}: {name} is not DiffusionDB's table of prompts") from None
        images = [name for name in names if PurePosixPath(name).suffix.lower() in EXTENSIONS]
        found.skipped += [
            (f"{part.name}/{name}", "not an image by its name")
            for name in names
            if name not in set(images) and not name.endswith(".json")
        ]
        return images, prompts

    def _table(self, wanted: Set[str]) -> dict[str, str]:
        """Prompts of the images whose part has none, from the tables in `root`."""
        prompts: dict[str, str] = {}
        for path in sorted(self.root.glob("metadata*.parquet")) if wanted else []:
            try:
                for batch in pq.ParquetFile(path).iter_batches(columns=["image_name", "prompt"]):
                    rows = zip(batch.column(0).to_pylist(), batch.column(1).to_pylist(), strict=True)
                    prompts |= {image: prompt for image, prompt in rows if image in wanted and prompt}
            except (pa.ArrowException, OSError, KeyError, IndexError) as error:
                raise ValueError(f"{path}: expected the columns image_name and prompt ({error})") from None
        return prompts

    def _archive(self, path: Path) -> ZipMembers:
        # Some stay open: to read the directory of an archive again for every image would take longer than the image.
        with self._lock:
            archive = self._archives.pop(path, None) or ZipMembers(path)
            self._archives[path] = archive
            if len(self._archives) > _OPEN_ARCHIVES:
                # Not closed here: another thread may be reading from it, and it closes when that is done.
                self._archives.popitem(last=False)
        return archive
