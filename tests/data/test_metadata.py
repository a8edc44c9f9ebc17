"""Metadata: every generator's way of writing a prompt is read, and what cannot be trusted is no label."""

import gzip
import io
import json
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from img2prompt.data.embedded import MetadataError, embedded_text
from img2prompt.data.metadata import Label, label_of, read_label

PROMPT, NEGATIVE = "a red café, (oil:1.2)\nsecond line", "blurry, bad hands"
A1111 = f"{PROMPT}\nNegative prompt: {NEGATIVE}\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x512"
RUN = {
    "3": {
        "class_type": "KSampler",
        "inputs": {"seed": 1, "positive": ["6", 0], "negative": ["7", 0], "model": ["4", 0]},
    },
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "x"}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": PROMPT, "clip": ["4", 1]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": NEGATIVE, "clip": ["4", 1]}},
    "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
    "9": {"class_type": "SaveImage", "inputs": {"images": ["8", 0]}},
}
DRAWN = {
    "nodes": [
        {"id": 7, "type": "CLIPTextEncode", "widgets_values": [NEGATIVE], "inputs": [{"name": "clip", "link": 5}]},
        {"id": 6, "type": "CLIPTextEncode", "widgets_values": [PROMPT], "inputs": [{"name": "clip", "link": 3}]},
        {"id": 5, "type": "CLIPTextEncode", "widgets_values": ["unused"], "mode": 4, "inputs": []},
        {
            "id": 3,
            "type": "KSampler",
            "widgets_values": [1, "euler"],
            "inputs": [{"name": "positive", "link": 4}, {"name": "negative", "link": 6}],
        },
        {"id": 8, "type": "VAEDecode", "inputs": [{"name": "samples", "link": 7}]},
        {"id": 9, "type": "SaveImage", "widgets_values": ["ComfyUI"], "inputs": [{"name": "images", "link": 9}]},
    ],
    "links": [
        [4, 6, 0, 3, 1, "CONDITIONING"],
        [6, 7, 0, 3, 2, "CONDITIONING"],
        [7, 3, 0, 8, 0, "L"],
        [9, 8, 0, 9, 0, "I"],
    ],
}
NOVELAI = {"prompt": PROMPT, "uc": NEGATIVE, "steps": 28}
WAYS = {
    "a1111": {"parameters": A1111},
    "fooocus": {
        "parameters": json.dumps({"prompt": PROMPT, "negative_prompt": NEGATIVE, "metadata_scheme": "fooocus"})
    },
    "swarm": {"parameters": json.dumps({"sui_image_params": {"prompt": PROMPT, "negativeprompt": NEGATIVE}})},
    "comfy_run": {"prompt": json.dumps(RUN)},
    "comfy_drawn": {"workflow": json.dumps(DRAWN)},
    "invoke": {"invokeai_metadata": json.dumps({"positive_prompt": PROMPT, "negative_prompt": NEGATIVE})},
    "invoke_image": {
        "sd-metadata": json.dumps({"image": {"prompt": [{"prompt": f"{PROMPT} [{NEGATIVE}]", "weight": 1}]}})
    },
    "invoke_dream": {"Dream": f'"{PROMPT} [{NEGATIVE}]" -s 50 -S 1'},
    "novelai": {"Software": "NovelAI", "Description": PROMPT, "Comment": json.dumps(NOVELAI)},
}


def png(fields, after_pixels=False, **options):
    info = PngImagePlugin.PngInfo()
    for name, text in fields.items():
        if options.get("zipped"):
            info.add_text(name, text, zip=True)
        else:
            info.add_text(name, text)
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "PNG", pnginfo=info)
    data = file.getvalue()
    if not after_pixels:
        return data
    # The same chunks, moved behind the pixels.
    place, chunks = 8, []
    while place < len(data):
        length = int.from_bytes(data[place : place + 4], "big")
        chunks.append(data[place : place + 12 + length])
        place += 12 + length
    text = [chunk for chunk in chunks if b"Xt" in chunk[4:8]]
    rest = [chunk for chunk in chunks if b"Xt" not in chunk[4:8]]
    return data[:8] + b"".join(rest[:-1] + text + rest[-1:])


def with_comment(kind, comment):
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = comment
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, kind, exif=exif.tobytes())
    return file.getvalue()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("form", [{}, {"zipped": True}, {"after_pixels": True}])
def test_every_generators_prompt_is_read_from_png(way, form):
    label = read_label(png(WAYS[way], **form))
    assert (label.prompt, label.negative_prompt) == (PROMPT, NEGATIVE)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "PNG"])
