"""Prompts without images: lists of them, tables, caption sets, the metadata of DiffusionDB."""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from img2prompt.data.sample import Found, Sample

# Columns and keys that hold a prompt; the first that is there.
COLUMNS = ("prompt", "caption", "text", "p")
_FEWEST = 2
_DAMAGED = (OSError, EOFError, zlib.error)
ENDINGS = (".txt", ".txt.gz", ".csv", ".tsv", ".json", ".jsonl", ".parquet")


class PromptSource:
    """A source of prompts whose images are yet to be made; ids are places in the list."""

    name = "prompts"
    images: Path | None = None

    def __init__(self, prompts: Iterable[str]) -> None:
        self.prompts = prompts

    def find(self) -> Found:
        found = Found([])
        for number, prompt in enumerate(self.prompts):
            # Files that were joined have byte order marks within.
            text = prompt.strip().strip("\ufeff").strip()
            if text:
                found.samples.append(Sample(f"{number:09d}", text, self, ""))
            else:
                found.skipped.append((f"{number:09d}", "empty"))
        return found

    def read(self, location: str) -> bytes:
        raise ValueError("its image is not made yet")

    def stamp(self, location: str) -> str:
        raise ValueError("its image is not made yet")


def read_prompt_files(paths: Sequence[Path], column: str | None = None, key: str = "prompts") -> list[str]:
    """The prompts of all files, one after another, in their order.

    `.txt` and `.txt.gz` hold one a line; `.csv`, `.tsv`, `.jsonl` and `.parquet` have a column `column` or, with None,
    the first of `COLUMNS`; `.json` is a list of texts or rows, COCO's captions, or a part of DiffusionDB. ValueError
    when a file cannot be read, or has no prompt; `key` is who named it.
    """
    prompts: list[str] = []
    for path in paths:
        try:
            own = _prompts(path, column)
            if not any(prompt.strip() for prompt in own):
                raise ValueError("no prompt in it")
        except ValueError as error:
            raise ValueError(f"{key}={path}: {error}") from None
        prompts += own
    return prompts


def read_bank_prompts(bank: str | Sequence[str], key: str = "predictor.bank") -> list[str]:
    """The distinct prompts of a file or of several, without the empty ones, in the order of their first appearance.
    ValueError when there are fewer than two, of which nothing can be learnt; `key` is who named it.
    """
    files = [bank] if isinstance(bank, str) else list(bank)
    found = read_prompt_files([Path(one) for one in files], None, key)
    distinct = list(dict.fromkeys(prompt.strip() for prompt in found if prompt.strip()))
    if len(distinct) < _FEWEST:
        raise ValueError(f"{key}={bank}: {len(distinct)} distinct prompts; give a file of many")
    return distinct


def _prompts(path: Path, column: str | None) -> list[str]:
    ending = next((one for one in ENDINGS if path.name.lower().endswith(one)), None)
    if not path.is_file():
        raise ValueError("a folder; give a file" if path.is_dir() else "no such file")
    if ending is None:
        raise ValueError(f"the ending must be one of {', '.join(ENDINGS)}")
    try:
        if ending == ".parquet":
            names = pq.read_schema(path).names
            return _texts(pq.read_table(path, columns=[_column(path, names, column)])[0].to_pylist())
        with gzip.open(path) if ending.endswith(".gz") else path.open("rb") as file:
            text = file.read().decode("utf-8-sig")
        if not text.strip():
            return []
        if ending in (".csv", ".tsv"):
            delimiter = "\t" if ending == ".tsv" else ","
            rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
            name = _column(path, rows.fieldnames or [], column)
            return _texts(_field(row, name, rows.line_num) for row in rows)
        if ending == ".jsonl":
            return list(_of_rows(path, [json.loads(line) for line in text.split("\n") if line.strip()], column))
        if ending == ".json":
            return list(_of_rows(path, _rows_of(json.loads(text)), column))
    except (*_DAMAGED, UnicodeDecodeError, csv.Error, json.JSONDecodeError, RecursionError, pa.ArrowException) as error:
        raise ValueError(f"cannot be read ({' '.join(str(error).split())[:120]})") from None
    return text.replace("\r\n", "\n").replace("\r", "\n").rstrip("\n").split("\n")


def _field(row: dict[Any, Any], name: str, line: int) -> Any:
    if None in row:
        raise ValueError(f"line {line} has more fields than the header; put prompts with separators into quotes")
    return row[name]


def _rows_of(said: Any) -> list[Any]:
    """The rows of a JSON file: a list, COCO's {"annotations": [{"caption": …}]}, or DiffusionDB's {image: {"p": …}}."""
    if isinstance(said, dict) and not set(COLUMNS) & said.keys():
        said = said["annotations"] if isinstance(said.get("annotations"), list) else list(said.values())
    return said if isinstance(said, list) else [said]


def _of_rows(path: Path, rows: list[Any], column: str | None) -> Iterator[str]:
    for row in rows:
        if isinstance(row, str):
            yield row
        elif isinstance(row, dict):
            yield from _texts([row.get(_column(path, list(row), column))])
        else:
            raise ValueError(f"expected texts or rows, got {row!r}"[:200])


def _column(path: Path, names: Sequence[str], asked: str | None) -> str:
    found = [name for name in ([asked] if asked is not None else COLUMNS) if name in names]
    if not found:
        wanted = asked if asked is not None else " or ".join(COLUMNS)
        raise ValueError(f"no column {wanted}, only {', '.join(map(str, names)) or 'none'}"[:200])
    return found[0]


def _texts(values: Iterable[Any]) -> list[str]:
    """What is no text is empty: it is counted among what is left out."""
    return [value if isinstance(value, str) else "" for value in values]
