"""Shards of pictures: the same bytes by any number of workers, after any death, and never those of other settings."""

import hashlib
import io
import json
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from img2prompt.data.shards import Shards
from img2prompt.synthesis.pairs import Worker, pairs_of, seed_of, worker_of
from img2prompt.synthesis.procedural import Procedural
from img2prompt.synthesis.produce import is_blank, produce, work_of
from img2prompt.synthesis.store import FORMATS, PictureStore

PROMPTS = [f"a {colour} {thing}" for colour in ("red", "blue", "green") for thing in ("star", "house", "fish", "tree")]
SHARD, BATCH, ALONE = 5, 2, Worker()


class Stopped(BaseException):
    pass


def store_in(folder, image_format="webp", saved_px=None, shard_size=SHARD, **settings):
    settings = {**Procedural(16).settings, **settings}
    return PictureStore(folder, settings, {"img2prompt": "0"}, shard_size, image_format, saved_px, threads=2)


def make(store, pairs, worker=ALONE, generator=None, batch_size=BATCH):
    store.claim()
    work = work_of(store, pairs, worker)
    return produce(work, generator or Procedural(16), store, batch_size, lambda count: None), work


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def pairs():
    return pairs_of(PROMPTS, 2, 0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, pairs):
    folder = tmp_path_factory.mktemp("store") / "whole"
    failed, work = make(store_in(folder), pairs)
    assert not failed and work.count == 24 and len(work.missing) == 5
    return files(folder)


def test_a_store_is_a_source_of_training_with_every_pixel_and_prompt(tmp_path, pairs, whole):
    make(store_in(tmp_path), pairs)
    found = Shards(tmp_path).find()
    assert [sample.prompt for sample in found.samples] == [pair.prompt for pair in pairs] and not found.skipped
    drawn = Procedural(16).generate([pair.prompt for pair in pairs], [pair.seed for pair in pairs])
    for sample, picture in zip(found.samples, drawn, strict=True):
        read = Image.open(io.BytesIO(sample.source.read(sample.location)))
        assert read.format == "WEBP" and (np.asarray(read) == picture).all()


def test_the_manifest_says_what_each_picture_is(tmp_path, pairs):
    store = store_in(tmp_path, steps=20)
    make(store, pairs)
    rows = [row for shard in range(5) for row in store.rows(shard)]
    assert [row["key"] for row in rows] == [f"{number:09d}" for number in range(24)]
    for pair, row in zip(pairs, rows, strict=True):
        assert (row["prompt"], row["replica"], row["seed"]) == (pair.prompt, pair.replica, pair.seed)
        assert row["steps"] == 20 and row["model"] == "procedural" and row["versions"] == {"img2prompt": "0"}
        with tarfile.open(tmp_path / f"{int(row['key']) // SHARD:05d}.tar") as tar:
            data = tar.extractfile(f"{row['key']}.webp").read()
            assert json.loads(tar.extractfile(f"{row['key']}.json").read()) == row
        assert hashlib.sha256(data).hexdigest() == row["sha256"]


@pytest.mark.parametrize("count", [2, 3, 7])
def test_any_number_of_workers_in_any_order_make_the_same_bytes(count, tmp_path, pairs, whole):
    for number in reversed(range(count)):
        # Each on a machine of its own.
        make(store_in(tmp_path / str(number)), pairs, Worker(number, count))
    merged = {}
    for number in range(count):
        own = files(tmp_path / str(number))
        assert not (set(own) & set(merged)) - {"synthesis.json"}
        merged |= own
    assert merged == whole


def test_workers_may_share_a_folder_and_one_without_a_shard_does_nothing(tmp_path, pairs, whole):
    for number in range(7):
        _, work = make(store_in(tmp_path), pairs, Worker(number, 7))
        assert bool(work.count) == (number < 5)
    assert files(tmp_path) == whole


@pytest.mark.parametrize("batch", [1, 2, 6, 12])
def test_after_a_death_in_any_batch_the_same_bytes_come_and_no_whole_shard_is_made_again(batch, tmp_path, pairs, whole):
    calls = []

    class Mortal(Procedural):
        def generate(self, prompts, seeds, precise=False):
            calls.append(prompts)
            if len(calls) == batch:
                raise Stopped
            return super().generate(prompts, seeds)

    with pytest.raises(Stopped):
        make(store_in(tmp_path), pairs, generator=Mortal(16))
    done = (batch - 1) // 3  # batches of two in shards of five
    assert {name: data for name, data in files(tmp_path).items() if name.endswith(".tar")} == {
        f"{shard:05d}.tar": whole[f"{shard:05d}.tar"] for shard in range(done)
    }
    (tmp_path / f".{done:05d}.tar.killed.tmp").write_bytes(b"what a killed process leaves")
    _, work = make(store_in(tmp_path), pairs)
    assert sorted(work.missing) == list(range(done, 5)) and work.there == min(24, done * SHARD)
    assert files(tmp_path) == whole


