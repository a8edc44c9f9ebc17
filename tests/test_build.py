"""The one door: what a checkpoint's header may build, and what it may not."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from img2prompt.build import build
from img2prompt.encoders.encoder import Encoder
from img2prompt.heads import Head
from img2prompt.regressor import load_regressor

HOSTILE = [
    "os.system",
    "pathlib.Path.write_text",
    "img2prompt.encoders.openclip.os.system",
    "img2prompt.encoders.openclip.timm.create_model",
    "img2prompt.encoders.timm_model.timm",
    "img2prompt.encoders.encoder.Encoder",
    "img2prompt.encoders.timm_model.Encoder",
    "img2prompt.encoders.timm_model.read_weights",
    "img2prompt.heads.Head",
    "img2prompt.heads.torch.nn.Linear",
    "img2prompt.training.optim.AdamW",
    "img2prompt.files.write_text",
    "Timm",
    "",
]


@pytest.mark.parametrize("target", HOSTILE)
def test_only_our_own_classes_are_built(target):
    for interface in (Encoder, Head):
        with pytest.raises(ValueError, match="not one of our"):
            build({"_target_": target, "path": "x", "data": "y"}, interface)


def test_a_head_is_no_encoder():
    with pytest.raises(ValueError, match="not one of our Encoder classes"):
        build({"_target_": "img2prompt.heads.Linear"}, Encoder, in_features=1, out_features=1)


def test_a_missing_target_and_unknown_arguments_are_named():
    with pytest.raises(ValueError, match="needs a _target_"):
        build({"name": "x"}, Encoder)
    with pytest.raises(ValueError, match="unexpected keyword argument 'widht'; it takes in_features"):
        build({"_target_": "img2prompt.heads.Linear", "widht": 3}, Head, in_features=1, out_features=1)


def test_arguments_are_plain_data():
    with pytest.raises(ValueError, match="must be plain data, got function"):
        build({"_target_": "img2prompt.heads.Linear", "dropout": lambda: 0}, Head, in_features=1, out_features=1)


def test_the_record_builds_the_same_module_again():
    given = {"_target_": "img2prompt.encoders.timm_model.Timm", "name": "test_vit", "tag": "r160_in1k"}
    first = build(given, Encoder)
    assert {"mean", "std", "image_size_px", "interpolation", "resize_mode"} <= first.config.keys()
    second = build(json.loads(json.dumps(first.config)), Encoder)
    assert second.config == first.config and second.preprocessing == first.preprocessing


@pytest.mark.parametrize(
    "encoder",
    [
        *({"_target_": target, "args": ["touch", "marker"], "command": "touch marker"} for target in HOSTILE),
        {"_target_": "img2prompt.encoders.timm_model.Timm", "name": "hf-hub:somebody/model"},
        {"_target_": "img2prompt.encoders.timm_model.Timm", "name": "local-dir:/tmp"},
        {
            "_target_": "img2prompt.encoders.timm_model.Timm",
            "name": "test_vit",
            "model_kwargs": {"checkpoint_path": "evil.pt"},
        },
        {
            "_target_": "img2prompt.encoders.timm_model.Timm",
            "name": "test_vit",
            "model_kwargs": {"pretrained_cfg_overlay": {"file": "evil.pt"}},
        },
        {"_target_": "img2prompt.encoders.openclip.OpenCLIP", "name": "hf-hub:somebody/model"},
        {
            "_target_": "img2prompt.encoders.openclip.OpenCLIP",
            "name": "ViT-B-32",
            "vision_config": {"timm_model_name": "hf-hub:somebody/model"},
        },
        {
            "_target_": "img2prompt.encoders.huggingface.HuggingFace",
            "name": "x",
            "architecture": {"model_type": "dpt", "backbone": "somebody/model", "use_pretrained_backbone": True},
        },
    ],
)
def test_a_hostile_header_is_refused_and_runs_nothing(encoder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    header = {
        "format_version": 1,
        "kind": "regressor",
        "encoder": encoder,
        "head": {"_target_": "img2prompt.heads.Linear"},
        "target": {"model": "x", "revision": None, "dimension": 4},
        "scores": {},
    }
    path = tmp_path / "evil.safetensors"
    save_file({"target_mean": torch.zeros(4)}, path, metadata={"img2prompt": json.dumps(header)})
    with pytest.raises(ValueError, match="its header cannot be built"):
        load_regressor(path)
    assert not (tmp_path / "marker").exists()


def test_the_module_of_a_refused_target_is_not_even_imported():
    program = (
        "import sys\n"
        "from img2prompt.build import build\n"
        "from img2prompt.encoders.encoder import Encoder\n"
        "try:\n    build({'_target_': 'antigravity.fly'}, Encoder)\n"
        "except ValueError:\n    print('antigravity' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "False"
