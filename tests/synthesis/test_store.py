"""Shards of pictures: the same bytes by any number of workers, after any death, and never those of other settings."""

import hashlib
import io
import json
import os
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from img2prompt.data.shards import Shards
from img2prompt.synthesis.pairs import Wanted, Worker, seed_of, worker_of
from img2prompt.synthesis.procedural import Procedural
from img2prompt.synthesis.produce import is_blank, produce, work_of
from img2prompt.synthesis.store import FORMATS, Made, PictureStore

PROMPTS = [f"a {colour} {thing}" for colour in ("red", "blue", "green") for thing in ("star", "house", "fish", "tree")]
SHARD, BATCH, ALONE = 5, 2, Worker()


class Stopped(BaseException):
    pass


def store_in(folder, image_format="webp", saved_px=None, shard_size=SHARD, **settings):
    settings = {**Procedural(16).settings, **settings}
    return PictureStore(folder, settings, {"img2prompt": "0"}, shard_size, image_format, saved_px, threads=2)


def make(store, wanted, worker=ALONE, generator=None, batch_size=BATCH):
    store.claim(wanted)
    work = work_of(store, wanted, worker.shards(-(-len(wanted) // store.shard_size)))
    return produce(work, generator or Procedural(16), store, batch_size, lambda count: None), work


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


WANTED = Wanted(PROMPTS, 2)
PAIRS = WANTED.pairs(0, 24)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store") / "whole"
    failed, work = make(store_in(folder), WANTED)
    assert not failed and work.count == 24 and len(work.missing) == 5
    return files(folder)


def test_a_store_is_a_source_of_training_with_every_pixel_and_prompt(tmp_path, whole):
    make(store_in(tmp_path), WANTED)
    found = Shards(tmp_path).find()
    assert [sample.prompt for sample in found.samples] == [pair.prompt for pair in PAIRS] and not found.skipped
    drawn = Procedural(16).generate([pair.prompt for pair in PAIRS], [pair.seed for pair in PAIRS])
    for sample, picture in zip(found.samples, drawn, strict=True):
        read = Image.open(io.BytesIO(sample.source.read(sample.location)))
        assert read.format == "WEBP" and (np.asarray(read) == picture).all()


def test_the_manifest_says_what_each_picture_is(tmp_path):
    store = store_in(tmp_path, steps=20)
    make(store, WANTED)
    rows = [row for shard in range(5) for row in store.rows(shard)]
    assert [row["key"] for row in rows] == [f"{number:09d}" for number in range(24)]
    for pair, row in zip(PAIRS, rows, strict=True):
        assert (row["prompt"], row["replica"], row["seed"]) == (pair.prompt, pair.replica, pair.seed)
        assert row["steps"] == 20 and row["model"] == "procedural" and row["versions"] == {"img2prompt": "0"}
        with tarfile.open(tmp_path / f"{int(row['key']) // SHARD:05d}.tar") as tar:
            data = tar.extractfile(f"{row['key']}.webp").read()
            assert json.loads(tar.extractfile(f"{row['key']}.json").read()) == row
        assert hashlib.sha256(data).hexdigest() == row["sha256"]


@pytest.mark.parametrize("count", [2, 3, 7])
def test_any_number_of_workers_in_any_order_make_the_same_bytes(count, tmp_path, whole):
    for number in reversed(range(count)):
        # Each on a machine of its own.
        make(store_in(tmp_path / str(number)), WANTED, Worker(number, count))
    merged = {}
    for number in range(count):
        own = files(tmp_path / str(number))
        assert not (set(own) & set(merged)) - {"synthesis.json", "prompts.jsonl"}
        merged |= own
    assert merged == whole


def test_workers_may_share_a_folder_and_one_without_a_shard_does_nothing(tmp_path, whole):
    for number in range(7):
        _, work = make(store_in(tmp_path), WANTED, Worker(number, 7))
        assert bool(work.count) == (number < 5)
    assert files(tmp_path) == whole


@pytest.mark.parametrize("batch", [1, 2, 6, 12])
def test_after_a_death_in_any_batch_the_same_bytes_come_and_no_whole_shard_is_made_again(batch, tmp_path, whole):
    calls = []

    class Mortal(Procedural):
        def generate(self, prompts, seeds, precise=False):
            calls.append(prompts)
            if len(calls) == batch:
                raise Stopped
            return super().generate(prompts, seeds)

    with pytest.raises(Stopped):
        make(store_in(tmp_path), WANTED, generator=Mortal(16))
    done = (batch - 1) // 3  # batches of two in shards of five
    assert {name: data for name, data in files(tmp_path).items() if name.endswith(".tar")} == {
        f"{shard:05d}.tar": whole[f"{shard:05d}.tar"] for shard in range(done)
    }
    (tmp_path / f".{done:05d}.tar.killed.tmp").write_bytes(b"what a killed process leaves")
    _, work = make(store_in(tmp_path), WANTED)
    assert sorted(work.missing) == list(range(done, 5)) and work.there == min(24, done * SHARD)
    assert files(tmp_path) == whole


FEWER = Wanted(PROMPTS[:6], 2)


def test_a_manifest_without_its_shard_is_made_again_and_more_prompts_leave_the_others(tmp_path, whole):
    make(store_in(tmp_path), FEWER)
    first = files(tmp_path)
    (tmp_path / "00001.tar").unlink()
    _, work = make(store_in(tmp_path), WANTED)
    # The third shard had two of its five.
    assert sorted(work.missing) == [1, 2, 3, 4] and files(tmp_path) == whole
    assert first["00000.tar"] == whole["00000.tar"] and first["00002.tar"] != whole["00002.tar"]
    # Fewer are there as well; but where prompts were left out, what was made of them must not stay unseen.
    assert make(store_in(tmp_path), Wanted(PROMPTS, 2, count=12))[1].count == 0 and files(tmp_path) == whole
    with pytest.raises(ValueError, match="holds 6 prompts more than are wanted now; choose another folder"):
        make(store_in(tmp_path), FEWER)


@pytest.mark.parametrize("name", ["00002.tar", "00002.jsonl"])
def test_a_death_while_a_shard_grows_leaves_none_that_lacks_pictures(name, tmp_path, whole, monkeypatch):
    make(store_in(tmp_path), FEWER)
    replace = os.replace

    def dying(source, goal):
        if os.path.basename(goal) == name:
            raise Stopped
        replace(source, goal)

    monkeypatch.setattr(os, "replace", dying)
    with pytest.raises(Stopped):
        make(store_in(tmp_path), WANTED)
    monkeypatch.undo()
    make(store_in(tmp_path), WANTED)
    assert files(tmp_path) == whole


@pytest.mark.parametrize("part", [0, 100, 1024, 10240, -1024, -1])
def test_a_shard_whose_copy_was_cut_short_is_made_again(part, tmp_path, whole):
    written(tmp_path / "copy", whole | {"00003.tar": whole["00003.tar"][:part]})
    _, work = make(store_in(tmp_path / "copy"), WANTED)
    assert sorted(work.missing) == [3] and files(tmp_path / "copy") == whole


def test_pairs_of_a_synthesis_that_are_gone_are_not_trained_without(tmp_path):
    store = store_in(tmp_path)
    make(store, WANTED)
    assert len(Made(store, 12).find().samples) == 12
    (tmp_path / "00001.tar").unlink()
    with pytest.raises(ValueError, match="7 of 12 made pairs are there; the others have gone, or other workers"):
        Made(store, 12).find()


def test_another_batch_size_draws_the_same(tmp_path, whole):
    make(store_in(tmp_path / "one"), WANTED, batch_size=16)
    # It is said beside each picture, for on a GPU it is not all the same; a shard has five.
    assert {row["batch_size"] for row in store_in(tmp_path / "one").rows(0)} == {5}
    one, two = (Shards(folder).find().samples for folder in (tmp_path / "one", written(tmp_path / "two", whole)))
    assert [a.source.read(a.location) for a in one] == [b.source.read(b.location) for b in two]


def written(folder, files):
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def test_batches_of_a_shard_are_of_one_size(tmp_path):
    sizes = []

    class Counting(Procedural):
        def generate(self, prompts, seeds, precise=False):
            sizes.append(len(prompts))
            return super().generate(prompts, seeds)

    make(store_in(tmp_path), Wanted(PROMPTS, 2, count=7), generator=Counting(16))
    # A second batch of another size would be compiled anew; a shard smaller than a batch is one.
    assert sizes == [2, 2, 2, 2]


def test_other_settings_and_other_prompts_are_refused_with_the_difference(tmp_path):
    make(store_in(tmp_path, steps=20), WANTED)
    before = files(tmp_path)
    with pytest.raises(
        ValueError, match=r"made with other settings \(steps: 20 there, 30 now; .*shard_size: 5 there, 4"
    ):
        make(store_in(tmp_path, steps=30, shard_size=4), WANTED)
    for changed, told in (
        (Wanted(PROMPTS, 3), "replicas: 2 there, 3"),
        (Wanted(PROMPTS, 2, 7), "base_seed: 0 there, 7"),
    ):
        with pytest.raises(ValueError, match=told):
            make(store_in(tmp_path, steps=20), changed)
    others = Wanted([*PROMPTS[:4], "a yellow car", *PROMPTS[5:]], 2)
    for worker in (ALONE, Worker(0, 5)):
        # Also where it is not in this worker's part.
        with pytest.raises(
            ValueError, match="made of other prompts: number 4 is 'a blue star' there and 'a yellow car'"
        ):
            make(store_in(tmp_path, steps=20), others, worker)
    (tmp_path / "synthesis.json").write_text("[")
    with pytest.raises(ValueError, match="synthesis.json: damaged"):
        make(store_in(tmp_path, steps=20), WANTED)
    (tmp_path / "synthesis.json").unlink()
    with pytest.raises(ValueError, match="it holds 00000.tar and no synthesis.json; choose another"):
        store_in(tmp_path, steps=20).check(WANTED)
    del before["synthesis.json"]
    assert files(tmp_path) == before


def test_a_shard_of_other_prompts_that_was_put_there_is_refused(tmp_path):
    make(store_in(tmp_path / "one"), WANTED)
    make(store_in(tmp_path / "two"), Wanted(PROMPTS[::-1], 2))
    for kind in ("tar", "jsonl"):
        shutil.copy(tmp_path / "two" / f"00001.{kind}", tmp_path / "one")
    with pytest.raises(
        ValueError, match="00001.tar: made of other prompts: 'a green [a-z]+', .* is wanted; take it away"
    ):
        make(store_in(tmp_path / "one"), WANTED)


def test_a_shard_of_other_settings_that_was_put_there_is_refused(tmp_path):
    make(store_in(tmp_path / "one", steps=20, guidance=[3.0, 9.0]), WANTED)
    make(store_in(tmp_path / "two", steps=30, guidance=[3.0, 9.0]), WANTED)
    for kind in ("tar", "jsonl"):
        shutil.copy(tmp_path / "two" / f"00001.{kind}", tmp_path / "one")
    with pytest.raises(ValueError, match="00001.tar: made with other settings .steps: 30 there, 20 now.; take it away"):
        make(store_in(tmp_path / "one", steps=20, guidance=[3.0, 9.0]), WANTED)


def test_what_is_known_only_of_loaded_weights_is_compared_when_it_is_known(tmp_path):
    make(store_in(tmp_path, weights="commit 1"), WANTED)
    assert make(store_in(tmp_path, weights=None), WANTED)[1].count == 0
    with pytest.raises(ValueError, match="weights: commit 1 there, commit 2 now"):
        make(store_in(tmp_path, weights="commit 2"), WANTED)


def test_of_two_that_begin_together_with_other_settings_one_is_refused(tmp_path, monkeypatch):
    first, second = store_in(tmp_path, steps=20), store_in(tmp_path, steps=30)
    check = PictureStore.check

    def late(self, wanted):
        # The second begins before the first looks at what it has written.
        monkeypatch.setattr(PictureStore, "check", check)
        with pytest.raises(ValueError, match="steps: 20 there, 30 now"):
            second.claim(WANTED)
        check(self, wanted)

    monkeypatch.setattr(PictureStore, "check", late)
    first.claim(WANTED)
    first.check(WANTED)


def test_a_damaged_manifest_is_named(tmp_path):
    make(store_in(tmp_path), WANTED)
    for content in ("{", '{"key": 1}\n', "[]\n", "\xff\xfe"):
        (tmp_path / "00002.jsonl").write_text(content, encoding="latin-1")
        with pytest.raises(ValueError, match="00002.jsonl: damaged; remove it"):
            make(store_in(tmp_path), WANTED)


def test_two_processes_do_not_make_one_shard(tmp_path):
    store = store_in(tmp_path)
    with store.writing(0, PAIRS[:SHARD]):
        with pytest.raises(ValueError, match="00000.tar: another process is making this shard"):
            with store_in(tmp_path).writing(0, PAIRS[:SHARD]):
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


def test_blank_pictures_are_made_once_more_and_then_put_in_quarantine(tmp_path, whole):
    store, generator = store_in(tmp_path), Failing(16)
    failed, _ = make(store, WANTED, generator=generator)
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
    make(store_in(again), WANTED)
    usual = {sample.id: sample.source.read(sample.location) for sample in Shards(again).find().samples}
    assert found == {key: data for key, data in usual.items() if key in found}
    # What is in quarantine is not tried again by the next run.
    assert make(store_in(tmp_path), WANTED)[1].count == 0


def test_a_picture_is_blank_when_it_shows_nothing():
    gray, drawn = np.full((8, 8, 3), 90, np.uint8), np.full((8, 8, 3), 90, np.uint8)
    drawn[2, 2] = 140
    # Red everywhere is of one colour too, though its channels differ.
    red = np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 255
    assert is_blank(gray) and is_blank(gray * 0) and is_blank(red) and not is_blank(drawn)


@pytest.mark.parametrize("image_format", FORMATS)
def test_formats_and_sizes_are_what_is_asked_for(image_format, tmp_path):
    make(store_in(tmp_path, image_format, saved_px=8), Wanted(PROMPTS, 2, count=3))
    with tarfile.open(tmp_path / "00000.tar") as tar:
        assert tar.getnames()[:3] == [f"000000000.{image_format}", "000000000.txt", "000000000.json"]
        picture = Image.open(tar.extractfile(f"000000000.{image_format}"))
        assert picture.size == (8, 8) and picture.format == {"webp": "WEBP", "png": "PNG", "jpg": "JPEG"}[image_format]
        assert all((member.mtime, member.uid, member.uname) == (0, 0, "") for member in tar)


def test_prompts_come_back_as_they_were_whatever_they_hold(tmp_path):
    odd = ["a red star, \u2028 and\u0085 more", 'a "quoted" {fish}', "ein Häuschen 🏠 in 雪", "tab\tand comma, tree"]
    make(store_in(tmp_path), Wanted(odd))
    assert [row["prompt"] for row in store_in(tmp_path).rows(0)] == odd
    assert [sample.prompt for sample in Shards(tmp_path).find().samples] == odd
    assert make(store_in(tmp_path), Wanted(odd))[1].count == 0


def test_seeds_hang_on_prompt_replica_and_base_seed_alone():
    seeds = {seed_of(prompt, replica, base) for prompt in PROMPTS for replica in range(4) for base in range(3)}
    assert len(seeds) == len(PROMPTS) * 12 and all(0 <= seed < 2**63 for seed in seeds)
    # Written down: another number would be another image for everybody's prompts.
    assert seed_of("a red star", 0, 0) == 1531175144834749678
    assert WANTED.pairs(0, 24)[::2] == Wanted(PROMPTS).pairs(0, 99)


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


def test_a_folder_can_be_moved_and_gone_on_with(tmp_path, whole):
    make(store_in(tmp_path / "here"), Wanted(PROMPTS[:5], 2))
    shutil.move(tmp_path / "here", tmp_path / "there")
    make(store_in(tmp_path / "there"), WANTED)
    assert files(tmp_path / "there") == whole