@pytest.mark.parametrize(
    "comment",
    [
        b"UNICODE\0" + A1111.encode("utf-16-be"),
        b"UNICODE\0" + A1111.encode("utf-16-le"),
        b"ASCII\0\0\0" + A1111.encode(),
        b"\0" * 8 + A1111.encode(),
    ],
)
def test_a_user_comment_is_read_in_each_of_its_codes(kind, comment):
    label = read_label(with_comment(kind, comment))
    assert (label.prompt, label.negative_prompt) == (PROMPT, NEGATIVE)


def test_comfyui_is_read_from_webp_tags():
    exif = Image.Exif()
    exif[0x0110] = "prompt:" + json.dumps(RUN)
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "WEBP", exif=exif)
    assert read_label(file.getvalue()).prompt == PROMPT


def hidden(channels, text, kind):
    body = gzip.compress(text.encode()) if kind.endswith(b"comp") else text.encode()
    bits = np.unpackbits(np.frombuffer(kind + (8 * len(body)).to_bytes(4, "big") + body, np.uint8))
    height, width, depth = channels.shape
    flat = channels.transpose(1, 0, 2).reshape(-1).copy()
    flat[: len(bits)] = flat[: len(bits)] & 254 | bits
    return flat.reshape(width, height, depth).transpose(1, 0, 2)


@pytest.mark.parametrize("kind", [b"stealth_pnginfo", b"stealth_pngcomp", b"stealth_rgbinfo", b"stealth_rgbcomp"])
@pytest.mark.parametrize("text", [A1111, json.dumps({"Software": "NovelAI", "Comment": json.dumps(NOVELAI)})])
def test_stealth_pixels_are_read(kind, text):
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 4), dtype=np.uint8)
    part = slice(3, 4) if b"png" in kind else slice(0, 3)
    pixels[..., part] = hidden(pixels[..., part], text, kind)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    assert read_label(file.getvalue()).prompt == PROMPT


def test_a_picture_of_nobodys_generator_has_no_label():
    plain = io.BytesIO()
    Image.new("RGBA", (20, 30), (1, 2, 3, 4)).save(plain, "PNG")
    assert read_label(plain.getvalue()) is None
    assert read_label(png({"Description": "my cat", "Author": "me", "Comment": "Created with GIMP"})) is None
    assert read_label(with_comment("JPEG", b"ASCII\0\0\0Taken in Rome")) is None
    assert read_label(b"not an image") is None


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"parameters": "just some words"}, "without settings"),
        (
            {"parameters": f"a\nNegative prompt: b\nNegative prompt: c\n{A1111.splitlines()[-1]}"},
            "two negative prompts",
        ),
        ({"prompt": '{"1": '}, "damaged JSON"),
        ({"invokeai_metadata": "{}"}, "not as its generator writes it"),
        ({"sd-metadata": json.dumps({"image": {"prompt": [{"prompt": "a"}, {"prompt": "b"}]}})}, "2 weighted prompts"),
        ({"Dream": "a cat -s 50"}, "without a quoted prompt"),
        ({"parameters": json.dumps({"prompt": ["a"]})}, "no text but list"),
        ({"invokeai_metadata": json.dumps({"positive_prompt": " "})}, "empty prompt"),
        ({"prompt": json.dumps({"9": RUN["9"]})}, "without a text that reaches a sampler"),
    ],
)
def test_what_cannot_be_trusted_is_no_label(fields, reason):
    with pytest.raises(MetadataError, match=reason):
        label_of(fields)


def graph(**changes):
    return {"prompt": json.dumps({**RUN, **{str(name).lstrip("n"): node for name, node in changes.items()}})}


def test_a_graph_is_followed_through_what_changes_its_conditioning():
    combined = {"class_type": "FluxGuidance", "inputs": {"conditioning": ["6", 0], "guidance": 3.5}}
    control = {"class_type": "ControlNetApplyAdvanced", "inputs": {"positive": ["10", 0], "negative": ["7", 0]}}
    sampler = {"class_type": "KSampler", "inputs": {"positive": ["11", 0], "negative": ["11", 1]}}
    label = label_of(graph(n10=combined, n11=control, n3=sampler))
    assert (label.prompt, label.negative_prompt) == (PROMPT, NEGATIVE)
    text = {"class_type": "PrimitiveString", "inputs": {"value": "from afar"}}
    encode = {"class_type": "CLIPTextEncode", "inputs": {"text": ["12", 0], "clip": ["4", 1]}}
    assert label_of(graph(n12=text, n6=encode)).prompt == "from afar"
    guider = {"class_type": "BasicGuider", "inputs": {"conditioning": ["6", 0], "model": ["4", 0]}}
    custom = {"class_type": "SamplerCustomAdvanced", "inputs": {"guider": ["13", 0], "noise": ["14", 0]}}
    assert label_of(graph(n13=guider, n3=custom)).prompt == PROMPT


