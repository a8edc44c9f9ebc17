"""The command vary: which pictures it makes, again and again, and what it refuses."""

import json
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from img2prompt.commands.arguments import quoted_paths
from img2prompt.commands.settings import compose
from img2prompt.commands.vary import _save, vary
from img2prompt.data.listing import ImageFile
from img2prompt.sdipc.variations import variations_of


def varied(folders, images, out, *overrides):
    own = ["images=null", "out=null", "count=2", "steps=2", "device=cpu", "batch_size=3"]
    options = compose("vary", [*own, *overrides])
    options |= {"images": str(images), "out": str(out), "pipeline": str(folders[0]), "clip": str(folders[1])}
    vary(**options)
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.png"))}


def test_seeds_hang_on_names_texts_and_numbers_alone():
    def files(*names):
        return [ImageFile(name, Path(f"{name}.png")) for name in names]

    three = variations_of(files("a", "b", "c"), [], 2, 0)
    assert [one.name for one in three] == ["a_0", "a_1", "b_0", "b_1", "c_0", "c_1"]
    assert len({one.seed for one in three}) == 6
    assert variations_of(files("b"), [], 3, 0)[:2] == [
        type(one)(one.name, (0,), None, one.seed) for one in three if one.name.startswith("b")
    ]
    assert {one.seed for one in variations_of(files("a"), [], 2, 1)}.isdisjoint(one.seed for one in three)
    edits = variations_of(files("a", "b"), ["red", "blue"], 1, 0)
    assert [(one.name, one.text) for one in edits] == [
        ("a_text0_0", "red"),
        ("a_text1_0", "blue"),
        ("b_text0_0", "red"),
        ("b_text1_0", "blue"),
    ]
    (blend,) = variations_of(files("a", "b"), [], 1, 0, blend=True)
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
    for other, sentence in (
        ("guidance=3", "out=.*: made with guidance=7.5, not 3; choose another folder"),
        ("size_px=48", "out=.*: made with size_px=null, not 48; choose another folder"),
        ("seed=1", "out=.*: a_0.png was made with another seed; choose another folder"),
        ("text=sky", "out=.*: a_0.png was made with text=null, not sky; choose another folder"),
    ):
        with pytest.raises(ValueError, match=sentence):
            varied(folders, pictures, out, other)
    assert varied(folders, pictures, out, "count=3") == more


@pytest.mark.parametrize(
    "change",
    [
        "guidance=2",
        "guidance=1",
        "steps=3",
        "scheduler=euler",
        "size_px=48",
        "text=sky",
        "norm=3",
        "floor=0.8",
        "blend=true",
        "dtype=bf16",
    ],
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
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"a red cat\n\nsky\n{'word ' * 80}\n")
    varied(folders, pictures, tmp_path / "out", "count=1", f"norm_prompts={prompts}")
    assert ", of 3 prompts, 1 of them read in part" in capsys.readouterr().out
    prompts.write_text("a red cat\n")
    with pytest.raises(ValueError, match="made with norm_prompts="):
        varied(folders, pictures, tmp_path / "out", "count=1", f"norm_prompts={prompts}")


def test_images_of_one_name_have_pictures_of_their_own_in_the_folder(folders, pictures, tmp_path):
    alone = varied(folders, pictures / "a.png", tmp_path / "alone", "count=1", "batch_size=1")
    Image.open(pictures / "b.png").save(pictures / "a.bmp")
    before = sorted(pictures.iterdir())
    made = varied(folders, pictures, tmp_path / "out", "count=1", "batch_size=1")
    assert len(made) == 4 == len(list((tmp_path / "out").rglob("*.png"))) and sorted(pictures.iterdir()) == before
    # The seed of the first is what it was without the second.
    assert alone["a_0.png"] in made.values() and sum(name.startswith("a-") for name in made) == 2


def test_a_picture_that_was_being_replaced_when_the_job_died_is_made_again(folders, pictures, tmp_path, monkeypatch):
    out = tmp_path / "out"
    first = varied(folders, pictures, out, "count=1")
    original = (pictures / "b.png").read_bytes()
    Image.new("RGB", (32, 32), "red").save(pictures / "b.png")

    def saved_and_died(*args):
        _save(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("img2prompt.commands.vary._save", saved_and_died)
        varied(folders, pictures, out, "count=1")
    assert (out / "b_0.png").read_bytes() != first["b_0.png"]
    (pictures / "b.png").write_bytes(original)
    assert varied(folders, pictures, out, "count=1") == first


def test_what_lies_in_the_folder_of_the_variations_is_not_varied(folders, pictures):
    first = varied(folders, pictures, pictures / "out", "count=1")
    assert varied(folders, pictures, pictures / "out", "count=1") == first and len(first) == 3
    with pytest.raises(ValueError, match="they are all in out="):
        varied(folders, pictures / "out", pictures / "out", "count=1")


def test_damaged_pictures_are_made_again_and_a_folder_without_any_takes_other_settings(folders, pictures, tmp_path):
    out = tmp_path / "out"
    first = varied(folders, pictures, out, "count=1")
    (out / "a_0.png").write_bytes(b"")
    assert varied(folders, pictures, out, "count=1") == first
    for path in out.glob("*.png"):
        path.unlink()
    (out / "contact_sheet.jpg").unlink()
    assert len(varied(folders, pictures, out, "count=1", "steps=1")) == 3


def test_another_model_in_the_same_place_is_another_model(folders, pictures, tmp_path):
    pipeline = shutil.copytree(folders[0], tmp_path / "pipeline")
    varied((pipeline, folders[1]), pictures, tmp_path / "out", "count=1")
    moved = pipeline.rename(tmp_path / "moved")
    varied((moved, folders[1]), pictures, tmp_path / "out", "count=1")
    weights = moved / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: value * 1.01 for name, value in load_file(weights).items()}, weights, {"format": "pt"})
    with pytest.raises(ValueError, match="out=.*: made with weights="):
        varied((moved, folders[1]), pictures, tmp_path / "out", "count=1")


