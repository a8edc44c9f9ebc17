"""The command vary: which pictures it makes, again and again, and what it refuses."""

import json

import pytest
from PIL import Image

from img2prompt.commands.settings import compose
from img2prompt.commands.vary import vary
from img2prompt.sdipc.variations import variations_of


def varied(folders, images, out, *overrides):
    own = ["images=null", "out=null", "count=2", "steps=2", "device=cpu", "batch_size=3"]
    options = compose("vary", [*own, *overrides])
    options |= {"images": str(images), "out": str(out), "pipeline": str(folders[0]), "clip": str(folders[1])}
    vary(**options)
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.png"))}


def test_seeds_hang_on_names_texts_and_numbers_alone():
    three = variations_of(["a", "b", "c"], [], 2, 0)
    assert [one.name for one in three] == ["a_0", "a_1", "b_0", "b_1", "c_0", "c_1"]
    assert len({one.seed for one in three}) == 6
    assert variations_of(["b"], [], 3, 0)[:2] == [
        type(one)(one.name, (0,), None, one.seed) for one in three if one.name.startswith("b")
    ]
    assert {one.seed for one in variations_of(["a"], [], 2, 1)}.isdisjoint(one.seed for one in three)
    edits = variations_of(["a", "b"], ["red", "blue"], 1, 0)
    assert [(one.name, one.text) for one in edits] == [
        ("a_text0_0", "red"),
        ("a_text1_0", "blue"),
        ("b_text0_0", "red"),
        ("b_text1_0", "blue"),
    ]
    (blend,) = variations_of(["a", "b"], [], 1, 0, blend=True)
    assert (blend.name, blend.images) == ("blend_0", (0, 1))


def test_each_image_has_its_variations_and_a_sheet_beside_them(folders, pictures, tmp_path, capsys):
    (pictures / "broken.png").write_bytes(b"no")
    made = varied(folders, pictures, tmp_path / "out")
    assert list(made) == ["a_0.png", "a_1.png", "b_0.png", "b_1.png", "c_0.png", "c_1.png"]
    assert len(set(made.values())) == 6
    assert "broken.png" in (tmp_path / "out" / "skipped.csv").read_text()
    rows = [json.loads(line) for line in (tmp_path / "out" / "variations.jsonl").read_text().splitlines()]
    assert [row["file"] for row in rows] == list(made) and rows[0]["images"] == [str(pictures / "a.png")]
    with Image.open(tmp_path / "out" / "contact_sheet.jpg") as sheet:
        assert sheet.width > 3 * 190 and sheet.height > 3 * 190
    # Alone, in another batch, it is the same picture but for rounding; with another seed it is another one.
    alone = varied(folders, pictures / "b.png", tmp_path / "alone", "batch_size=1")
    assert close(tmp_path / "alone" / "b_1.png", tmp_path / "out" / "b_1.png")
    assert varied(folders, pictures / "b.png", tmp_path / "other", "seed=1")["b_1.png"] != alone["b_1.png"]


def close(one, other):
    pairs = zip(Image.open(one).tobytes(), Image.open(other).tobytes(), strict=True)
    return max(abs(a - b) for a, b in pairs) <= 1


def test_the_same_command_makes_what_is_missing_and_no_more(folders, pictures, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    first = varied(folders, pictures, out)
    (out / "b_0.png").unlink()
    stamps = {path.name: path.stat().st_mtime_ns for path in out.glob("*.png")}
    assert varied(folders, pictures, out) == first
    assert "5 of 6 variations are there already" in capsys.readouterr().err
    assert all((out / name).stat().st_mtime_ns == stamp for name, stamp in stamps.items())
    # An image that has changed is varied anew, and more variations leave the others alone.
    Image.new("RGB", (32, 32), "red").save(pictures / "a.png")
    more = varied(folders, pictures, out, "count=3")
    assert len(more) == 9 and more["a_0.png"] != first["a_0.png"] and more["c_1.png"] == first["c_1.png"]
    with pytest.raises(ValueError, match="out=.*: made with guidance=7.5, not 3; choose another folder, or guidance"):
        varied(folders, pictures, out, "guidance=3")
    assert varied(folders, pictures, out, "count=3") == more


@pytest.mark.parametrize(
    "change",
    ["guidance=2", "steps=3", "scheduler=euler", "size_px=48", "text=sky", "norm=3", "floor=0.8", "blend=true"],
)
def test_every_option_changes_the_pictures(change, folders, pictures, tmp_path):
    plain = varied(folders, pictures, tmp_path / "plain", "count=1")
    other = varied(folders, pictures, tmp_path / "other", "count=1", change)
    assert not set(plain.values()) & set(other.values())


def test_words_and_their_weight_count(folders, pictures, tmp_path):
    one, two = (
        varied(folders, pictures / "a.png", tmp_path / name, "count=1", "text=[a red cat,sky]", f"alpha={alpha}")
        for name, alpha in (("one", 0.9), ("two", 0.1))
    )
    assert list(one) == ["a_text0_0.png", "a_text1_0.png"] and len({*one.values(), *two.values()}) == 4


def test_lengths_of_prompts_can_be_measured(folders, pictures, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a red cat\nsky\n")
    varied(folders, pictures, tmp_path / "out", "count=1", f"norm_prompts={tmp_path / 'prompts.txt'}")
    assert ", of 2 prompts" in capsys.readouterr().out


def test_what_cannot_be_is_told_in_a_sentence(folders, pictures, tmp_path):
    for overrides, sentence in (
        (("count=0",), "count must be at least 1, got 0"),
        (("scheduler=best",), "scheduler=best: must be one of ddim"),
        (("format=gif",), "format=gif: must be one of webp, png, jpg"),
        (("size_px=33",), "size_px must be a multiple of 2, got 33"),
        (("floor=100",), "floor=100.*: no singular value of CLIP's map of texts is above it"),
        ((f"text={'word ' * 80}",), "text=word .* CLIP tokens, and 77 are read; shorten it"),
        (("text=[]",), None),
        (("text=''",), "text=: must be a text"),
    ):
        if sentence is not None:
            with pytest.raises(ValueError, match=sentence):
                varied(folders, pictures, tmp_path / "out", *overrides)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "x.png").write_bytes(b"no")
    with pytest.raises(ValueError, match="no readable image among 1 files"):
        varied(folders, tmp_path / "empty", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="is there already, and holds no variations"):
        varied(folders, pictures, pictures)
    assert sorted(path.name for path in pictures.iterdir()) == ["a.png", "b.png", "c.png"]
