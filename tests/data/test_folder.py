"""Folders of images: which prompt is whose, from tables, text files and metadata, and what is left out by reason."""

import io
import json

import pytest
from PIL import Image
from test_metadata import A1111, NEGATIVE, PROMPT, WAYS, png

from img2prompt.data.folder import Folder


@pytest.fixture
def folder(tmp_path):
    def make(files):
        for name, content in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return tmp_path

    return make


def plain():
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    return file.getvalue()


def found(root, **options):
    return Folder(root, **options).find()


def prompts(root, **options):
    return {sample.id: sample.prompt for sample in found(root, **options).samples}


def test_three_hundred_images_in_bulk_have_each_their_own_prompt(folder):
    ways = list(WAYS)
    files = {}
    for number in range(300):
        way = WAYS[ways[number % len(ways)]]
        fields = {name: text.replace("red caf", f"red {number} caf") for name, text in way.items()}
        files[f"{number % 7}/image {number}.png"] = png(fields)
    samples = found(folder(files), threads=8).samples
    assert len(samples) == 300
    for sample in samples:
        number = sample.id.removeprefix("image ")
        assert f"a red {number} caf" in sample.prompt
        # What is read later is the file that the prompt was read from.
        assert sample.source.read(sample.location) == files[f"{int(number) % 7}/image {number}.png"]


def test_a_text_file_beside_an_image_goes_before_its_metadata_and_a_table_before_both(folder):
    own = png({"parameters": A1111})
    root = folder({"a.png": own, "b.png": own, "b.txt": "from the file", "c.png": own, "c.caption": "x"})
    assert prompts(root) == {"a": PROMPT, "b": "from the file", "c": "x"}
    folder({"metadata.csv": 'file_name,text\nc.png,"from, the table"\n'})
    assert prompts(root) == {"a": PROMPT, "b": "from the file", "c": "from, the table"}


def test_each_line_is_a_caption_and_parameters_are_one(folder):
    root = folder({"a.png": plain(), "a.txt": "one\n\ntwo\none\n", "b.png": plain(), "b.txt": A1111})
    assert prompts(root) == {"a": "one", "a#2": "two", "b": PROMPT}
    assert [sample.negative_prompt for sample in found(root).samples] == ["", "", NEGATIVE]


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("column", ["prompt", "text", "caption"])
def test_tables_of_every_form_are_read(form, column, folder, tmp_path):
    rows = [{"file_name": f"sub/{i}.png", column: f"number {i}", "other": i} for i in range(3)]
    folder({f"sub/{i}.png": plain() for i in range(3)})
    if form == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "metadata.parquet")
    elif form == "jsonl":
        folder({"metadata.jsonl": "".join(json.dumps(row) + "\n" for row in rows)})
    else:
        folder(
            {"metadata.csv": f"file_name,{column}\n" + "".join(f"{row['file_name']},{row[column]}\n" for row in rows)}
        )
    assert prompts(tmp_path) == {str(i): f"number {i}" for i in range(3)}


def test_what_has_no_prompt_is_an_error_or_skipped_with_its_reason(folder):
    files = {
        "a.png": png({"parameters": A1111}),
        "b.png": plain(),
        "c.png": png({"parameters": "words"}),
        "d.png": plain(),
        "d.txt": "one",
        "d.caption": "another",
        "e.png": plain(),
        "e.txt": " \n",
        "notes.md": "x",
    }
    root = folder(files)
    with pytest.raises(ValueError, match="4 of 5 images have no prompt .first: .*b.png.*data.on_missing=skip"):
        found(root)
    skipped = {path.rsplit("/", 1)[-1]: reason for path, reason in found(root, on_missing="skip").skipped}
    assert prompts(root, on_missing="skip") == {"a": PROMPT}
    assert set(skipped) == {"b.png", "c.png", "d.png", "e.png", "notes.md"}
    assert "without settings" in skipped["c.png"] and "different captions in d.txt and d.caption" in skipped["d.png"]
    assert "not an image by its name (.md)" in skipped["notes.md"]


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        ("file_name,text\n../secret.png,x\n", "refused, ../secret.png is outside"),
        ("file_name,text\n/etc/secret.png,x\n", "refused, /etc/secret.png is outside"),
        ("name,text\na.png,x\n", "expected the columns file_name and"),
        ('file_name,text\n"a.png,x\n', "cannot be read"),
    ],
)
def test_a_hostile_or_damaged_table_is_named(table, sentence, folder):
    with pytest.raises(ValueError, match=f"metadata.csv: .*{sentence}"):
        found(folder({"a.png": plain(), "metadata.csv": table}))


def test_equal_names_in_two_folders_keep_their_own_prompts(folder):
    root = folder({"x/1.png": plain(), "x/1.txt": "first", "y/1.png": plain(), "y/1.txt": "second"})
    assert prompts(root) == {"x/1.png": "first", "y/1.png": "second"}