def test_a_manifest_without_its_shard_is_made_again_and_more_prompts_leave_the_others(tmp_path, pairs, whole):
    make(store_in(tmp_path), pairs[:12])
    first = files(tmp_path)
    (tmp_path / "00001.tar").unlink()
    _, work = make(store_in(tmp_path), pairs)
    # The third shard had two of its five.
    assert sorted(work.missing) == [1, 2, 3, 4] and files(tmp_path) == whole
    assert first["00000.tar"] == whole["00000.tar"] and first["00002.tar"] != whole["00002.tar"]
    # Fewer are there as well.
    assert make(store_in(tmp_path), pairs[:12])[1].count == 0 and files(tmp_path) == whole


def test_another_batch_size_draws_the_same(tmp_path, pairs, whole):
    make(store_in(tmp_path), pairs, batch_size=16)
    assert files(tmp_path) == whole


def test_batches_of_a_shard_are_of_one_size(tmp_path, pairs):
    sizes = []

    class Counting(Procedural):
        def generate(self, prompts, seeds, precise=False):
            sizes.append(len(prompts))
            return super().generate(prompts, seeds)

    make(store_in(tmp_path), pairs[:7], generator=Counting(16))
    # A second batch of another size would be compiled anew; a shard smaller than a batch is one.
    assert sizes == [2, 2, 2, 2]


def test_other_settings_and_other_prompts_are_refused_with_the_difference(tmp_path, pairs):
    make(store_in(tmp_path, steps=20, seed_base=0), pairs)
    before = files(tmp_path)
    with pytest.raises(
        ValueError, match=r"made with other settings \(steps: 20 there, 30 now; .*shard_size: 5 there, 4"
    ):
        make(store_in(tmp_path, steps=30, seed_base=0, shard_size=4), pairs)
    others = pairs_of([*PROMPTS[:4], "a yellow car", *PROMPTS[5:]], 2, 0)
    told = "number 8 is 'a blue star', replica 0, there and 'a yellow car', replica 0, now"
    with pytest.raises(ValueError, match=f"was made of other prompts: {told}"):
        make(store_in(tmp_path, steps=20, seed_base=0), others)
    (tmp_path / "synthesis.json").write_text("[")
    with pytest.raises(ValueError, match="synthesis.json: damaged"):
        make(store_in(tmp_path, steps=20, seed_base=0), pairs)
    (tmp_path / "synthesis.json").unlink()
    with pytest.raises(ValueError, match="it holds 0000.*tar and no synthesis.json; choose another"):
        make(store_in(tmp_path, steps=20, seed_base=0), pairs)
    del before["synthesis.json"]
    assert files(tmp_path) == before


def test_a_damaged_manifest_is_named(tmp_path, pairs):
    make(store_in(tmp_path), pairs)
    for content in ("{", '{"key": 1}\n', "[]\n", "\xff\xfe"):
        (tmp_path / "00002.jsonl").write_text(content, encoding="latin-1")
        with pytest.raises(ValueError, match="00002.jsonl: damaged; remove it"):
            make(store_in(tmp_path), pairs)


def test_two_processes_do_not_make_one_shard(tmp_path, pairs):
    store = store_in(tmp_path)
    with store.writing(0):
        with pytest.raises(ValueError, match="00000.tar: another process is making this shard"):
            with store_in(tmp_path).writing(0):
                pass


class Failing(Procedural):
    """Black for one prompt, gray for another, and for a third only where it is not precise."""

    def __init__(self, image_size_px):
        super().__init__(image_size_px)
        self.precise = []

    def generate(self, prompts, seeds, precise=False):
        pictures = super().generate(prompts, seeds)
        self.precise += list(prompts) if precise else []
        for picture, prompt in zip(pictures, prompts, strict=True):
            if prompt == "a red house":
                picture[:] = 0
            if prompt == "a red fish":
                picture[:] = 128
            if prompt == "a red tree" and not precise:
                picture[:] = 0
        return pictures


