"""Regressors that are built in a moment, one of each family of encoders, with weights drawn at random."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from img2prompt.build import build
from img2prompt.encoders.encoder import Encoder
from img2prompt.regressor import Regressor, Target, build_regressor

_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
FAMILIES = {
    "timm": {
        "_target_": "img2prompt.encoders.timm_model.Timm",
        "name": "test_vit",
        "image_size_px": 32,
        "model_kwargs": {"patch_size": 8},
    },
    "openclip": {
        "_target_": "img2prompt.encoders.openclip.OpenCLIP",
        "name": "ViT-B-32",
        "tag": "openai",
        "image_size_px": 64,
        "vision_config": {"layers": 2, "width": 64, "head_width": 32},
    },
    "huggingface": {
        "_target_": "img2prompt.encoders.huggingface.HuggingFace",
        "name": "owner/model",
        "architecture": {"model_type": "dinov2", "image_size": 28, **_SMALL},
    },
}
LINEAR = "img2prompt.heads.Linear"
MINILM = Target("sentence-transformers/all-MiniLM-L6-v2", None, 384)


def tiny_regressor(family: str, target: Target = MINILM, head: Mapping[str, Any] | None = None) -> Regressor:
    torch.manual_seed(0)
    regressor = build_regressor(build(FAMILIES[family], Encoder), head or {"_target_": LINEAR}, target)
    regressor.target_mean += torch.randn(target.dimension)
    return regressor.eval()


def tiny_checkpoint(path: Path, family: str, target: Target = MINILM) -> Path:
    tiny_regressor(family, target).save(path)
    return path
