"""Predictions, the files they become, and how these are read again.

A long job writes part files, each whole or not at all, beside the file it will become; when all are there they are
joined. An interrupted job continues from its parts. One part is the most that is ever held in memory. What refines
predictions (`refine/`) reads such a file whole.
"""

import json
import shutil
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from img2prompt.files import lock, replacing, write_json
from img2prompt.prediction import Prediction


def joined(predictions: Sequence[Prediction]) -> Prediction:
    """One prediction of all the images of several, in their order; they have equal columns."""
    filled = [one for one in predictions if len(one)] or list(predictions[:1])
    return Prediction(
        [image_id for one in filled for image_id in one.ids],
        np.concatenate([one.embeddings for one in filled]),
        {name: [value for one in filled for value in one.columns[name]] for name in filled[0].columns},
        [item for one in predictions for item in one.skipped],
    )


def taken(prediction: Prediction, rows: Sequence[int]) -> Prediction:
    """These rows of a prediction, and all that it has skipped."""
    columns = {name: [values[row] for row in rows] for name, values in prediction.columns.items()}
    ids = [prediction.ids[row] for row in rows]
    return Prediction(ids, prediction.embeddings[list(rows)], columns, prediction.skipped)


class Parts:
    """The `count` part files of one job, in the folder `<out>.parts` that disappears when the job is done.

    `job` is plain data that fixes the results (checkpoint, images, options); parts of another job are discarded, and
    counted. ValueError while another process writes to the same file.
    Iterated, it reads them one by one, as often as wanted.
    """

    def __init__(self, out: Path, job: Mapping[str, Any], count: int) -> None:
        self.folder = out.with_name(out.name + ".parts")
        self._count = count
        if self.folder.exists() and not (self.folder.is_dir() and all(map(_is_ours, self.folder.iterdir()))):
            raise ValueError(f"{self.folder}: in the way, and not ours to remove; choose another out=")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = lock(self.folder / "lock", f"{self.folder}: another job is writing {out}; choose another out=")
        record = self.folder / "job.json"
        found = [path for path in self.folder.iterdir() if path.suffix == ".parquet"]
        self.continued = _same_job(record, job)
        self.discarded = 0 if self.continued else len(found)
        if not self.continued:
            for path in found:
                path.unlink()
            write_json(record, dict(job))

    def has(self, number: int) -> bool:
        return self._path(number).is_file()

    def write(self, number: int, prediction: Prediction) -> None:
        with replacing(self._path(number)) as temporary:
            pq.write_table(_table(prediction), temporary)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Prediction]:
        for number in range(self._count):
            yield _from_table(pq.read_table(self._path(number)))

    def close(self) -> None:
        """Lets others write; the parts stay."""
        self._lock.close()

    def remove(self) -> None:
        self.close()
        shutil.rmtree(self.folder)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.parquet"


def write_parquet(path: Path, parts: Iterable[Prediction]) -> None:
    """Columns id, the named columns, and embedding as a fixed-size list of float32[D]."""
    with replacing(path) as temporary:
        writer: pq.ParquetWriter | None = None
        for part in parts:
            table = _table(part).replace_schema_metadata(None)
            writer = writer or pq.ParquetWriter(temporary, table.schema)
            writer.write_table(table)
        if writer:
            writer.close()


