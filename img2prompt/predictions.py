"""Predictions and the files they become.

A long job writes part files, each whole or not at all, beside the file it will become; when all are there they are
joined. An interrupted job continues from its parts. One part is the most that is ever held in memory.
"""

import json
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float

from img2prompt.files import replacing, write_json


@dataclass
class Prediction:
    """N predicted images: ids, unit embeddings, and named columns of N values each (path, nearest_prompts, …).

    `skipped` lists what could not be predicted, as (path, reason).
    """

    ids: list[str]
    embeddings: Float[np.ndarray, "N D"]
    columns: dict[str, list[Any]] = field(default_factory=dict)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)


def joined(predictions: Sequence[Prediction]) -> Prediction:
    """One prediction of all the images of several, in their order; they have equal columns."""
    filled = [one for one in predictions if len(one)] or list(predictions[:1])
    return Prediction(
        [image_id for one in filled for image_id in one.ids],
        np.concatenate([one.embeddings for one in filled]),
        {name: [value for one in filled for value in one.columns[name]] for name in filled[0].columns},
        [item for one in predictions for item in one.skipped],
    )


class Parts:
    """The part files of one job, in the folder `<out>.parts` that disappears when the job is done.

    `job` is plain data that fixes the results (checkpoint, images, options); parts of another job are discarded.
    """

    def __init__(self, out: Path, job: Mapping[str, Any]) -> None:
        self.folder = out.with_name(out.name + ".parts")
        record = self.folder / "job.json"
        if self.folder.exists() and not _same_job(record, job):
            if not record.is_file() or any(path.suffix not in (".parquet", ".json") for path in self.folder.iterdir()):
                raise ValueError(f"{self.folder}: in the way, and not ours to remove; choose another out=")
            shutil.rmtree(self.folder)
        self.continued = self.folder.exists()
        if not self.continued:
            write_json(record, dict(job))

    def __contains__(self, number: int) -> bool:
        return self._path(number).is_file()

    def write(self, number: int, prediction: Prediction) -> None:
        with replacing(self._path(number)) as temporary:
            pq.write_table(_table(prediction), temporary)

    def read(self, count: int) -> Iterator[Prediction]:
        for number in range(count):
            yield _from_table(pq.read_table(self._path(number)))

    def remove(self) -> None:
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
    """Arrays `ids` (text), `embeddings` (float32 [N, D]) and each named column of plain text or numbers."""
    ids: list[str] = []
    columns: dict[str, list[Any]] = {}
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        # The number of rows stands in the header, and is known only at the end: rows wait in a file of their own.
        rows = temporary.with_name(temporary.name + ".rows")
        try:
            width = 0
            with rows.open("wb") as file:
                for part in parts:
                    ids += part.ids
                    width = part.embeddings.shape[1]
                    file.write(np.ascontiguousarray(part.embeddings, dtype="<f4").tobytes())
                    for name, values in part.columns.items():
                        columns.setdefault(name, []).extend(values)
            with archive.open("embeddings.npy", "w", force_zip64=True) as member, rows.open("rb") as file:
                header = {"descr": "<f4", "fortran_order": False, "shape": (len(ids), width)}
                np.lib.format.write_array_header_1_0(member, header)
                shutil.copyfileobj(file, member)
        finally:
            rows.unlink(missing_ok=True)
        for name, values in {"ids": ids, **columns}.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.array(values), allow_pickle=False)


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
    kinds = {"path": pa.string(), "nearest_prompts": pa.list_(pa.string()), "nearest_cosines": pa.list_(pa.float32())}
    return pa.array(values, kinds.get(name))


def _from_table(table: pa.Table) -> Prediction:
    column = table.column("embedding")
    width = table.schema.field("embedding").type.list_size
    vectors = column.combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
    named = {name: table.column(name).to_pylist() for name in table.column_names if name not in ("id", "embedding")}
    skipped = json.loads((table.schema.metadata or {}).get(b"skipped", b"[]"))
    return Prediction(
        table.column("id").to_pylist(), vectors.astype(np.float32), named, [(path, why) for path, why in skipped]
    )