def test_a_graph_of_several_prompts_is_no_label():
    other = {"class_type": "CLIPTextEncode", "inputs": {"text": "something else", "clip": ["4", 1]}}
    both = {"class_type": "ConditioningCombine", "inputs": {"conditioning_1": ["6", 0], "conditioning_2": ["10", 0]}}
    sampler = {"class_type": "KSampler", "inputs": {"positive": ["11", 0], "negative": ["7", 0]}}
    with pytest.raises(MetadataError, match="2 different prompts"):
        label_of(graph(n10=other, n11=both, n3=sampler))
    # A branch that no saved image depends on is none of its prompts.
    alone = {"class_type": "KSampler", "inputs": {"positive": ["10", 0], "negative": ["7", 0]}}
    assert label_of(graph(n10=other, n20=alone)).prompt == PROMPT
    joined = {"class_type": "StringConcatenate", "inputs": {"string_a": "x", "string_b": "y"}}
    encode = {"class_type": "CLIPTextEncode", "inputs": {"text": ["12", 0], "clip": ["4", 1]}}
    with pytest.raises(MetadataError, match="made by StringConcatenate"):
        label_of(graph(n12=joined, n6=encode))


def test_cyclic_and_endless_graphs_end():
    circle = {
        str(i): {"class_type": "ConditioningCombine", "inputs": {"conditioning_1": [str((i + 1) % 9), 0]}}
        for i in range(9)
    }
    circle["99"] = {"class_type": "KSampler", "inputs": {"positive": ["0", 0]}}
    with pytest.raises(MetadataError, match="without a text"):
        label_of({"prompt": json.dumps(circle)})
    chain = {str(i): {"class_type": "Reroute", "inputs": {"text": [str(i + 1), 0]}} for i in range(5000)}
    chain["x"] = {"class_type": "CLIPTextEncode", "inputs": {"text": ["0", 0]}}
    chain["99999"] = {"class_type": "KSampler", "inputs": {"positive": ["x", 0]}}
    with pytest.raises(MetadataError):
        label_of({"prompt": json.dumps(chain)})
    with pytest.raises(MetadataError, match="damaged JSON"):
        label_of({"prompt": '{"a":' * 100_000})


def test_compressed_bombs_and_damaged_chunks_are_refused():
    bomb = b"parameters\0\0" + zlib.compress(b"a" * 50_000_000)
    chunk = len(bomb).to_bytes(4, "big") + b"zTXt" + bomb + zlib.crc32(b"zTXt" + bomb).to_bytes(4, "big")
    data = png({})
    with pytest.raises(MetadataError, match="more than 8 MiB"):
        embedded_text(data[:33] + chunk + data[33:])
    good = png({"parameters": A1111})
    place = good.index(b"caf")
    with pytest.raises(MetadataError, match="damaged"):
        embedded_text(good[:place] + b"C" + good[place + 1 :])


def test_three_hundred_images_have_each_their_own_prompt():
    names = list(WAYS)
    for number in range(300):
        fields = {
            name: text.replace("red caf", f"red {number} caf")
            for name, text in WAYS[names[number % len(names)]].items()
        }
        assert f"a red {number} caf" in read_label(png(fields)).prompt


@given(st.sampled_from(sorted(WAYS)), st.integers(0, 10**6), st.integers(1, 255))
@settings(max_examples=300, deadline=None)
def test_a_flipped_byte_gives_the_right_label_or_none(way, place, change):
    data = bytearray(png(WAYS[way]))
    data[place % len(data)] ^= change
    try:
        label = read_label(bytes(data))
    except MetadataError:
        return
    # A damaged name makes a field unknown; a damaged text never passes its checksum.
    assert label is None or label == Label(PROMPT, NEGATIVE, label.tool)


@given(st.binary(max_size=400), st.sampled_from(["", "PNG", "JPEG", "WEBP"]))
@settings(max_examples=200, deadline=None)
def test_any_bytes_give_a_label_an_error_of_ours_or_nothing(noise, start):
    data = noise
    if start:
        file = io.BytesIO()
        Image.new("RGB", (4, 4)).save(file, start)
        data = file.getvalue()[: 40 + len(noise)] + noise
    try:
        read_label(data)
    except MetadataError:
        pass


@given(
    st.recursive(
        st.none() | st.text(max_size=8) | st.integers() | st.lists(st.integers(), max_size=3),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    ["1", "2", "nodes", "links", "inputs", "class_type", "text", "positive", "prompt", "image"]
                ),
                inner,
                max_size=4,
            )
        ),
        max_leaves=12,
    ),
    st.sampled_from(["prompt", "workflow", "parameters", "Comment", "sd-metadata", "invokeai_metadata"]),
)
@settings(max_examples=300, deadline=None)
def test_any_json_gives_a_label_an_error_of_ours_or_nothing(values, field):
    try:
        label_of({field: json.dumps(values)})
    except MetadataError:
        pass
