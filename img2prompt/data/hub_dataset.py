"""Hugging Face datasets: a name on the Hub, or a folder of parquet files or of `save_to_disk` (extra `hub`)."""

import sys
from pathlib import Path
from typing import Any

import datasets

from img2prompt.data.decoding import MAX_BYTES, ImageError
from img2prompt.data.folder import COLUMNS
from img2prompt.data.listing import file_stamp, read_bytes
from img2prompt.data.sample import Found, Sample

IMAGE_COLUMNS = ("image", "img", "jpg", "png", "webp")


class HubDataset:
    """The rows of one split of a dataset; the columns of images and prompts are found by their usual names, or given.

    ValueError when there is no such dataset, split or column. Nothing of a dataset is executed.
    """

    name = "hub"
    images: Path | None = None

    def __init__(
        self,
        root: str | Path | None,
        split: str = "train",
        subset: str | None = None,
        revision: str | None = None,
        image_column: str | None = None,
        prompt_column: str | None = None,
    ) -> None:
        if root is None:
            raise ValueError("data=hub needs data.root=OWNER/NAME, a dataset on the Hub, or a folder")
        self.root, self.split, self.subset, self.revision = str(root), split, subset, revision
        self.image_column, self.prompt_column = image_column, prompt_column
        self._rows: Any = None

    def find(self) -> Found:
        rows = self._load()
        image = self._column(rows, self.image_column, IMAGE_COLUMNS, "image_column")
        prompt = self._column(rows, self.prompt_column, COLUMNS, "prompt_column")
        # Encoded bytes, not the pixels that the library would decode with its own idea of transparency.
        # Of that column alone, because a row is decoded as a whole.
        self._rows = rows.select_columns([image]).cast_column(image, datasets.Image(decode=False)).with_format(None)
        self._image = image
        found = Found([])
        for number, text in enumerate(rows.select_columns([prompt])):
            prompts = text[prompt] if isinstance(text[prompt], list) else [text[prompt]]
            captions = [one for one in prompts if isinstance(one, str) and one.strip()]
            if not captions:
                found.skipped.append((f"{number:08d}", f"no text in the column {prompt}"))
            for place, caption in enumerate(dict.fromkeys(captions)):
                name = f"{number:08d}#{place + 1}" if place else f"{number:08d}"
                found.samples.append(Sample(name, caption, self, str(number)))
        return found

    def read(self, location: str) -> bytes:
        try:
            value = self._rows[int(location)][self._image]
        except Exception as error:
            # Whatever its readers say of a damaged file.
            raise ImageError(f"cannot be read from its dataset ({type(error).__name__})") from None
        if not value or not (value.get("bytes") or value.get("path")):
            raise ImageError("no image in this row")
        data = value.get("bytes") or read_bytes(Path(value["path"]))
        if len(data) > MAX_BYTES:
            raise ImageError(f"image of {len(data) / 1e6:.0f} MB, more than {MAX_BYTES / 1e6:.0f} MB")
        return data

    def stamp(self, location: str) -> str:
        # The library's own digest of the data and of all that was done to it.
        value = self._rows[int(location)][self._image] or {}
        file = "" if value.get("bytes") or not value.get("path") else file_stamp(Path(value["path"]))
        return f"{self.root} {self.split} {self._rows._fingerprint} {location} {file}"

    def _load(self) -> datasets.Dataset:
        try:
            if Path(self.root, "state.json").is_file():
                return datasets.load_from_disk(self.root)
            if Path(self.root, "dataset_dict.json").is_file():
                return datasets.load_from_disk(self.root)[self.split]
            if not Path(self.root).is_dir():
                self._announce()
            return datasets.load_dataset(self.root, self.subset, split=self.split, revision=self.revision)
        except KeyError:
            raise ValueError(f"data.root={self.root}: no split {self.split}; choose another by data.split") from None
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise ValueError(
                f"data.root={self.root}: cannot be loaded ({' '.join(str(error).split())[:200]})"
            ) from None

    def _announce(self) -> None:
        info = datasets.load_dataset_builder(self.root, self.subset, revision=self.revision).info
        size = f"{info.download_size / 2**30:.2f} GiB" if info.download_size else "unknown size"
        print(
            f"{self.root}: a dataset of {size} is downloaded from the Hub, unless it is here already", file=sys.stderr
        )

    def _column(self, rows: Any, given: str | None, usual: tuple[str, ...], key: str) -> str:
        found = [name for name in ([given] if given else usual) if name in rows.column_names]
        if not found:
            raise ValueError(
                f"data.root={self.root}: no column {given or ' or '.join(usual)} among {', '.join(rows.column_names)}; "
                f"name it with data.{key}"
            )
        return found[0]
