"""Every pair of the README's table of formats and encoder families: opened by the library that it is for, in a fresh
process without a network, by the very code on its model card.
"""

import os
import subprocess
import sys
from pathlib import Path

import exporting
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from img2prompt.commands.arguments import quoted_paths
from img2prompt.commands.export import export
from img2prompt.commands.predict import main as predict_main
from img2prompt.data.targets import locate
from img2prompt.export.check import drawn
from img2prompt.predictors.predictor import predict_items
from img2prompt.predictors.trained import load

PAIRS = {
    "sentence_transformers": [("openclip", "linear"), ("openclip_quick", "linear"), ("timm_clip", "mlp")],
    "timm": [("openclip", "linear"), ("timm_vit", "linear"), ("openclip_projected", "linear")],
    "onnx": [("openclip", "attention"), ("timm_resnet", "vocabulary")],
    "safetensors": [("openclip", "vocabulary")],
}
# The rest of the table, which takes minutes.
MORE = {
    "sentence_transformers": [
        *(("openclip", head) for head in ("mlp", "deep", "vocabulary")),
        *((name, "linear") for name in ("timm_clip", "huggingface_clip")),
        *(("timm_clip", head) for head in ("deep", "vocabulary")),
        ("huggingface_clip", "mlp"),
    ],
    "timm": [
        *((name, "linear") for name in ("openclip_quick", "timm_clip", "timm_convolutions", "timm_resnet")),
        ("openclip_trunk", "linear"),
        ("openclip_map", "linear"),
    ],
    "onnx": [
        *((name, "linear") for name in exporting.ENCODERS if name != "openclip"),
        *(("openclip", head) for head in exporting.HEADS if head not in ("linear", "attention")),
        *(("timm_vit", head) for head in ("mlp", "attention", "layers")),
        *(("huggingface_clip", head) for head in ("mlp", "attention", "layers")),
    ],
}
REFUSED = {
    (
        "sentence_transformers",
        "timm_vit",
        "linear",
    ): "test_vit is no vision transformer of CLIP, as encoder=openclip",
    ("sentence_transformers", "timm_resnet", "linear"): "is no vision transformer of CLIP",
    ("sentence_transformers", "openclip_trunk", "linear"): "is no vision transformer of CLIP",
    ("timm", "huggingface_clip", "linear"): "is none of timm's; format=timm has encoder=timm and encoder=openclip",
    ("sentence_transformers", "openclip", "attention"): "the head .AttentionPool. reads more than the pooled features",
    (
        "sentence_transformers",
        "huggingface_clip_vision_model",
        "linear",
    ): "was made for 32 px and resamples",
    (
        "timm",
        "openclip",
        "layers",
    ): "the head .Linear. reads more than the pooled features",
    ("timm", "openclip", "mlp"): "the head has 2 layers, and timm's classifier is one; format=onnx has any",
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("exports")


@pytest.fixture(scope="module")
def pictures(shared) -> Path:
    """Drawings of odd sizes, among them one that transformers and torchvision cut a pixel apart."""
    folder = shared / "pictures"
    folder.mkdir()
    for item in [*drawn()[1:6], drawn()[7]]:
        (folder / f"{item.id}.png").write_bytes(item.read())
    first = Image.open(folder / "01.png")
    see_through = first.convert("RGBA")
    see_through.putalpha(first.convert("L"))
    see_through.save(folder / "alpha.png")
    see_through.convert("LA").save(folder / "grey_alpha.png")
    first.quantize(8).save(folder / "palette.png", transparency=2)
    exif = Image.Exif()
    exif[274] = 6  # turned by a quarter
    first.save(folder / "turned.png", exif=exif)
    return folder


@pytest.mark.parametrize("format", PAIRS)
def test_the_code_on_the_card_says_what_the_checkpoint_says(format, shared, pictures, capsys):
    _compare(format, PAIRS[format], shared, pictures, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("format", MORE)
def test_so_it_does_for_every_pair_of_the_table(format, shared, pictures, capsys):
    _compare(format, MORE[format], shared, pictures, capsys)


def _compare(format, pairs, shared, pictures, capsys):
    folders = {}
    for encoder, head in pairs:
        name = f"{format}_{encoder}_{head}"
        folders[name] = exporting.checkpoint(shared, encoder, head)
        export(str(folders[name]), format, str(shared / name))
        assert "32 drawn images of odd sizes: cosine at least" in capsys.readouterr().out
        for path in (shared / name).rglob("*"):
            assert path.is_dir() or not any(str(one).encode() in path.read_bytes() for one in (ROOT, shared)), path
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'offline'}", "HF_HUB_OFFLINE": "1"}
    script = Path(__file__).with_name("foreign.py")
    places = [str(shared / name) for name in folders]
    told = subprocess.run(
        [sys.executable, str(script), str(pictures), locate().location, str(shared / f"{format}.npz"), *places],
        env=env, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert told.returncode == 0, told.stderr[-3000:]
    said = np.load(shared / f"{format}.npz")
    for name, path in folders.items():
        ours = load(path, "cpu").predict(pictures)
        for number, image_id in enumerate(ours.ids):
            theirs = said[f"{name} {image_id}"]
            cosine = theirs @ ours.embeddings[number] / np.linalg.norm(theirs)
            assert cosine >= 0.99999, (name, image_id, cosine)


@pytest.mark.parametrize("format", ["sentence_transformers", "timm", "onnx", "safetensors"])
def test_predict_opens_what_was_exported(format, shared, pictures, tmp_path, capsys):
    path = exporting.checkpoint(shared, "openclip")
    out = _exported(shared, "openclip", format)
    goal = tmp_path / "found.npz"
    predict_main(quoted_paths([f"ckpt={out}", f"images={pictures}", f"out={goal}", "device=cpu"]))
    assert "finetune of ViT-S-32-alt, validation cosine 0.5000" in capsys.readouterr().out
    found, ours = np.load(goal), load(path, "cpu").predict(pictures)
    assert list(found["ids"]) == ours.ids
    assert (found["embeddings"] * ours.embeddings).sum(1).min() >= 0.99999


def _exported(shared, encoder, format):
    out = shared / f"{format}_{encoder}_linear"
    if not out.exists():
        export(str(exporting.checkpoint(shared, encoder)), format, str(out))
    return out


@pytest.mark.parametrize(("format", "encoder", "head"), REFUSED)
def test_what_a_format_cannot_have_is_refused_with_what_can(format, encoder, head, shared):
    path = exporting.checkpoint(shared, encoder, head)
    with pytest.raises(ValueError, match=REFUSED[format, encoder, head]):
        export(str(path), format, str(shared / "refused"))
    assert not (shared / "refused").exists() and not list(shared.glob(".refused*"))


def test_an_onnx_graph_takes_any_number_of_images(shared):
    import onnxruntime
    import torch

    out = _exported(shared, "timm_vit", "onnx")
    graph = onnxruntime.InferenceSession(str(out / "model.onnx"), providers=["CPUExecutionProvider"])
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole = graph.run(None, {"images": images.numpy()})[0]
    with torch.inference_mode():
        expected = exporting.tiny("timm_vit")({"images": images}).embedding.numpy()
    assert np.abs(whole - expected).max() < 1e-5
    assert np.abs(graph.run(None, {"images": images[:1].numpy()})[0] - expected[:1]).max() < 1e-5


def test_texts_and_images_of_a_sentence_transformer_lie_in_one_space(shared):
    from sentence_transformers import SentenceTransformer

    out = _exported(shared, "openclip", "sentence_transformers")
    model, alone = SentenceTransformer(str(out), device="cpu"), SentenceTransformer(locate().location, device="cpu")
    texts = ["a red star on a night sky", "a bowl of soup"]
    assert np.array_equal(model.encode(texts), alone.encode(texts))
    # Transparent, grey and palette pictures are taken as well.
    for mode in ("RGBA", "L", "P"):
        assert model.encode(Image.new(mode, (50, 40))).shape == (384,)


def test_exported_predictions_are_of_unit_length_and_unreadable_images_are_told(shared, tmp_path):
    from img2prompt.predictors.predictor import Item

    out = _exported(shared, "timm_vit", "timm")
    predictor = load(out, "cpu")
    items = [*drawn()[:2], Item("bad", "bad", lambda: b"no picture")]
    (found,) = predict_items(predictor, items)
    assert np.abs(np.linalg.norm(found.embeddings, axis=1) - 1).max() < 1e-6
    assert [name for name, _ in found.skipped] == ["bad"] and len(found) == 2
