"""What an adversary found in the data: labels that are not the image's own, leaks, stale rows, files that hang."""

import io
import json
import shutil
import struct
import time
import zlib

import numpy as np
import pytest
from conftest import QUICK, TINY, settings_of
from PIL import Image

from img2prompt.commands.train import train
from img2prompt.data.cleaning import clean
from img2prompt.data.comfyui import prompts_of_run
from img2prompt.data.decoding import decode_with_pillow
from img2prompt.data.diffusiondb import DiffusionDB
from img2prompt.data.embedded import MAX_TEXT_BYTES, MetadataError, embedded_text
from img2prompt.data.folder import Folder
from img2prompt.data.images import decode
from img2prompt.data.metadata import caption_file, label_of


def picture(path, colour="red", size=(8, 8), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        ("file_name,prompt\na.png,a red car, blue sky\n", "line 2: not as many fields as the header"),
        ("file_name,prompt\na.png\n", "line 2: not as many fields"),
        ("file_name,prompt,prompt\na.png,x,y\n", "a column comes twice"),
    ],
)
def test_a_table_whose_prompts_would_be_cut_is_an_error(table, sentence, tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text(table)
    with pytest.raises(ValueError, match=sentence):
        Folder(tmp_path).find()


def test_two_tables_in_one_folder_are_an_error_and_lines_end_at_line_feeds(tmp_path):
    picture(tmp_path / "a.png")
    text = json.dumps({"file_name": "a.png", "prompt": "a\u2028cat"}, ensure_ascii=False)
    (tmp_path / "metadata.jsonl").write_text(text + "\n", encoding="utf-8")
    assert Folder(tmp_path).find().samples[0].prompt == "a\u2028cat"
    (tmp_path / "metadata.csv").write_text("file_name,prompt\na.png,x\n")
    with pytest.raises(ValueError, match="metadata.csv and metadata.jsonl; keep one"):
        Folder(tmp_path).find()


def test_a_linked_folder_has_its_own_table(tmp_path):
    picture(tmp_path / "real" / "a.png")
    (tmp_path / "real" / "metadata.csv").write_text("file_name,prompt\na.png,table\n")
    (tmp_path / "real" / "a.txt").write_text("text")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path / "real", target_is_directory=True)
    assert [sample.prompt for sample in Folder(tmp_path / "root").find().samples] == ["table"]


@pytest.mark.parametrize(
    "maker",
    [
        {"class_type": "OllamaGenerate", "inputs": {"prompt": "Write a prompt about dragons"}},
        {
            "class_type": "StringReplace",
            "inputs": {"string": "a photo of ANIMAL", "find": "ANIMAL", "replace": "zebra"},
        },
        {"class_type": "SDXLPromptStyler", "inputs": {"text_positive": "a cat", "style": "anime"}},
        {"class_type": "DPRandomGenerator", "inputs": {"text": "a {cat|dog}"}},
        {"class_type": "Unknown", "inputs": {"text": "a cat", "suffix": "in the rain"}},
        {"class_type": "Unknown", "inputs": {"text": "a cat", "more": ["9", 0]}},
    ],
)
def test_a_comfyui_text_that_another_node_makes_is_no_label(maker):
    graph = {
        "1": {"class_type": "KSampler", "inputs": {"positive": ["2", 0], "negative": ["3", 0]}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"text": ["20", 0]}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"text": "bad"}},
        "4": {"class_type": "SaveImage", "inputs": {"images": ["1", 0]}},
        "9": {"class_type": "Anything", "inputs": {}},
        "20": maker,
    }
    with pytest.raises(MetadataError, match="made by"):
        prompts_of_run(graph)
    graph["20"] = {"class_type": "PrimitiveString", "inputs": {"value": "a cat"}}
    assert prompts_of_run(graph)[0] == "a cat"


def test_captions_are_lines_and_nothing_else_divides_or_joins_them():
    assert [label.prompt for label in caption_file("a red\u2028car\x0bon a road\r\nsecond")] == [
        "a red\u2028car\x0bon a road",
        "second",
    ]
    like_settings = "Style: photo, Subject: cat, Lighting: soft, Mood: calm"
    assert [label.prompt for label in caption_file(f"a cat\n{like_settings}")] == ["a cat", like_settings]