def test_blank_pictures_are_made_once_more_and_then_put_in_quarantine(tmp_path, pairs, whole):
    store, generator = store_in(tmp_path), Failing(16)
    failed, _ = make(store, pairs, generator=generator)
    assert [pair.prompt for pair in failed] == ["a red house"] * 2 + ["a red fish"] * 2
    assert sorted(generator.precise) == sorted(["a red house", "a red fish", "a red tree"] * 2)
    rows = {row["key"]: row for shard in range(5) for row in store.rows(shard)}
    reasons = {key: row["quarantined"] for key, row in rows.items() if "quarantined" in row}
    assert reasons == {
        "000000002": "black",
        "000000003": "black",
        "000000004": "of one colour",
        "000000005": "of one colour",
    }
    # The others have the keys and bytes that they always have.
    found = {sample.id: sample.source.read(sample.location) for sample in Shards(tmp_path).find().samples}
    assert set(found) == set(rows) - set(reasons) and rows["000000002"]["prompt"] == "a red house"
    again = tmp_path / "again"
    make(store_in(again), pairs)
    usual = {sample.id: sample.source.read(sample.location) for sample in Shards(again).find().samples}
    assert found == {key: data for key, data in usual.items() if key in found}
    # What is in quarantine is not tried again by the next run.
    assert make(store_in(tmp_path), pairs)[1].count == 0


def test_a_picture_is_blank_when_it_shows_nothing():
    gray, drawn = np.full((8, 8, 3), 90, np.uint8), np.full((8, 8, 3), 90, np.uint8)
    drawn[2, 2] = 140
    # Red everywhere is of one colour too, though its channels differ.
    red = np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 255
    assert is_blank(gray) and is_blank(gray * 0) and is_blank(red) and not is_blank(drawn)


@pytest.mark.parametrize("image_format", FORMATS)
def test_formats_and_sizes_are_what_is_asked_for(image_format, tmp_path, pairs):
    make(store_in(tmp_path, image_format, saved_px=8), pairs[:3])
    with tarfile.open(tmp_path / "00000.tar") as tar:
        assert tar.getnames()[:3] == [f"000000000.{image_format}", "000000000.txt", "000000000.json"]
        picture = Image.open(tar.extractfile(f"000000000.{image_format}"))
        assert picture.size == (8, 8) and picture.format == {"webp": "WEBP", "png": "PNG", "jpg": "JPEG"}[image_format]
        assert all((member.mtime, member.uid, member.uname) == (0, 0, "") for member in tar)


def test_prompts_come_back_as_they_were_whatever_they_hold(tmp_path):
    odd = ["a red star, \u2028 and\u0085 more", 'a "quoted" {fish}', "ein Häuschen 🏠 in 雪", "tab\tand comma, tree"]
    make(store_in(tmp_path), pairs_of(odd, 1, 0))
    assert [row["prompt"] for row in store_in(tmp_path).rows(0)] == odd
    assert [sample.prompt for sample in Shards(tmp_path).find().samples] == odd
    assert make(store_in(tmp_path), pairs_of(odd, 1, 0))[1].count == 0


def test_seeds_hang_on_prompt_replica_and_base_seed_alone():
    seeds = {seed_of(prompt, replica, base) for prompt in PROMPTS for replica in range(4) for base in range(3)}
    assert len(seeds) == len(PROMPTS) * 12 and all(0 <= seed < 2**63 for seed in seeds)
    # Written down: another number would be another image for everybody's prompts.
    assert seed_of("a red star", 0, 0) == 1531175144834749678
    assert [pair.seed for pair in pairs_of(PROMPTS, 2, 0)][::2] == [pair.seed for pair in pairs_of(PROMPTS, 1, 0)]


def test_workers_are_named_by_hand_or_by_what_starts_them():
    assert worker_of(None, {}) == Worker(0, 1)
    assert worker_of("2/5", {"RANK": "0", "WORLD_SIZE": "2"}) == Worker(2, 5)
    assert worker_of(None, {"RANK": "1", "WORLD_SIZE": "4", "SLURM_PROCID": "0", "SLURM_NTASKS": "9"}) == Worker(1, 4)
    assert worker_of(None, {"SLURM_PROCID": "3", "SLURM_NTASKS": "9"}) == Worker(3, 9)
    for text in ("5/5", "1", "a/b", "-1/2", "0/0"):
        with pytest.raises(ValueError, match=f"shard={text}: must be i/n"):
            worker_of(text, {})


def test_shards_of_all_workers_are_each_made_once():
    for count in (1, 2, 3, 8):
        made = [shard for number in range(count) for shard in Worker(number, count).shards(10)]
        assert sorted(made) == list(range(10))


def test_a_folder_can_be_moved_and_gone_on_with(tmp_path, pairs, whole):
    make(store_in(tmp_path / "here"), pairs[:10])
    shutil.move(tmp_path / "here", tmp_path / "there")
    make(store_in(tmp_path / "there"), pairs)
    assert files(tmp_path / "there") == whole
