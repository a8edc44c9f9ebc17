"""Prompts without images: every kind of list, each prompt once and in its place."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from img2prompt.data.prompt_files import PromptSource, read_prompt_files

PROMPTS = ["a red star", 'a "quoted" fish, by night', "line\u2028separator and 雪"]


def written(folder, name):
    path = folder / name
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress("\n".join(PROMPTS).encode()))
    elif name.endswith(".txt"):
        path.write_bytes(("\ufeff" + "\r\n".join(PROMPTS) + "\r\n").encode())
    elif name.endswith(("csv", "tsv")):
        tab = "\t" if name.endswith("tsv") else ","
        quoted = [prompt.replace('"', '""') for prompt in PROMPTS]
        path.write_text(f"id{tab}caption\n" + "".join(f'{i}{tab}"{one}"\n' for i, one in enumerate(quoted)))
    elif name.endswith(".jsonl"):
        path.write_text("".join(json.dumps({"id": 1, "text": one}, ensure_ascii=False) + "\n" for one in PROMPTS))
    elif name.endswith(".parquet"):
        pq.write_table(pa.table({"image_name": ["1", "2", "3"], "prompt": PROMPTS}), path)
    else:
        kinds = {
            "list.json": PROMPTS,
            "coco.json": {"images": [], "annotations": [{"image_id": 1, "caption": one} for one in PROMPTS]},
            "diffusiondb.json": {f"{i}.png": {"p": one, "se": 1} for i, one in enumerate(PROMPTS)},
        }
        path.write_text(json.dumps(kinds[name]))
    return path


NAMES = ("a.txt", "a.txt.gz", "a.csv", "a.tsv", "a.jsonl", "a.parquet", "list.json", "coco.json", "diffusiondb.json")


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_file_gives_its_prompts_in_their_order(name, tmp_path):
    assert read_prompt_files([written(tmp_path, name)]) == PROMPTS


def test_several_files_follow_one_another_and_a_column_is_taken_by_its_name(tmp_path):
    both = [written(tmp_path, "a.txt"), written(tmp_path, "a.csv")]
    assert read_prompt_files(both) == PROMPTS * 2
    (tmp_path / "b.csv").write_text("prompt,other\nx,y\n")
    assert read_prompt_files([tmp_path / "b.csv"]) == ["x"]
    assert read_prompt_files([tmp_path / "b.csv"], "other") == ["y"]


def test_empty_prompts_are_skipped_and_leave_their_number(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n  two \n")
    found = PromptSource(read_prompt_files([tmp_path / "a.txt"])).find()
    assert [(sample.id, sample.prompt) for sample in found.samples] == [("000000000", "one"), ("000000002", "two")]
    assert found.skipped == [("000000001", "empty")]
    with pytest.raises(ValueError, match="not made yet"):
        found.samples[0].source.read("")


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.txt", b"", "a.txt: no prompt in it"),
        ("a.txt", b" \n\n", "a.txt: no prompt in it"),
        ("a.txt", b"\xff\xfe\x00", "a.txt: cannot be read"),
        ("a.txt.gz", b"not gzip", "a.txt.gz: cannot be read"),
        ("a.csv", b"id,name\n1,x\n", "a.csv: no column prompt or caption or text or p, only id, name"),
        ("a.csv", b"", "a.csv: no prompt in it"),
        ("a.json", b"{", "a.json: cannot be read"),
        ("a.json", b"[1, 2]", "a.json: expected texts or rows, got 1"),
        ("a.json", b"[" * 100_000, "a.json: cannot be read"),
        ("a.jsonl", b'{"prompt": "x"}\n{', "a.jsonl: cannot be read"),
        ("a.jsonl", b'{"prompt": "x"}\n{"id": 1}', "a.jsonl: no column prompt"),
        ("a.parquet", b"PAR1", "a.parquet: cannot be read"),
        ("a.doc", b"x", "a.doc: the ending must be one of .txt, "),
    ],
)
def test_a_file_that_holds_no_prompts_is_told_in_a_sentence(name, content, sentence, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=sentence) as told:
        read_prompt_files([tmp_path / name])
    assert "\n" not in str(told.value)
    with pytest.raises(ValueError, match="words=.*none.txt: no such file"):
        read_prompt_files([tmp_path / "none.txt"], key="words")
    with pytest.raises(ValueError, match="prompts=.*none.txt: no such file"):
        read_prompt_files([tmp_path / "none.txt"])
