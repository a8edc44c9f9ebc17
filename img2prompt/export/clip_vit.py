"""CLIP's vision transformer under the names of any library: open_clip's, timm's and transformers' hold the same one.

Its neutral form has transformers' names (CLIPVisionModel).

# H = width of the transformer, N = tokens (the class token first), E = width of the pooled features
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from open_clip.model import VisionTransformer
from open_clip.transformer import QuickGELU
from timm.layers import QuickGELU as TimmQuickGELU
from timm.models.vision_transformer import VisionTransformer as TimmTransformer
from torch import Tensor, nn

from img2prompt.encoders.encoder import Encoder, Preprocessing
from img2prompt.encoders.huggingface import HuggingFace
from img2prompt.encoders.openclip import OpenCLIP
from img2prompt.encoders.timm_model import Timm

WHICH = (
    "encoder=openclip with a ViT, encoder=timm with a vit_*_clip_* and encoder=huggingface with a clip_vision_model are"
)
# Of a layer: transformers' name, open_clip's, timm's; queries, keys and values are one tensor in the last two.
_LAYER = (
    ("layer_norm1", "ln_1", "norm1"),
    ("self_attn.out_proj", "attn.out_proj", "attn.proj"),
    ("layer_norm2", "ln_2", "norm2"),
    ("mlp.fc1", "mlp.c_fc", "mlp.fc1"),
    ("mlp.fc2", "mlp.c_proj", "mlp.fc2"),
)
_AROUND = (
    ("embeddings.patch_embedding", "conv1", "patch_embed.proj"),
    ("pre_layrnorm", "ln_pre", "norm_pre"),
    ("post_layernorm", "ln_post", "norm"),
)
_PARTS = ("q_proj", "k_proj", "v_proj")


@dataclass
class ClipViT:
    """The transformer: transformers' configuration and weights; `projection` is what makes the pooled features of its
    pooled output, where there is one.
    """

    config: dict[str, Any]
    weights: dict[str, Tensor]
    projection: Float[Tensor, "E H"] | None = None


def clip_vit_of(encoder: Encoder) -> ClipViT:
    """The CLIP ViT that the encoder is. ValueError, which says which are, for any other."""
    name, size_px = encoder.config.get("name"), encoder.preprocessing.image_size_px
    if isinstance(encoder, OpenCLIP) and isinstance(encoder.visual, VisionTransformer):
        found = _of_open_clip(encoder.visual, size_px)
    elif isinstance(encoder, Timm) and isinstance(encoder.model, TimmTransformer):
        found = _of_timm(encoder.model, size_px)
    elif isinstance(encoder, HuggingFace) and encoder.model.config.model_type == "clip_vision_model":
        found = ClipViT(encoder.model.config.to_dict(), dict(encoder.model.state_dict()))
        if found.config["image_size"] != size_px:
            raise ValueError(
                f"the encoder {name} was made for {found.config['image_size']} px and resamples its positions to "
                f"{size_px} px as it goes, which CLIPVisionModel does not"
            )
    else:
        found = None
    if found is None:
        raise ValueError(f"the encoder {name} is no vision transformer of CLIP, as {WHICH}; format=onnx has any")
    found.weights = {key: value.detach().float().cpu().contiguous() for key, value in found.weights.items()}
    return found


def with_white_mean(vit: ClipViT, preprocessing: Preprocessing) -> ClipViT:
    """The same transformer for pixels that are normalised by a mean of 1 in place of the encoder's own.

    Other tools fill margins with the mean colour, ours are white. What is missing then each patch token gets through
    its position instead.
    """
    constant = white_constant(vit.weights["embeddings.patch_embedding.weight"], preprocessing)
    positions = vit.weights["embeddings.position_embedding.weight"].clone()
    positions[1:] += constant
    weights = {**vit.weights, "embeddings.position_embedding.weight": positions}
    return ClipViT(vit.config, weights, vit.projection)


def white_constant(convolution: Float[Tensor, "H 3 h w"], preprocessing: Preprocessing) -> Float[Tensor, " H"]:
    """What a convolution without padding says more of (x - mean) / std than of (x - 1) / std: the same everywhere."""
    shift = (1 - torch.tensor(preprocessing.mean)) / torch.tensor(preprocessing.std)
    return torch.einsum("hcyx,c->h", convolution.detach().float().cpu(), shift)


def timm_weights(vit: ClipViT) -> dict[str, Tensor]:
    """The weights by timm's names, without a classifier."""
    weights = vit.weights
    found = {
        "cls_token": weights["embeddings.class_embedding"][None, None],
        "pos_embed": weights["embeddings.position_embedding.weight"][None],
    }
    for theirs, _, ours in _AROUND:
        found |= _renamed(weights, theirs, ours)
    for number in range(vit.config["num_hidden_layers"]):
        layer, block = f"encoder.layers.{number}", f"blocks.{number}"
        for theirs, _, ours in _LAYER:
            found |= _renamed(weights, f"{layer}.{theirs}", f"{block}.{ours}")
        for kind in ("weight", "bias"):
            parts = [weights[f"{layer}.self_attn.{part}.{kind}"] for part in _PARTS]
            found[f"{block}.attn.qkv.{kind}"] = torch.cat(parts)
    return found


