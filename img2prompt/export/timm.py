"""A folder that `timm.create_model("local-dir:…", pretrained=True)` opens: the encoder, and the head as its classifier.

What the model says is the embedding before it has unit length.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import save_for_hf
from torch import Tensor, nn

from img2prompt.encoders.encoder import Preprocessing, load_strictly
from img2prompt.encoders.openclip import OpenCLIP
from img2prompt.encoders.timm_model import Timm
from img2prompt.export.clip_vit import clip_vit_of, timm_weights, white_constant
from img2prompt.export.folding import Layer, folded
from img2prompt.regressor import Regressor

WHICH = "encoder=timm and encoder=openclip, whose models timm has, with a linear head"
_CROP_MODES = {"shortest": "center", "longest": "border", "squash": "squash"}
# timm's names of CLIP's vision transformers: (width, layers, heads) -> size.
_SIZES = {
    (512, 12, 8): "medium",
    (768, 12, 12): "base",
    (1024, 24, 16): "large",
    (1280, 32, 16): "huge",
    (1408, 40, 16): "giant",
    (1664, 48, 16): "gigantic",
}


def write_timm(regressor: Regressor, folder: Path) -> str | None:
    """Fills `folder`, and says where timm's own transform is not the encoder's. It fills margins with the mean colour,
    and ours are white: where the model can take it, its mean becomes white. ValueError for an encoder or a head that
    timm does not have.
    """
    wanted = regressor.encoder.preprocessing
    model, layer, arguments = _model(regressor)
    classifier = model.get_classifier()
    if not isinstance(classifier, nn.Linear):
        raise ValueError(
            f"the encoder {regressor.encoder.config.get('name')} has no linear classifier in timm; format=onnx has any"
        )
    load_strictly(classifier, {"weight": layer.weight, "bias": layer.bias}, "the export")
    has_margin = wanted.resize_mode == "longest"
    is_white = has_margin and _takes_white_mean(model, wanted)
    size = wanted.image_size_px
    model.pretrained_cfg = {
        **model.pretrained_cfg,
        "num_classes": len(layer.bias),
        "input_size": (3, size, size),
        "mean": (1.0, 1.0, 1.0) if is_white else wanted.mean,
        "std": wanted.std,
        "interpolation": wanted.interpolation,
        "crop_pct": 1.0,
        "crop_mode": _CROP_MODES[wanted.resize_mode],
        **dict.fromkeys(("tag", "hf_hub_id", "hf_hub_filename", "url", "file", "test_input_size", "test_crop_pct")),
    }
    save_for_hf(model, str(folder), model_args=arguments, safe_serialization=True)
    if wanted.resize_mode == "shortest":
        return "cuts some images a pixel further to the right or below"
    return "fills margins with the mean colour, not with white" if has_margin and not is_white else None


def _model(regressor: Regressor) -> tuple[Any, Layer, dict[str, Any]]:
    """timm's model with an empty classifier, the layer for it, and the arguments that build the model."""
    encoder, dimension = regressor.encoder, {"num_classes": regressor.target.dimension}
    if isinstance(encoder, Timm):
        name, arguments = encoder.architecture()
        layer = _single(folded(regressor.head))
        return _with_classifier(name, arguments | dimension, encoder.model.state_dict()), layer, arguments | dimension
    if isinstance(encoder, OpenCLIP) and hasattr(encoder.visual, "trunk"):
        name, arguments = encoder.trunk_architecture()
        layer, weights = _of_trunk(regressor, encoder.visual)
        return _with_classifier(name, arguments | dimension, weights), layer, arguments | dimension
    if isinstance(encoder, OpenCLIP):
        vit = clip_vit_of(encoder)
        name, arguments = _of_clip(vit.config)
        layer = _single(folded(regressor.head, vit.projection))
        return _with_classifier(name, arguments | dimension, timm_weights(vit)), layer, arguments | dimension
    raise ValueError(f"the encoder {encoder.config.get('name')} is none of timm's; format=timm has {WHICH}")


def _of_clip(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """timm's name of a CLIP ViT, and all that its name does not say, or says otherwise."""
    width, depth, heads = (config[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    act = "quickgelu_" if config["hidden_act"] == "quick_gelu" else ""
    name = f"vit_{_SIZES.get((width, depth, heads))}_patch{config['patch_size']}_clip_{act}{config['image_size']}"
    return name if timm.is_model(name) else "vit_base_patch32_clip_224", {
        "img_size": config["image_size"],
        "patch_size": config["patch_size"],
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": config["intermediate_size"] / width,
        "act_layer": config["hidden_act"],
    }


def _of_trunk(regressor: Regressor, visual: Any) -> tuple[Layer, dict[str, Tensor]]:
    """Of open_clip's models around one of timm's: the last linear layer, joined with the head, and the weights before
    it.
    """
    weights, last = visual.trunk.state_dict(), visual.trunk.get_classifier()
    if hasattr(visual.head, "proj"):
        last = visual.head.proj
    elif len(visual.head):
        raise ValueError("the encoder ends with more than a linear layer; format=onnx has it")
    elif isinstance(last, nn.Linear):
        own = {id(parameter) for parameter in last.parameters()}
        state = visual.trunk.state_dict(keep_vars=True)
        weights = {key: value for key, value in weights.items() if id(state[key]) not in own}
    if not isinstance(last, nn.Linear):
        return _single(folded(regressor.head)), weights
    layer, plain = (_single(folded(regressor.head, one)) for one in (last.weight.detach().cpu(), None))
    if last.bias is not None:
        layer.bias = layer.bias + plain.weight @ last.bias.detach().float().cpu()
    return layer, weights


def _takes_white_mean(model: Any, wanted: Preprocessing) -> bool:
    """Makes the model one for pixels that are normalised by a mean of 1, where it exactly can be one: its first
    convolution's bias, or the positions that are added to its patches, take up what is missing.
    """
    # Another stem than the published one is found under another name, if at all.
    convolution = dict(model.named_modules()).get(str(model.pretrained_cfg.get("first_conv")))
    if type(convolution) is not nn.Conv2d or convolution.padding != (0, 0):
        return False
    constant = white_constant(convolution.weight, wanted)
    positions = getattr(model, "pos_embed", None)
    if convolution.bias is not None:
        convolution.bias.data += constant
    elif isinstance(positions, nn.Parameter) and positions.ndim == 3:
        # Positions of the class token, where it has one, come first.
        positions.data[:, positions.shape[1] - model.patch_embed.num_patches :] += constant
    else:
        return False
    return True


def _with_classifier(name: str, arguments: dict[str, Any], weights: dict[str, Tensor]) -> Any:
    """The model with these weights, and a classifier whose weights are zero."""
    try:
        model: Any = timm.create_model(name, pretrained=False, **arguments)
    except (TypeError, AttributeError, AssertionError, RuntimeError) as error:
        raise ValueError(f"timm builds no {name} with a classifier ({' '.join(str(error).split())[:160]})") from None
    classifier = model.get_classifier()
    own = {id(parameter) for parameter in classifier.parameters()} if isinstance(classifier, nn.Module) else set()
    state = model.state_dict(keep_vars=True)
    heads = {key: torch.zeros_like(value) for key, value in state.items() if id(value) in own}
    load_strictly(model, {**{key: value.cpu() for key, value in weights.items()}, **heads}, "the export")
    return model.eval()


def _single(layers: list[Layer]) -> Layer:
    if len(layers) > 1:
        raise ValueError(f"the head has {len(layers)} layers, and timm's classifier is one; format=onnx has any")
    return layers[0]
