"""The layout of the Kaggle competition: `prompts.csv` (imgId,prompt) beside a folder `images/`."""

import csv
from pathlib import Path

from img2prompt.data.decoding import EXTENSIONS
from img2prompt.data.listing import file_stamp, read_bytes
from img2prompt.data.sample import Found, Sample

COLUMNS = ("imgId", "prompt")


class Kaggle:
    """Pairs of `root/prompts.csv`; the image of a row is `root/images/<imgId>` with any of our extensions."""

    name = "kaggle"

    def __init__(self, root: str | Path | None) -> None:
        if root is None:
            raise ValueError("data=kaggle needs data.root=FOLDER, a folder with prompts.csv and images/")
        self.root = Path(root)
        self.images: Path | None = self.root / "images"

    def find(self) -> Found:
        images = self.root / "images"
        if not images.is_dir():
            raise ValueError(f"{images}: no such folder; data=kaggle expects prompts.csv and images/ in data.root")
        files: dict[str, str] = {}
        twice: set[str] = set()
        for path in sorted(images.iterdir()):
            if path.suffix.lower() in EXTENSIONS:
                if path.stem in files:
                    twice.add(path.stem)
                files[path.stem] = path.name
        found = Found([])
        for image_id, prompt in read_prompts(self.root / "prompts.csv"):
            if image_id not in files:
                found.skipped.append((image_id, "no file in images/"))
            elif image_id in twice:
                # One of them would get a prompt that may not be its own.
                found.skipped.append((image_id, "several files of this name in images/"))
            elif not prompt.strip():
                found.skipped.append((image_id, "empty prompt"))
            else:
                found.samples.append(Sample(image_id, prompt, self, files[image_id]))
        return found

    def read(self, location: str) -> bytes:
        return read_bytes(self.root / "images" / location)

    def stamp(self, location: str) -> str:
        return file_stamp(self.root / "images" / location)


def read_prompts(path: Path | str) -> list[tuple[str, str]]:
    """(imgId, prompt) of each row of a CSV file with these two columns (RFC 4180 quotes; others are ignored).

    ValueError when the file or a column is missing, or when an id comes twice: one of its prompts would be wrong.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a CSV file with the columns {','.join(COLUMNS)}")
    rows: dict[str, str] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True, skipinitialspace=True)
            header = [name.strip() for name in reader.fieldnames or []]
            if not set(COLUMNS) <= set(header):
                raise ValueError(
                    f"{path}: expected the columns {','.join(COLUMNS)} in its first line, separated by commas, found "
                    f"{','.join(header) or 'nothing'}"
                )
            if len(set(header)) != len(header):
                raise ValueError(f"{path}: a column comes twice in {','.join(header)}; keep one of them")
            reader.fieldnames = header
            for row in reader:
                image_id, prompt = row["imgId"], row["prompt"]
                if image_id is None or prompt is None or None in row:
                    raise ValueError(
                        f"{path}, line {reader.line_num}: not as many fields as the header; "
                        "a prompt with commas needs quotes"
                    )
                if image_id in rows:
                    raise ValueError(f"{path}, line {reader.line_num}: imgId {image_id} comes twice; keep one of them")
                rows[image_id] = prompt
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a CSV file in UTF-8 ({error})") from None
    return list(rows.items())
