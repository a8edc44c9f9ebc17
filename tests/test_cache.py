"""The store: what it gives is what was put in, whatever happened to the process or the disk in between."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from img2prompt.cache import Store, cache_folder, check_free, key_of

SHAPE = (3, 5)


def store(folder):
    return Store(folder, SHAPE, np.float32, {"what": "rows"})


def row(number):
    return np.full(SHAPE, number, dtype=np.float32)


def put(where, numbers):
    where.add([key_of(number) for number in numbers], np.stack([row(number) for number in numbers]))


@given(st.lists(st.lists(st.integers(0, 500), min_size=1, max_size=40), min_size=1, max_size=6), st.booleans())
@settings(deadline=None, max_examples=40)
def test_rows_come_back_by_their_keys_now_and_later(tmp_path_factory, batches, again):
    folder = tmp_path_factory.mktemp("store")
    where = store(folder)
    for batch in batches:
        put(where, batch)
    there = sorted({number for batch in batches for number in batch})
    where = store(folder) if again else where
    places = where.places([key_of(number) for number in [*there, 1000]])
    assert places[-1] == -1 and (places[:-1] >= 0).all()
    assert np.array_equal(where.read(places[:-1]), np.stack([row(number) for number in there]))


def test_keys_know_their_parts():
    keys = [
        key_of("ab", "c"),
        key_of("a", "bc"),
        key_of("abc"),
        key_of("abc", ""),
        key_of("\ud800"),
        key_of(1),
        key_of(2),
    ]
    assert len(set(keys)) == 7 and {len(key) for key in keys} == {16} and key_of(1) == key_of("1")


def test_two_writers_share_a_store(tmp_path):
    one, other = store(tmp_path), store(tmp_path)
    put(one, [1, 2])
    put(other, [2, 3])
    both = store(tmp_path)
    assert (both.places([key_of(n) for n in (1, 2, 3)]) >= 0).all() and len(both) == 4


def test_a_damaged_segment_is_passed_over(tmp_path):
    put(store(tmp_path), [1, 2])
    put(store(tmp_path), [3])
    first = min(tmp_path.glob("*.rows"), key=lambda path: path.name)
    first.write_bytes(first.read_bytes()[:-3])
    (tmp_path / "empty.rows").write_bytes(b"")
    left = store(tmp_path)
    assert (left.places([key_of(n) for n in (1, 2, 3)]) >= 0).tolist() == [False, False, True]
    assert np.array_equal(left.read(left.places([key_of(3)])), row(3)[None])


def test_a_killed_writer_leaves_whole_segments_only(tmp_path):
    program = (
        "import sys, numpy as np; from pathlib import Path; from img2prompt.cache import Store, key_of\n"
        "store = Store(Path(sys.argv[1]), (3, 5), np.float32, {}); print('ready', flush=True); n = 0\n"
        "while True:\n"
        "    store.add([key_of(n + i) for i in range(500)],\n"
        "        np.stack([np.full((3, 5), n + i, dtype=np.float32) for i in range(500)])); n += 500\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE)
    with writer:
        assert writer.stdout is not None and writer.stdout.readline()
        time.sleep(0.3)
        writer.send_signal(signal.SIGKILL)
    left = store(tmp_path)
    assert len(left) >= 500 and len(left) % 500 == 0
    numbers = list(range(len(left)))
    assert np.array_equal(left.read(left.places([key_of(n) for n in numbers])), np.stack([row(n) for n in numbers]))


def test_what_a_killed_writer_left_is_removed_a_day_later(tmp_path):
    store(tmp_path)
    old, young = tmp_path / ".a.rows.x.tmp", tmp_path / ".b.rows.x.tmp"
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (1, 1))
    store(tmp_path)
    assert not old.exists() and young.exists()


def test_the_folder_is_the_given_one_or_the_environments(monkeypatch, tmp_path):
    monkeypatch.setenv("IMG2PROMPT_CACHE", str(tmp_path / "one"))
    assert cache_folder(None) == tmp_path / "one" and str(cache_folder("/two")) == "/two"
    monkeypatch.delenv("IMG2PROMPT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder(None) == tmp_path / "img2prompt"


def test_a_disk_that_is_too_small_is_said_before_it_is_full(tmp_path):
    check_free(tmp_path / "not" / "yet", 1, "")
    with pytest.raises(ValueError, match="GiB are needed there and .* are free"):
        check_free(tmp_path / "not" / "yet", 2**60, "choose another cache_dir")


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be made|cannot be written"):
        store(tmp_path / "file" / "sub")