def write_npz(path: Path, parts: Iterable[Prediction]) -> None:
    """Arrays `ids` and each named column (text of one width, deflated, or float32), and `embeddings` float32 [N, D].

    `parts` is gone through once for each array and once before, because type and length stand in an array's header.
    """
    assert iter(parts) is not parts, "an iterator can be gone through only once"
    count = 0
    kinds: dict[str, np.dtype] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for part in parts:
        count += len(part)
        for name, values in _arrays(part).items():
            kinds[name] = np.promote_types(kinds.get(name, values.dtype), values.dtype)
            shapes[name] = values.shape[1:]
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, kind in kinds.items():
            entry = zipfile.ZipInfo(f"{name}.npy")
            entry.compress_type = zipfile.ZIP_DEFLATED if kind.kind == "U" else zipfile.ZIP_STORED
            header = {
                "descr": np.lib.format.dtype_to_descr(kind),
                "fortran_order": False,
                "shape": (count, *shapes[name]),
            }
            with archive.open(entry, "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                for part in parts:
                    member.write(_arrays(part).get(name, np.empty(0)).astype(kind).tobytes())


def write_jsonl(path: Path, parts: Iterable[Prediction]) -> None:
    """One JSON object a line: id, the named columns, embedding."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        for part in parts:
            for i, image_id in enumerate(part.ids):
                row = {"id": image_id, **{name: values[i] for name, values in part.columns.items()}}
                # The shortest text that reads back as the same float32.
                row["embedding"] = [float(str(value)) for value in part.embeddings[i]]
                file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


WRITERS = {".parquet": write_parquet, ".npz": write_npz, ".jsonl": write_jsonl}
# Columns that say what a model found in an image, and not what the image is.
FINDINGS = {
    "nearest_prompts": pa.list_(pa.string()),
    "nearest_cosines": pa.list_(pa.float32()),
    "composed_prompt": pa.string(),
    "composed_cosine": pa.float32(),
    "words": pa.list_(pa.string()),
    "word_probabilities": pa.list_(pa.float32()),
    "caption": pa.string(),
    "agreement": pa.float32(),
    "norm": pa.float32(),
    "confidence": pa.float32(),
}


def read_predictions(path: Path | str) -> Prediction:
    """The predictions in a file that one of `WRITERS` wrote, with all its columns; embeddings as they are there.

    ValueError, one sentence, for a file that is not there or is none of ours, and where an id comes twice or an
    embedding is of another width, not finite, or zero.
    """
    path = Path(path)
    if path.suffix not in _READERS:
        raise ValueError(f"{path}: predictions are read from {', '.join(_READERS)}; write them so with predict.py out=")
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected predictions that predict.py wrote")
    try:
        prediction = _READERS[path.suffix](path)
    except (OSError, EOFError, ValueError, KeyError, TypeError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        # An archive with a password is a RuntimeError; pyarrow's own errors are ValueErrors, or KeyErrors.
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise ValueError(f"{path}: not predictions that predict.py wrote ({reason})") from None
    if not len(prediction):
        raise ValueError(f"{path}: there are no predictions in it")
    if len(set(prediction.ids)) != len(prediction.ids):
        twice = next(one for one, count in Counter(prediction.ids).items() if count > 1)
        raise ValueError(f"{path}: id {twice} comes twice; keep one of its predictions")
    for wrong, what in (
        (~np.isfinite(prediction.embeddings).all(axis=1), "is not finite"),
        (~prediction.embeddings.any(axis=1), "is zero and has no direction"),
    ):
        if wrong.any():
            first = prediction.ids[int(wrong.argmax())]
            raise ValueError(f"{path}: the embedding of {first} {what} ({wrong.sum()} of {len(prediction)} are so)")
    return prediction


def _read_parquet(path: Path) -> Prediction:
    table = pq.read_table(path)
    for name in ("id", "embedding"):
        if table.column(name).null_count:
            raise ValueError(f"column {name} has empty places")
    if not pa.types.is_fixed_size_list(table.schema.field("embedding").type):
        raise ValueError("column embedding holds no vectors of one width")
    if not pa.types.is_string(table.schema.field("id").type):
        raise ValueError("its ids are no text")
    return _from_table(table)


def _read_npz(path: Path) -> Prediction:
    if not zipfile.is_zipfile(path):
        raise ValueError("no zip archive of arrays")
    with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    ids, embeddings = arrays.pop("ids"), arrays.pop("embeddings")
    if embeddings.ndim != 2 or embeddings.dtype.kind != "f":
        raise ValueError(f"embeddings is {embeddings.dtype} of shape {embeddings.shape}, not numbers [N, D]")
    return _of_columns(ids.tolist(), embeddings, {name: values.tolist() for name, values in arrays.items()})


def _read_jsonl(path: Path) -> Prediction:
    ids: list[Any] = []
    vectors: list[np.ndarray] = []
    columns: dict[str, list[Any]] = {}
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            row = json.loads(line)
            if not isinstance(row, dict) or not {"id", "embedding"} <= row.keys():
                raise ValueError(f"line {number} is no object with id and embedding")
            ids.append(row.pop("id"))
            vectors.append(np.atleast_1d(np.array(row.pop("embedding"), dtype=np.float32)))
            if vectors[-1].shape != vectors[0].shape:
                raise ValueError(f"line {number}: embeddings of other widths, {len(vectors[-1])} and {len(vectors[0])}")
            for name, value in row.items():
                columns.setdefault(name, []).append(value)
    return _of_columns(ids, np.stack(vectors) if vectors else np.empty((0, 1)), columns)


def _of_columns(ids: list[Any], embeddings: np.ndarray, columns: dict[str, list[Any]]) -> Prediction:
    """ValueError unless ids are text and every column has as many values."""
    if not all(isinstance(one, str) for one in ids):
        raise ValueError("its ids are no text")
    counts = {"embeddings": len(embeddings), **{name: len(values) for name, values in columns.items()}}
    for name, count in counts.items():
        if count != len(ids):
            raise ValueError(f"{count} values of {name} for {len(ids)} ids")
    return Prediction(ids, embeddings.astype(np.float32), columns)


_READERS: dict[str, Callable[[Path], Prediction]] = {
    ".parquet": _read_parquet,
    ".npz": _read_npz,
    ".jsonl": _read_jsonl,
}


def _arrays(part: Prediction) -> dict[str, np.ndarray]:
    """Columns as arrays of text or float32; none for a part in which every image was bad: it has no types."""
    if not len(part):
        return {}
    columns = {name: np.array(values) for name, values in part.columns.items()}
    narrow = {name: values if values.dtype.kind == "U" else values.astype("<f4") for name, values in columns.items()}
    return {"ids": np.array(part.ids), **narrow, "embeddings": part.embeddings.astype("<f4")}


def _is_ours(path: Path) -> bool:
    # Temporary files are what a killed job leaves.
    return path.suffix in (".parquet", ".tmp") or path.name in ("job.json", "lock")


def _same_job(record: Path, job: Mapping[str, Any]) -> bool:
    try:
        return json.loads(record.read_text()) == json.loads(json.dumps(dict(job)))
    except (OSError, ValueError):
        return False


def _table(prediction: Prediction) -> pa.Table:
    vectors = np.ascontiguousarray(prediction.embeddings, dtype=np.float32)
    columns = {
        "id": pa.array(prediction.ids, pa.string()),
        **{name: _column(name, values) for name, values in prediction.columns.items()},
        "embedding": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel(), pa.float32()), vectors.shape[1]),
    }
    skipped = json.dumps(prediction.skipped)
    return pa.table(columns).replace_schema_metadata({"skipped": skipped})


def _column(name: str, values: list[Any]) -> pa.Array:
    # Types are given by name, because a part in which every image was bad has no values to guess them from.
    return pa.array(values, pa.string() if name == "path" else FINDINGS.get(name))


def _from_table(table: pa.Table) -> Prediction:
    column = table.column("embedding")
    width = table.schema.field("embedding").type.list_size
    vectors = column.combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
    named = {name: table.column(name).to_pylist() for name in table.column_names if name not in ("id", "embedding")}
    skipped = json.loads((table.schema.metadata or {}).get(b"skipped", b"[]"))
    return Prediction(
        table.column("id").to_pylist(), vectors.astype(np.float32), named, [(path, why) for path, why in skipped]
    )
