"""Small regressors of every family that can be exported, as checkpoints with random weights."""

from pathlib import Path

import torch
from torch.nn import functional

from img2prompt.build import build
from img2prompt.encoders.encoder import Encoder
from img2prompt.regressor import Regressor, Target, build_regressor

MINILM = Target("sentence-transformers/all-MiniLM-L6-v2", None, 384)
_OPENCLIP = "img2prompt.encoders.openclip.OpenCLIP"
_TIMM = "img2prompt.encoders.timm_model.Timm"
_VIT = {"layers": 2, "width": 64, "head_width": 16, "patch_size": 8, "image_size": 32}
_SMALL_CLIP = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
_HF = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
_HF |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 8, "hidden_act": "gelu"}
_TRUNK = {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": None, "image_size": 160}
ENCODERS = {
    "openclip": {"_target_": _OPENCLIP, "name": "ViT-S-32-alt", "vision_config": _VIT},
    "openclip_quick": {
        **{"_target_": _OPENCLIP, "name": "ViT-S-32-alt", "vision_config": _VIT},
        **{"quick_gelu": True, "resize_mode": "longest", "image_size_px": 40},
    },
    "timm_clip": {"_target_": _TIMM, "name": "vit_base_patch32_clip_224", "image_size_px": 32},
    "timm_vit": {"_target_": _TIMM, "name": "test_vit", "image_size_px": 32, "model_kwargs": {"patch_size": 8}},
    "timm_convolutions": {"_target_": _TIMM, "name": "test_efficientnet", "resize_mode": "squash"},
    "timm_resnet": {"_target_": _TIMM, "name": "test_resnet"},
    "openclip_trunk": {"_target_": _OPENCLIP, "name": "EVA02-B-16", "vision_config": _TRUNK},
    "openclip_projected": {
        **{"_target_": _OPENCLIP, "name": "convnext_base"},
        "vision_config": {**_TRUNK, "timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "linear"},
    },
    # As SigLIP's.
    "openclip_map": {
        **{"_target_": _OPENCLIP, "name": "ViT-B-16-SigLIP"},
        "vision_config": {**_TRUNK, "timm_model_name": "test_vit2", "timm_pool": "map", "timm_proj": "none"},
    },
    "huggingface_clip": {
        "_target_": "img2prompt.encoders.huggingface.HuggingFace",
        **{"name": "tiny", "architecture": _HF, "image_size_px": 32},
    },
}
ENCODERS["timm_clip"]["model_kwargs"] = _SMALL_CLIP
# Of transformers, at another size than their own.
ENCODERS |= {
    f"huggingface_{kind}": {
        "_target_": "img2prompt.encoders.huggingface.HuggingFace",
        **{"name": "tiny", "architecture": {**_HF, "model_type": kind, "hidden_act": "gelu"}, "image_size_px": 48},
    }
    for kind in ("vit", "dinov2", "siglip_vision_model", "clip_vision_model")
}
LINEAR = {"_target_": "img2prompt.heads.Linear"}
HEADS = {
    "linear": LINEAR,
    "mlp": {"_target_": "img2prompt.heads.MLP", "hidden": 48},
    "attention": {"_target_": "img2prompt.heads.AttentionPool", "heads": 4},
    "layers": {**LINEAR, "layers": 2},
    "deep": {"_target_": "img2prompt.heads.DeepMLP", "hidden": [40, 24]},
    "vocabulary": {
        "_target_": "img2prompt.heads.JointVocabulary",
        **{"vocabulary_size": 2, "vocabulary": ["a", "b"], "hidden": [40]},
    },
}


# One of each library.
FAMILIES = {"timm": "timm_vit", "openclip": "openclip", "huggingface": "huggingface_dinov2"}


def tiny(encoder: str, head: str = "linear", seed: int = 0, target: Target = MINILM) -> Regressor:
    torch.manual_seed(seed)
    found = build_regressor(build(ENCODERS[encoder], Encoder), HEADS[head], target)
    for module in found.modules():
        # As if it had been trained: statistics that are no identity.
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.3)
    found.target_mean.copy_(functional.normalize(torch.randn(target.dimension), dim=0))
    return found.eval()


def checkpoint(folder: Path, encoder: str, head: str = "linear") -> Path:
    path = folder / f"{encoder}_{head}.safetensors"
    if not path.exists():
        tiny(encoder, head).save(path, {"rung": "finetune", "val_cosine": 0.5})
    return path