def test_the_settings_of_a1111_begin_at_its_steps():
    text = "a cat\nSteps: 20, Sampler: Euler, CFG scale: 7\nTemplate: a {cat}, Style: x, Mood: y, Light: z, Foo: w"
    label = label_of({"parameters": text})
    assert label is not None and label.prompt == "a cat"


@pytest.mark.parametrize(
    ("prompt", "cleaned"),
    [
        ("(aspect 16:9) cat", "(aspect 16:9) cat"),
        ("(at 10:30)", "(at 10:30)"),
        ("(John 3:16)", "(John 3:16)"),
        ("(a cat:1.2), ((dog))", "a cat, dog"),
        ("(x:.5) (y:2)", "x y"),
    ],
)
def test_ratios_and_times_are_no_weights(prompt, cleaned):
    assert clean(prompt) == cleaned


@pytest.mark.parametrize(
    "prompt", ["(" * 200_000, "(" * 19_000, "(:" + "1" * 19_000 + "x", "(a:" * 6_000, "<lora:" * 3_000]
)
def test_no_prompt_takes_long_to_clean(prompt):
    began = time.perf_counter()
    clean(prompt)
    assert time.perf_counter() - began < 2


def test_many_texts_of_one_png_are_bounded_together():
    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    blank = zlib.compress(b" " * (MAX_TEXT_BYTES - 100))
    texts = b"".join(chunk(b"zTXt", f"t{i}".encode() + b"\0\0" + blank) for i in range(20))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0))
    with pytest.raises(MetadataError, match="together"):
        embedded_text(b"\x89PNG\r\n\x1a\n" + header + texts + chunk(b"IEND", b""))


def test_rotation_is_found_in_xmp_and_behind_other_segments():
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "JPEG")
    data = file.getvalue()
    xmp = b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta xmlns:x='adobe:ns:meta/'><rdf:RDF><rdf:Description "
    xmp += b'tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
    exif = Image.Exif()
    exif[0x0112] = 6
    segments = [b"\xff\xe1" + struct.pack(">H", len(xmp) + 2) + xmp]
    body = exif.tobytes()
    filler = b"\xff\xe5" + struct.pack(">H", 65_002) + bytes(65_000)
    segments.append(filler * 5 + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body)
    for segment in segments:
        turned = data[:2] + segment + data[2:]
        assert decode(turned).shape == (3, 64, 48)
        assert decode(turned).equal(decode_with_pillow(turned))


def test_one_file_that_two_sources_name_never_crosses_the_split(tmp_path):
    words = ["castle", "violin", "volcano", "tortoise", "submarine", "cactus", "astronaut", "waterfall", "robot", "owl"]
    root = tmp_path / "k"
    rows = ["imgId,prompt"]
    for i, word in enumerate(words):
        picture(root / "images" / f"{i}.png", (i * 20, 0, 0))
        (root / "images" / f"{i}.txt").write_text(f"photo number {i} {'x' * i}")
        rows.append(f"{i},{word}")
    (root / "prompts.csv").write_text("\n".join(rows) + "\n")
    items = f"data.sources=[{{source:folder,root:'{root / 'images'}'}},{{source:kaggle,root:'{root}'}}]"
    options = (*QUICK[1:], *TINY, "data.val=0.3", "trainer.max_epochs=0", "data.batch_size=4")
    train(settings_of("data=mixture", items, *options), tmp_path / "run")
    trained = set(json.loads((tmp_path / "run" / "trained.json").read_text())["prompts"])
    for i, word in enumerate(words):
        assert (word in trained) == (f"photo number {i} {'x' * i}".strip() in trained)
    # And with one of the two as the validation set of its own, nothing is left to train on.
    item = f"data.val={{source:kaggle,root:'{root}'}}"
    with pytest.raises(ValueError, match="nothing is left, all 10 pairs are of a validation image"):
        train(
            settings_of("data=folder", f"data.root={root / 'images'}", item, *options[:-3], *options[-2:]),
            tmp_path / "2",
        )


def stopped(run):
    """The run as it was before its last rung was done."""
    (run / "summary.json").unlink()
    ladder = (run / "ladder.csv").read_text().splitlines(keepends=True)
    (run / "ladder.csv").write_text("".join(ladder[:-1]))
    return run


