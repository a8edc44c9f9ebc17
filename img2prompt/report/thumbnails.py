"""Small pictures for a report: decoded as for training, at most 160 pixels a side, kept beside their prompts."""

import base64
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from img2prompt.data.images import decode, small_jpeg
from img2prompt.data.sample import Sample
from img2prompt.files import replacing

FILE = "thumbnails.parquet"
SIDE_PX = 160
_SCHEMA = pa.schema({"id": pa.string(), "prompt": pa.string(), "jpeg": pa.binary(), "reason": pa.string()})


@dataclass(frozen=True)
class Thumbnail:
    """A JPEG, or the reason why there is none."""

    id: str
    prompt: str
    jpeg: bytes
    reason: str = ""

    @property
    def address(self) -> str:
        """The picture itself, for a page that fetches nothing."""
        return f"data:image/jpeg;base64,{base64.b64encode(self.jpeg).decode()}"


def thumbnail(sample: Sample) -> Thumbnail:
    try:
        jpeg, reason = small_jpeg(decode(sample.source.read(sample.location)), SIDE_PX), ""
    except (ValueError, OSError) as error:
        jpeg, reason = b"", str(error) or type(error).__name__
    return Thumbnail(sample.id, sample.prompt, jpeg, reason)


def write_thumbnails(path: Path, samples: Iterable[Sample]) -> None:
    rows = [asdict(thumbnail(sample)) for sample in samples]
    with replacing(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, _SCHEMA), temporary)


def read_thumbnails(path: Path) -> Mapping[str, Thumbnail]:
    """Those of a folder by id; none where there is no file, ValueError where it is another one."""
    if not path.is_file():
        return {}
    try:
        rows = pq.read_table(path, schema=_SCHEMA).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not thumbnails of a report ({error})") from None
    return {row["id"]: Thumbnail(**row) for row in rows}