def _of_open_clip(visual: Any, size_px: int) -> ClipViT | None:
    block = visual.transformer.resblocks[0]
    act = block.mlp[1]
    is_plain = (
        visual.attn_pool is None
        and visual.pool_type == "tok"
        and not visual.final_ln_after_pool
        and isinstance(visual.ln_pre, nn.LayerNorm)
        and isinstance(block.ls_1, nn.Identity)
        and isinstance(block.attn, nn.MultiheadAttention)
        and (isinstance(act, QuickGELU) or isinstance(act, nn.GELU) and act.approximate == "none")
    )
    if not is_plain:
        return None
    weights = visual.state_dict()
    found = {
        "embeddings.class_embedding": weights["class_embedding"],
        "embeddings.position_embedding.weight": weights["positional_embedding"],
    }
    for ours, theirs, _ in _AROUND:
        found |= _renamed(weights, theirs, ours)
    for number, _ in enumerate(visual.transformer.resblocks):
        layer, theirs_layer = f"encoder.layers.{number}", f"transformer.resblocks.{number}"
        for ours, theirs, _ in _LAYER:
            found |= _renamed(weights, f"{theirs_layer}.{theirs}", f"{layer}.{ours}")
        for kind in ("weight", "bias"):
            found |= _split(weights[f"{theirs_layer}.attn.in_proj_{kind}"], layer, kind)
    act_name = "quick_gelu" if isinstance(act, QuickGELU) else "gelu"
    config = _config(found, size_px, block.attn.num_heads, act_name, visual.ln_post.eps)
    return ClipViT(config, found, None if visual.proj is None else visual.proj.detach().float().cpu().T)


def _of_timm(model: Any, size_px: int) -> ClipViT | None:
    block = model.blocks[0]
    act = block.mlp.act
    is_plain = (
        model.global_pool == "token"
        and model.cls_token is not None
        and not model.no_embed_class
        and getattr(model, "reg_token", None) is None
        and isinstance(model.norm_pre, nn.LayerNorm)
        and isinstance(model.norm, nn.LayerNorm)
        and isinstance(model.fc_norm, nn.Identity)
        and model.patch_embed.proj.bias is None
        and block.attn.qkv.bias is not None
        and isinstance(block.ls1, nn.Identity)
        and isinstance(block.attn.q_norm, nn.Identity)
        and isinstance(block.mlp.norm, nn.Identity)
        and isinstance(model.head, nn.Identity)
        and (isinstance(act, TimmQuickGELU) or isinstance(act, nn.GELU) and act.approximate == "none")
    )
    if not is_plain:
        return None
    weights = model.state_dict()
    found = {
        "embeddings.class_embedding": weights["cls_token"][0, 0],
        "embeddings.position_embedding.weight": weights["pos_embed"][0],
    }
    for ours, _, theirs in _AROUND:
        found |= _renamed(weights, theirs, ours)
    for number, _ in enumerate(model.blocks):
        layer = f"encoder.layers.{number}"
        for ours, _, theirs in _LAYER:
            found |= _renamed(weights, f"blocks.{number}.{theirs}", f"{layer}.{ours}")
        for kind in ("weight", "bias"):
            found |= _split(weights[f"blocks.{number}.attn.qkv.{kind}"], layer, kind)
    act_name = "quick_gelu" if isinstance(act, TimmQuickGELU) else "gelu"
    return ClipViT(_config(found, size_px, block.attn.num_heads, act_name, model.norm.eps), found)


def _renamed(weights: Mapping[str, Tensor], before: str, after: str) -> dict[str, Tensor]:
    kinds = [kind for kind in ("weight", "bias") if f"{before}.{kind}" in weights]
    return {f"{after}.{kind}": weights[f"{before}.{kind}"] for kind in kinds}


def _split(joined: Tensor, layer: str, kind: str) -> dict[str, Tensor]:
    parts = joined.chunk(3)
    return {f"{layer}.self_attn.{name}.{kind}": part for name, part in zip(_PARTS, parts, strict=True)}


def _config(weights: Mapping[str, Tensor], size_px: int, heads: int, act: str, eps: float) -> dict[str, Any]:
    patches = weights["embeddings.patch_embedding.weight"]  # [H, 3, p, p]
    layers = {match[1] for key in weights if (match := re.match(r"encoder\.layers\.(\d+)\.", key))}
    return {
        "model_type": "clip_vision_model",
        "hidden_size": patches.shape[0],
        "intermediate_size": len(weights["encoder.layers.0.mlp.fc1.weight"]),
        "num_hidden_layers": len(layers),
        "num_attention_heads": heads,
        "num_channels": 3,
        "image_size": size_px,
        "patch_size": patches.shape[2],
        "hidden_act": act,
        "layer_norm_eps": eps,
    }