def test_a_resumed_run_refuses_images_that_have_changed_places(tmp_path, train_here, pairs_folder):
    root = tmp_path / "pairs"
    shutil.copytree(pairs_folder, root)
    train_here(tmp_path / "run", f"data.root={root}")
    run = stopped(tmp_path / "run")
    files = sorted((root / "images").iterdir())
    contents = [file.read_bytes() for file in files]
    for file, content in zip(files, contents[1:] + contents[:1], strict=True):
        file.write_bytes(content)
    with pytest.raises(ValueError, match="its images have changed"):
        train_here(run, f"data.root={root}")


def test_a_resumed_run_refuses_another_text_encoder_of_the_same_name(tmp_path, train_here):
    from safetensors.torch import load_file, save_file

    from img2prompt.data.targets import TextEncoder, locate

    TextEncoder(locate())._encoder.save(str(tmp_path / "model"))
    options = (f"target.model={tmp_path / 'model'}", f"cache_dir={tmp_path / 'cache'}")
    train_here(tmp_path / "run", *options)
    weights = tmp_path / "model" / "model.safetensors"
    changed = {name: value * 1.2 for name, value in load_file(weights).items()}
    save_file(changed, weights, {"format": "pt"})
    with pytest.raises(ValueError, match="its text encoder has changed"):
        train_here(stopped(tmp_path / "run"), *options)


def test_the_weight_of_a_source_that_is_filtered_away_counts_for_nothing(tmp_path):
    from img2prompt.commands.table import find_table

    for name, words in (("long", 12), ("short", 3)):
        for i in range(6):
            picture(tmp_path / name / f"{i}.png")
            (tmp_path / name / f"{i}.txt").write_text(" ".join([f"w{i}"] * words))
    data = settings_of("data=mixture", "data.max_words=8")["data"]
    data["sources"] = [
        {"source": "folder", "root": str(tmp_path / name), "weight": weight}
        for name, weight in (("long", 10), ("short", 1))
    ]
    table = find_table(data)
    import torch

    from img2prompt.data.split import Sides
    from img2prompt.training.pairs import Rows

    sides = Sides(np.zeros(len(table.samples), dtype=bool))
    rows = Rows(table.samples, torch.zeros(len(table.samples), 2), table.weights, sides, table.lineage, {})
    assert rows.draws(np.arange(6)).count == 6


def test_file_names_that_are_no_utf8_train(tmp_path):
    import os

    folder = tmp_path / "t"
    for i in range(12):
        picture(folder / f"{i}.png", (i * 20, 0, 0))
        (folder / f"{i}.txt").write_text(f"thing number {'i' * i}")
    os.rename(os.fsencode(folder / "3.png"), os.fsencode(folder) + b"/caf\xe9.png")
    os.rename(os.fsencode(folder / "3.txt"), os.fsencode(folder) + b"/caf\xe9.txt")
    options = (*QUICK[1:], *TINY, "data=folder", f"data.root={folder}", "data.val=0.3", "trainer.max_epochs=0")
    assert train(settings_of(*options), tmp_path / "run") is not None


def test_parts_that_were_unpacked_into_a_folder_of_their_own_are_read_once(tmp_path):
    inner = tmp_path / "part-000001" / "part-000001"
    picture(inner / "a.png")
    (inner / "part-000001.json").write_text(json.dumps({"a.png": {"p": "a cat"}}))
    found = DiffusionDB(tmp_path).find()
    assert [sample.prompt for sample in found.samples] == ["a cat"] and not found.skipped


def test_members_that_differ_in_case_are_refused_and_dots_are_named(tmp_path):
    import tarfile

    from img2prompt.data.shards import Shards

    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG")
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, data in (
            ("a.png", file.getvalue()),
            ("a.txt", b"one"),
            ("a.TXT", b"two"),
            ("b.1.png", file.getvalue()),
            ("b.txt", b"text"),
            ("c.png", file.getvalue()),
            ("c.txt", b""),
            ("c.json", b'{"caption": null, "prompt": "red"}'),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    found = Shards(tmp_path).find()
    assert [(sample.id, sample.prompt) for sample in found.samples] == [("c", "red")]
    assert {reason for _, reason in found.skipped} == {
        "several members of this key and ending",
        "an image with several dots in its name",
    }