def test_odd_names_of_files_are_no_hindrance(folders, tmp_path):
    odd = tmp_path / "odd"
    odd.mkdir()
    for name in (b"\xff.png", ("x" * 250 + ".png").encode(), "été, (1) = 'q'.png".encode()):
        Image.new("RGB", (32, 32), "red").save(os.fsdecode(os.fsencode(odd) + b"/" + name))
    assert len(varied(folders, odd, tmp_path / "out", "count=1")) == 3
    assert len(varied(folders, odd, tmp_path / "out", "count=1")) == 3


def test_a_list_of_texts_is_numbered_and_a_single_text_is_not(folders, pictures, tmp_path):
    image = pictures / "a.png"
    assert list(varied(folders, image, tmp_path / "one", "count=1", "text=sky")) == ["a_0.png"]
    assert list(varied(folders, image, tmp_path / "listed", "count=1", "text=[sky]")) == ["a_text0_0.png"]


def test_a_text_is_taken_as_it_was_typed():
    typed = "a red cat, sitting = it's: here (1)"
    assert compose("vary", quoted_paths([f"text={typed}", "images=x", "out=y"]))["text"] == typed
    assert compose("vary", quoted_paths(["text=[a cat,at night]", "images=x", "out=y"]))["text"] == [
        "a cat",
        "at night",
    ]


def test_a_thin_image_is_left_out_and_the_others_are_varied(folders, pictures, tmp_path):
    Image.new("RGB", (1, 2000)).save(pictures / "thin.png")
    assert len(varied(folders, pictures, tmp_path / "out", "count=1")) == 3
    assert "thin.png" in (tmp_path / "out" / "skipped.csv").read_text()


def test_pictures_are_those_of_the_pipeline_itself(folders):
    import diffusers
    import torch

    from img2prompt.sdipc.converter import Converter, load_clip

    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folders[0])
    pipeline.set_progress_bar_config(disable=True)
    converter = Converter(load_clip(str(folders[1])), pipeline)
    conditions = torch.randn(2, 77, 32, generator=torch.manual_seed(0))
    for guidance in (1.0, 5.0):
        with torch.no_grad():
            ours = converter.pictures(conditions, [3, 4], guidance, 3)
            theirs = pipeline(
                prompt_embeds=conditions,
                negative_prompt_embeds=converter.null.expand(2, -1, -1),
                num_inference_steps=3,
                guidance_scale=guidance,
                generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)],
                output_type="np",
            ).images
        assert abs(ours.numpy() / 255 - theirs).max() < 0.5 / 255 + 1e-4


def test_a_picture_that_is_not_finite_is_not_saved(folders, pictures, tmp_path, monkeypatch):
    def denoised(*args, **options):
        return torch.full((1, 3, 32, 32), float("nan"))

    import torch

    monkeypatch.setattr("img2prompt.sdipc.converter.denoised", denoised)
    with pytest.raises(ValueError, match="a picture is not finite: .* set dtype=fp32"):
        varied(folders, pictures, tmp_path / "out", "count=1", "batch_size=1")
    assert not list((tmp_path / "out").glob("*.png"))


def test_what_cannot_be_is_told_in_a_sentence(folders, pictures, tmp_path):
    for overrides, sentence in (
        (("count=0",), "count must be at least 1, got 0"),
        (("scheduler=best",), "scheduler=best: must be one of ddim"),
        (("format=gif",), "format=gif: must be one of webp, png, jpg"),
        (("size_px=33",), "size_px must be a multiple of 2 above 0, got 33"),
        (("floor=100",), "floor=100.*: no singular value of CLIP's map of texts is above it"),
        ((f"text={'word ' * 80}",), "text=word .* CLIP tokens, and 77 are read; shorten it"),
        (("text=''",), "text=: must be a text"),
        (("guidance=[5,7]",), r"guidance must be at least 1, got \[5, 7\]"),
        (("steps=1000",), "steps must be at most 999, got 1000"),
        (("floor=-1",), "floor must be at least 0, got -1"),
        (("norm=3", "norm_prompts=x"), "norm and norm_prompts: give one of them"),
        (("count=null",), "count must be at least 1, got None"),
    ):
        with pytest.raises(ValueError, match=sentence):
            varied(folders, pictures, tmp_path / "out", *overrides)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "x.png").write_bytes(b"no")
    with pytest.raises(ValueError, match="no readable image among 1 files"):
        varied(folders, tmp_path / "empty", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="a picture is not finite"):
        varied(folders, pictures, tmp_path / "large", "alpha=1e30", "text=sky")
    with pytest.raises(ValueError, match="is there already, and holds no variations"):
        varied(folders, pictures, pictures)
    assert sorted(path.name for path in pictures.iterdir()) == ["a.png", "b.png", "c.png"]
