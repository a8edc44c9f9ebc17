"""Archives: members are read in memory, hostile ones are refused, and each image keeps its own prompt."""

import io
import json
import stat
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from img2prompt.data.archive import ZipMembers
from img2prompt.data.decoding import ImageError
from img2prompt.data.diffusiondb import DiffusionDB
from img2prompt.data.images import decode
from img2prompt.data.shards import Shards


def picture(number):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (number % 256, number // 256, 7)).save(file, "PNG")
    return file.getvalue()


def number_of(data):
    red, green, _ = decode(data)[:, 0, 0].tolist()
    return red + 256 * green


def write_part(root, part, numbers, prompts=True, folder=False):
    table = {f"{number}.png": {"p": f"prompt {number}", "se": 1} for number in numbers}
    if folder:
        (root / part).mkdir(parents=True)
        for number in numbers:
            (root / part / f"{number}.png").write_bytes(picture(number))
        (root / part / f"{part}.json").write_text(json.dumps(table))
        return
    root.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(root / f"{part}.zip", "w") as archive:
        for number in numbers:
            archive.writestr(f"{number}.png", picture(number))
        if prompts:
            archive.writestr(f"{part}.json", json.dumps(table))


def test_three_hundred_images_from_archives_have_each_their_own_prompt(tmp_path):
    write_part(tmp_path, "part-000001", range(100))
    write_part(tmp_path / "more", "part-000002", range(100, 200))
    write_part(tmp_path, "part-000003", range(200, 300), folder=True)
    found = DiffusionDB(tmp_path).find()
    assert len(found.samples) == 300 and not found.skipped
    with ThreadPoolExecutor(8) as pool:
        numbers = list(pool.map(lambda sample: number_of(sample.source.read(sample.location)), found.samples))
    assert [sample.prompt for sample in found.samples] == [f"prompt {number}" for number in numbers]
    assert sorted(numbers) == list(range(300))


def test_prompts_come_from_the_table_where_a_part_has_none(tmp_path):
    write_part(tmp_path, "part-000001", range(5), prompts=False)
    names = ["0.png", "1.png", "2.png", "elsewhere.png"]
    table = {"image_name": names, "prompt": [f"from the table {name}" for name in names], "seed": [1] * 4}
    pq.write_table(pa.table(table), tmp_path / "metadata.parquet")
    found = DiffusionDB(tmp_path).find()
    assert {sample.id: sample.prompt for sample in found.samples} == {
        str(number): f"from the table {number}.png" for number in range(3)
    }
    assert {name for name, _ in found.skipped} == {"3.png", "4.png"}


def test_images_of_one_name_in_two_parts_are_skipped(tmp_path):
    write_part(tmp_path, "part-000001", [1, 2])
    write_part(tmp_path, "part-000002", [2, 3])
    found = DiffusionDB(tmp_path).find()
    assert [sample.id for sample in found.samples] == ["1", "3"]
    assert found.skipped == [("2.png", "several images of this name")]


def test_an_empty_folder_and_a_foreign_table_are_errors(tmp_path):
    with pytest.raises(ValueError, match="no part-.*.zip and no folder"):
        DiffusionDB(tmp_path).find()
    with zipfile.ZipFile(tmp_path / "part-000001.zip", "w") as archive:
        archive.writestr("part-000001.json", "[1, 2]")
    with pytest.raises(ValueError, match="is not DiffusionDB's table of prompts"):
        DiffusionDB(tmp_path).find()
    (tmp_path / "part-000001.zip").write_bytes(b"PK but no archive")
    with pytest.raises(ValueError, match="cannot be read as a zip archive"):
        DiffusionDB(tmp_path).find()


def test_hostile_members_are_refused_with_their_reason(tmp_path):
    link = zipfile.ZipInfo("link.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("../up.png", "/root.png", "..\\back.png", "C:/drive.png"):
            archive.writestr(name, b"x")
        archive.writestr(link, "/etc/passwd")
        archive.writestr("bomb.png", b"0" * 10_000_000)
        archive.writestr("good.png", picture(1))
        archive.writestr("good2.png", picture(2))
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("good.png", picture(3))
    members = ZipMembers(tmp_path / "a.zip")
    assert members.names == ["good2.png"] and number_of(members.read("good2.png")) == 2
    reasons = {name: reason for name, reason in members.refused}
    assert reasons["bomb.png"] == "expands more than 200 times" and reasons["link.png"] == "not a regular file"
    assert reasons["good.png"] == "comes twice" and len(reasons) == 7
    assert {reasons[name] for name in reasons if "png" in name and name[0] in "./C"} == {
        "a name that leaves its archive"
    }


@given(st.integers(0, 10**6), st.integers(1, 255))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_flipped_byte_gives_the_right_image_or_an_error_of_ours(tmp_path, place, change):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(3):
            archive.writestr(f"{number}.png", picture(number))
    data = bytearray(file.getvalue())
    data[place % len(data)] ^= change
    (tmp_path / "a.zip").write_bytes(data)
    try:
        members = ZipMembers(tmp_path / "a.zip")
    except ValueError:
        return
    for name in members.names:
        try:
            data = members.read(name)
        except ImageError:
            continue
        # The archive's checksum covers a member's bytes; a damaged name is another name.
        assert number_of(data) in range(3) and (
            name not in ("0.png", "1.png", "2.png") or name == f"{number_of(data)}.png"
        )


def write_tar(path, files, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as archive:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def test_three_hundred_images_from_shards_have_each_their_own_prompt(tmp_path):
    for shard in range(3):
        files = []
        for number in range(100 * shard, 100 * shard + 100):
            texts = [("txt", f"prompt {number}".encode()), ("json", json.dumps({"caption": "another"}).encode())]
            files.append((f"{number:09d}.png", picture(number)))
            files += (
                [(f"{number:09d}.{ending}", text) for ending, text in texts[number % 2 :]]
                if number % 2 == 0
                else [(f"{number:09d}.json", json.dumps({"caption": f"prompt {number}", "status": "success"}).encode())]
            )
        write_tar(tmp_path / f"{shard:05d}.tar", files)
    found = Shards(tmp_path).find()
    assert len(found.samples) == 300 and not found.skipped
    with ThreadPoolExecutor(8) as pool:
        numbers = list(pool.map(lambda sample: number_of(sample.source.read(sample.location)), found.samples))
    assert [sample.prompt for sample in found.samples] == [f"prompt {number}" for number in numbers]
    assert numbers == list(range(300)) and found.samples[7].id == "000000007"


def test_remote_shards_are_read_as_local_ones(tmp_path):
    import fsspec

    write_tar(tmp_path / "00000.tar", [("1.png", picture(1)), ("1.txt", b"one")])
    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/00000.tar", (tmp_path / "00000.tar").read_bytes())
    for root in ("memory://bucket", "memory://bucket/00000.tar", "memory://bucket/*.tar"):
        (sample,) = Shards(root).find().samples
        assert sample.prompt == "one" and number_of(sample.source.read(sample.location)) == 1
    with pytest.raises(ValueError, match="data.root=nowhere://x: Protocol not known"):
        Shards("nowhere://x")


def test_what_is_no_pair_in_a_shard_is_skipped_with_its_reason(tmp_path):
    files = [
        ("a.png", picture(1)),
        ("a.txt", b"good"),
        ("b.png", picture(2)),
        ("c.txt", b"no picture"),
        ("d.png", picture(3)),
        ("d.jpg", picture(4)),
        ("d.txt", b"two pictures"),
        ("e.png", picture(5)),
        ("e.json", b"{damaged"),
        ("../f.png", picture(6)),
        ("g.png", picture(7)),
        ("g.png", picture(8)),
        ("g.txt", b"twice"),
    ]
    write_tar(tmp_path / "0.tar", files)
    found = Shards(tmp_path).find()
    assert [(sample.id, sample.prompt) for sample in found.samples] == [("a", "good")]
    reasons = {name.rpartition("/")[2]: reason for name, reason in found.skipped}
    assert reasons["b"] == "no .txt, nor a caption in its .json" and reasons["c"] == "no image"
    assert reasons["d"] == "several images of this key" and reasons["e"] == "its .json is damaged"
    assert reasons["f.png"] == "a name that leaves its archive" and reasons["g.png"] == "comes twice"
    write_tar(tmp_path / "1.tar", files[:2])
    assert [reason for name, reason in Shards(tmp_path).find().skipped if name == "a"] == ["several images of this key"]


def test_links_in_a_shard_are_refused_and_a_shard_that_is_none_is_named(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        info = tarfile.TarInfo("a.png")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(info)
    assert [reason for _, reason in Shards(tmp_path).find().skipped] == ["not a regular file"]
    (tmp_path / "0.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(ValueError, match="0.tar: cannot be read as an uncompressed tar"):
        Shards(tmp_path).find()
    (tmp_path / "0.tar").unlink()
    with pytest.raises(ValueError, match="no .tar file there"):
        Shards(tmp_path).find()


@given(st.integers(0, 10**6), st.integers(1, 255))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_flipped_byte_in_a_shard_raises_nothing_but_our_own_errors(tmp_path, place, change):
    write_tar(tmp_path / "0.tar", [(f"{n}.{e}", d) for n in range(2) for e, d in (("png", picture(n)), ("txt", b"p"))])
    data = bytearray((tmp_path / "0.tar").read_bytes())
    data[place % len(data)] ^= change
    (tmp_path / "0.tar").write_bytes(data)
    try:
        found = Shards(tmp_path).find()
        for sample in found.samples:
            decode(sample.source.read(sample.location))
    except ValueError:
        pass
