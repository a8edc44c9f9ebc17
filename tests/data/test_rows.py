"""Rows: which images an argument names, what a table of prompts says, which of them are used."""

import os

import pytest

from img2prompt.data.decoding import ImageError
from img2prompt.data.kaggle import Kaggle, read_prompts
from img2prompt.data.listing import list_images, read_bytes
from img2prompt.data.sample import Sample
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


def test_a_count_chooses_by_id_and_too_few_pairs_are_an_error():
    samples = [Sample(str(i), f"p{i}", SOURCE, str(i)) for i in range(50)]
    chosen = select(samples, [], 10)
    assert chosen == select(samples[::-1], [], 10) and len(chosen) == 10
    assert set(chosen) <= set(select(samples, [], 20))
    with pytest.raises(ValueError, match=r"1 usable pairs, 1 skipped \(first: 7: empty prompt\)"):
        select(samples[:1], [("7", "empty prompt")], None)
    with pytest.raises(ValueError, match="the id 3"):
        select([*samples, samples[3]], [], None)
