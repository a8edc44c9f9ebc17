"""Rows: which images an argument names, what a table of prompts says, who validates, in which order they come."""

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from img2prompt.data.images import ImageError
from img2prompt.data.kaggle import Kaggle, read_prompts
from img2prompt.data.listing import list_images, read_bytes
from img2prompt.data.order import batch_rows, step_seed, steps_per_epoch
from img2prompt.data.sample import Found, Sample
from img2prompt.data.split import prompt_key, prompt_numbers, split
from img2prompt.training.pairs import select


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def test_a_folder_is_searched_with_its_subfolders_and_names_what_it_leaves_out(tmp_path):
    touch(tmp_path, "b.png", "a.JPG", "sub/c.webp", "notes.txt", ".hidden.png", ".git/d.png")
    listing = list_images(tmp_path)
    assert [file.path.name for file in listing.files] == ["a.JPG", "b.png", "c.webp"]
    assert [(os.path.basename(path), reason) for path, reason in listing.skipped] == [
        ("notes.txt", "not an image by its name (.txt)")
    ]


def test_links_in_a_circle_end(tmp_path):
    touch(tmp_path, "a.png")
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    assert len(list_images(tmp_path).files) == 1


def test_globs_lists_and_list_files_name_the_same_images(tmp_path, monkeypatch):
    touch(tmp_path, "a.png", "b.png")
    (tmp_path / "list.txt").write_text("a.png\r\nb.png\n\ngone.png\n")
    expected = [tmp_path / "a.png", tmp_path / "b.png"]
    assert [file.path for file in list_images(f"{tmp_path}/*.png").files] == expected
    assert [file.path for file in list_images([str(path) for path in expected]).files] == expected
    listing = list_images(tmp_path / "list.txt")
    assert [file.path for file in listing.files] == expected and listing.skipped == [("gone.png", "no such file")]


def test_an_existing_name_is_literal_before_it_is_a_pattern(tmp_path):
    touch(tmp_path, "[ab].png", "a.png")
    assert [file.path.name for file in list_images(tmp_path / "[ab].png").files] == ["[ab].png"]


def test_ids_are_unique_even_where_names_are_not(tmp_path):
    touch(tmp_path, "x/1.png", "y/1.png", "y/1.jpg", "2.png")
    ids = [file.id for file in list_images(tmp_path).files]
    assert len(set(ids)) == 4 and "2" in ids


def test_an_id_that_is_a_path_is_no_other_files_stem(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["x.png", "x.jpg", "x.png.jpg"]
    touch(tmp_path, *names)
    ids = [file.id for file in list_images(names).files]
    assert len(set(ids)) == 3


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    touch(tmp_path, "a.png", "closed/b.png")
    scan = os.scandir

    def refuse(path):
        if os.path.basename(path) == "closed":
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    listing = list_images(tmp_path)
    assert [file.id for file in listing.files] == ["a"]
    assert listing.skipped == [(str(tmp_path / "closed"), "Permission denied")]


def test_what_does_not_exist_is_an_error(tmp_path):
    for argument in (tmp_path / "none", f"{tmp_path}/*.png"):
        with pytest.raises(ValueError, match="no such file|matches no file"):
            list_images(argument)


def test_pipes_and_folders_are_never_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    for name in ("pipe.png", "folder.png"):
        with pytest.raises(ImageError, match="not a regular file"):
            read_bytes(tmp_path / name)
    with pytest.raises(ImageError, match="No such file"):
        read_bytes(tmp_path / "gone.png")


def test_prompts_with_quotes_commas_and_line_breaks_are_read(tmp_path):
    path = tmp_path / "prompts.csv"
    path.write_bytes('\ufeffprompt,imgId,more\r\n"a ""b"", c\nd",1,x\r\nplain,2,\r\n'.encode())
    assert read_prompts(path) == [("1", 'a "b", c\nd'), ("2", "plain")]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("id,text\n1,a\n", "expected the columns imgId,prompt in its first line, separated by commas, found id,text"),
        ("", "found nothing"),
        ("imgId,prompt\n1,a\n1,b\n", "line 3: imgId 1 comes twice"),
        ("imgId,prompt\n1,a, b\n", "line 2: not as many fields"),
        ("imgId,prompt\n1\n", "line 2: not as many fields"),
        ('imgId,prompt\n1,"a\n', "not a CSV file"),
    ],
)
def test_a_wrong_table_of_prompts_is_named(text, sentence, tmp_path):
    path = tmp_path / "prompts.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=sentence):
        read_prompts(path)


def test_rows_without_image_or_prompt_are_skipped_with_the_reason(tmp_path):
    touch(tmp_path, "images/1.png", "images/2.jpg", "images/3.png")
    (tmp_path / "prompts.csv").write_text("imgId,prompt\n1,a\n2,b\n3, \n4,c\n")
    found = Kaggle(tmp_path).find()
    assert [(sample.id, sample.prompt, sample.location) for sample in found.samples] == [
        ("1", "a", "1.png"),
        ("2", "b", "2.jpg"),
    ]
    assert found.skipped == [("3", "empty prompt"), ("4", "no file in images/")]


SOURCE = Kaggle("unused")


def rows(prompts):
    return [Sample(str(i), prompt, SOURCE, str(i)) for i, prompt in enumerate(prompts)]


