"""Any folder of generated images: each one's prompt from a table, a text file beside it, or its own metadata."""

import csv
import json
from collections.abc import Iterator, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from img2prompt.data.decoding import ImageError
from img2prompt.data.embedded import MAX_TEXT_BYTES, MetadataError
from img2prompt.data.listing import file_stamp, list_images, printable, read_bytes, unique_ids
from img2prompt.data.metadata import Label, caption_file, read_label
from img2prompt.data.sample import Found, Sample

CAPTIONS = (".txt", ".caption")
TABLES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
COLUMNS = ("prompt", "text", "caption")
ON_MISSING = ("error", "skip")


class Folder:
    """All images of `root` and its subfolders that have a prompt.

    The prompt is looked for in `metadata.csv|jsonl|parquet` of the image's folder or one above (columns file_name and
    prompt, text or caption), then in a .txt or .caption of the same stem (each line a caption, or A1111's parameters),
    then in the image's own metadata. An image without one is an error, or skipped with the reason.
    """

    name = "folder"

    def __init__(self, root: str | Path | None, on_missing: str = "error", threads: int = 4) -> None:
        if root is None:
            raise ValueError("data=folder needs data.root=FOLDER, a folder of images")
        if on_missing not in ON_MISSING:
            raise ValueError(f"data.on_missing={on_missing}: must be {' or '.join(ON_MISSING)}")
        self.root = Path(root)
        self.images: Path | None = self.root
        self.on_missing = on_missing
        self.threads = threads

    def find(self) -> Found:
        if not self.root.is_dir():
            raise ValueError(f"data.root={self.root}: no such folder")
        listing = list_images(self.root)
        if not listing.files:
            raise ValueError(f"data.root={self.root}: no image file in it or below it")
        paths = [file.path for file in listing.files]
        tables = self._tables({folder for path in paths for folder in path.parents})
        with ThreadPoolExecutor(self.threads, thread_name_prefix="labels") as pool:
            labelled = list(pool.map(lambda path: self._labels(path, tables), paths))
        found = Found([], [(path, reason) for path, reason in listing.skipped if not _is_label(Path(path))])
        missing: list[tuple[str, str]] = []
        for image_id, path, labels in zip(
            unique_ids([p.relative_to(self.root) for p in paths]), paths, labelled, strict=True
        ):
            if isinstance(labels, str):
                missing.append((printable(path), labels))
                continue
            for number, label in enumerate(labels):
                found.samples.append(
                    Sample(
                        f"{image_id}#{number + 1}" if number else image_id,
                        label.prompt,
                        self,
                        str(path.relative_to(self.root)),
                        negative_prompt=label.negative_prompt,
                    )
                )
        if missing and self.on_missing == "error":
            raise ValueError(
                f"{self.root}: {len(missing)} of {len(paths)} images have no prompt (first: {missing[0][0]}: "
                f"{missing[0][1]}). Put a .txt beside each, or leave them out with data.on_missing=skip"
            )
        found.skipped += missing
        return found

    def read(self, location: str) -> bytes:
        return read_bytes(self.root / location)

    def stamp(self, location: str) -> str:
        return file_stamp(self.root / location)

    def _labels(self, path: Path, tables: dict[Path, list[Label]]) -> list[Label] | str:
        """The labels of an image, each another caption; or the reason why it has none."""
        try:
            if path in tables:
                labels = tables[path]
            elif beside := [path.with_suffix(ending) for ending in CAPTIONS if path.with_suffix(ending).is_file()]:
                labels = [label for file in beside for label in caption_file(_text(file))]
                if len(beside) > 1 and len({label.prompt for label in labels}) > 1:
                    return f"different captions in {' and '.join(file.name for file in beside)}"
            else:
                label = read_label(read_bytes(path))
                labels = [] if label is None else [label]
        except (MetadataError, ImageError) as error:
            return str(error)
        distinct = list({label.prompt: label for label in labels if label.prompt.strip()}.values())
        return distinct or "no prompt in its metadata, nor in a file beside it"

    def _tables(self, folders: Set[Path]) -> dict[Path, list[Label]]:
        labels: dict[Path, list[Label]] = {}
        inside = [folder for folder in folders if folder.is_relative_to(self.root)]
        # A table further down is closer to its images.
        for folder in sorted(inside, key=lambda folder: (-len(folder.parts), folder)):
            found_here = [folder / name for name in TABLES if (folder / name).is_file()]
            if len(found_here) > 1:
                raise ValueError(f"{folder}: {' and '.join(path.name for path in found_here)}; keep one of them")
            if not found_here:
                continue
            table = found_here[0]
            own: dict[Path, list[Label]] = {}
            for row in _rows(table):
                name, column = row.get("file_name"), next((one for one in COLUMNS if one in row), None)
                if not isinstance(name, str) or column is None or not isinstance(row[column], str):
                    raise ValueError(
                        f"{table}: expected the columns file_name and {', '.join(COLUMNS[:-1])} or {COLUMNS[-1]}, "
                        f"found {', '.join(map(str, row))}"
                    )
                if Path(name).is_absolute() or ".." in Path(name).parts:
                    raise ValueError(f"{table}: refused, {name} is outside of its folder")
                label = Label(row[column], str(row.get("negative_prompt") or ""), "table")
                own.setdefault(table.parent / name, []).append(label)
            for path, found in own.items():
                labels.setdefault(path, found)
        return labels


def _is_label(path: Path) -> bool:
    return path.suffix.lower() in CAPTIONS or path.name in TABLES


def _text(path: Path) -> str:
    if path.stat().st_size > MAX_TEXT_BYTES:
        raise MetadataError(f"{path.name}: more than {MAX_TEXT_BYTES >> 20} MiB")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise MetadataError(f"{path.name}: not UTF-8") from None


def _rows(table: Path) -> Iterator[dict[str, Any]]:
    try:
        if table.suffix == ".csv":
            with table.open(encoding="utf-8-sig", newline="") as file:
                reader = csv.DictReader(file, strict=True)
                names = reader.fieldnames or []
                if len(set(names)) != len(names):
                    raise ValueError(f"{table}: a column comes twice in {','.join(names)}; keep one of them")
                for fields in reader:
                    if None in fields or None in fields.values():
                        raise ValueError(
                            f"{table}, line {reader.line_num}: not as many fields as the header; "
                            "a prompt with commas needs quotes"
                        )
                    yield fields
        elif table.suffix == ".jsonl":
            for line in table.read_text(encoding="utf-8-sig").split("\n"):
                row = json.loads(line) if line.strip() else None
                if row is not None:
                    yield row if isinstance(row, dict) else {}
        else:
            wanted = [
                name for name in pq.read_schema(table).names if name in ("file_name", *COLUMNS, "negative_prompt")
            ]
            yield from pq.read_table(table, columns=wanted).to_pylist()
    except (csv.Error, UnicodeDecodeError, json.JSONDecodeError, RecursionError, pa.ArrowException) as error:
        raise ValueError(f"{table}: cannot be read ({' '.join(str(error).split())[:120]})") from None