@given(st.lists(st.integers(0, 30), min_size=2, max_size=200), st.floats(0.05, 0.9), st.integers(0, 5))
@settings(deadline=None)
def test_prompts_never_cross_the_split(numbers, fraction, seed):
    samples = rows([f"prompt {number}" for number in numbers])
    if len(set(numbers)) == 1:
        with pytest.raises(ValueError, match="cannot be split"):
            split(samples, fraction, seed)
        return
    try:
        held = split(samples, fraction, seed)
    except ValueError as error:
        assert "cannot be split" in str(error)
        return
    assert not {s.prompt for s, h in zip(samples, held, strict=True) if h} & {
        s.prompt for s, h in zip(samples, held, strict=True) if not h
    }


def test_captions_of_one_image_never_cross_the_split():
    # Ten images with three captions each; some captions are shared by two images.
    captions = [(image, f"own {image} {i}" if i else f"shared {image // 2}") for image in range(10) for i in range(3)]
    samples = [Sample(f"{image}#{i}", text, SOURCE, str(image)) for i, (image, text) in enumerate(captions)]
    for seed in range(10):
        held = split(samples, 0.3, seed)
        sides = {(s.location, bool(h)) for s, h in zip(samples, held, strict=True)}
        assert len({image for image, _ in sides}) == len(sides)
        assert len({(s.prompt, bool(h)) for s, h in zip(samples, held, strict=True)}) == len(
            {s.prompt for s in samples}
        )


def test_the_split_depends_on_prompts_and_seed_and_not_on_the_order_of_rows():
    samples = rows([f"prompt {i}" for i in range(300)])
    held = {s.prompt for s, h in zip(samples, split(samples, 0.2, 0), strict=True) if h}
    turned = samples[::-1]
    assert held == {s.prompt for s, h in zip(turned, split(turned, 0.2, 0), strict=True) if h}
    assert held != {s.prompt for s, h in zip(samples, split(samples, 0.2, 1), strict=True) if h}
    assert len(held) == 60


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("caf\u00e9", "cafe\u0301"),
        ("café", "cafe"),
        ("cat, dog", "cat , dog"),
        ("a-cat", "a - cat"),
        ("red\u200bcat", "redcat"),
        ("red\0cat", "redcat"),
        ("STRASSE", "straße"),
    ],
)
def test_what_the_text_encoder_cannot_tell_apart_is_one_prompt(one, other):
    assert prompt_key(one) == prompt_key(other)
    assert len({prompt_key(text) for text in ("a cat", "a dog", "acat", "cat a", "a cat!", "7 cats", "猫", "犬")}) == 8


def test_case_and_white_space_do_not_make_another_prompt():
    samples = rows(["A red  Cat", "a red cat", "dog", "bird", "fish"])
    for seed in range(20):
        held = split(samples, 0.3, seed)
        assert held[0] == held[1]
    assert (
        prompt_numbers(["A red  Cat", "a red cat", "dog"])[0] == prompt_numbers(["A red  Cat", "a red cat", "dog"])[1]
    )


def test_held_out_combinations_are_never_seen_in_training():
    from img2prompt.synthesis.scenes import combinations, compose_prompts

    prompts = compose_prompts(2000, 0)
    samples = [Sample(str(i), p, SOURCE, str(i), combinations(p)) for i, p in enumerate(prompts)]
    held = split(samples, 0.1, 0)
    seen = set().union(*(s.combinations for s, h in zip(samples, held, strict=True) if not h))
    assert 0.08 < held.mean() < 0.2
    assert all(s.combinations - seen for s, h in zip(samples, held, strict=True) if h)


@given(st.integers(1, 300), st.integers(1, 50), st.integers(0, 3))
@settings(deadline=None)
def test_an_epoch_takes_each_row_at_most_once_and_full_batches_only(count, batch_size, epoch):
    steps = steps_per_epoch(count, batch_size)
    batches = [batch_rows(count, batch_size, 0, "finetune", epoch * steps + step) for step in range(steps)]
    taken = np.concatenate(batches)
    assert len(set(taken.tolist())) == len(taken) == steps * min(batch_size, count)


def test_order_and_seeds_differ_by_seed_stage_and_epoch():
    def first(seed=0, stage="finetune", step=0):
        return batch_rows(100, 100, seed, stage, step).tolist()

    assert first() == first()
    assert len({tuple(order) for order in (first(), first(seed=1), first(stage="probe"), first(step=1))}) == 4
    assert len({step_seed(0, "a", 0), step_seed(1, "a", 0), step_seed(0, "b", 0), step_seed(0, "a", 1)}) == 4


def test_a_count_chooses_by_id_and_too_few_pairs_are_an_error():
    samples = rows([f"p{i}" for i in range(50)])
    chosen = select(Found(samples), 10)
    assert chosen == select(Found(samples[::-1]), 10) and len(chosen) == 10
    assert set(chosen) <= set(select(Found(samples), 20))
    with pytest.raises(ValueError, match=r"1 usable pairs, 1 skipped \(first: 7: empty prompt\)"):
        select(Found(samples[:1], [("7", "empty prompt")]), None)
    with pytest.raises(ValueError, match="the id 3"):
        select(Found([*samples, samples[3]]), None)
