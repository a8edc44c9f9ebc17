"""Image towers of open_clip: the CLIP family (ViT, ConvNeXt, EVA02, SigLIP) with the facts of their tags.

Only the image tower is built: the text tower of a ViT-H/14 alone is 1.4 GB, and no prediction uses it.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import open_clip
import timm
from jaxtyping import Float
from open_clip.model import CLIPVisionCfg, _build_vision_tower, resize_pos_embed
from timm.layers import PatchDropout
from torch import Tensor, nn

from img2prompt.encoders.blocks import has_tokens, modules_of_timm, of_modules, of_timm
from img2prompt.encoders.dropping import drop_blocks, drop_patches
from img2prompt.encoders.encoder import (
    Encoder,
    Preprocessing,
    checked_rate,
    load_strictly,
    read_keys,
    read_weights,
    suggest,
)
from img2prompt.encoders.text_tower import build_text_tower, text_features, text_tower_refusal, text_weights
from img2prompt.hub import HubFile


class OpenCLIP(Encoder):
    """The image tower `name`, with the input and the activation that belong to the pretrained `tag`.

    The tag's facts hold even when its weights are not loaded: without them open_clip gives SigLIP OpenAI's mean, and
    OpenAI's ViTs a GELU that they were not trained with. Each can be overridden; `vision_config` changes fields of
    the architecture (open_clip's CLIPVisionCfg). `drop_path`: the rate of stochastic depth in training. Pooled
    features are in CLIP's joint space. ValueError for an unknown name, tag or field.
    """

    def __init__(
        self,
        name: str,
        tag: str | None = None,
        image_size_px: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        interpolation: str | None = None,
        resize_mode: str | None = None,
        quick_gelu: bool | None = None,
        vision_config: Mapping[str, Any] | None = None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        # Names with a scheme (hf-hub:, local-dir:) are looked up elsewhere; a checkpoint must not cause that.
        config = open_clip.get_model_config(name) if ":" not in name else None
        if config is None:
            raise ValueError(f"encoder.name={name}: unknown to open_clip{suggest(name, open_clip.list_models())}")
        known_tags = open_clip.list_pretrained_tags_by_model(name)
        if tag is not None and tag not in known_tags:
            raise ValueError(f"encoder.tag={tag}: {name} has the tags {', '.join(known_tags) or '(none)'}")
        published = open_clip.get_pretrained_cfg(name, tag) if tag else {}
        if quick_gelu is None:
            quick_gelu = bool(published.get("quick_gelu", False) if tag else config.get("quick_gelu", False))
        self._architecture = _checked({**config["vision_cfg"], **(vision_config or {})})
        self._drop_path = checked_rate("encoder.drop_path", drop_path)
        if drop_path and self._architecture.get("timm_model_name") is not None:
            self._architecture["timm_drop_path"] = drop_path
        native_px = self._architecture["image_size"]
        self._native_px = native_px[0] if isinstance(native_px, list | tuple) else native_px
        self.width = config["embed_dim"]
        self.preprocessing = Preprocessing(
            image_size_px or self._native_px,
            mean or published.get("mean") or open_clip.OPENAI_DATASET_MEAN,
            std or published.get("std") or open_clip.OPENAI_DATASET_STD,
            interpolation or published.get("interpolation", "bicubic"),
            resize_mode or published.get("resize_mode", "shortest"),
        )
        self.facts = {**self.preprocessing.as_arguments(), "quick_gelu": quick_gelu}
        self._published = published
        self._name = name
        tower: Any = self._tower(self.preprocessing.image_size_px)
        if drop_path and not hasattr(tower, "trunk") and not hasattr(tower, "transformer"):
            raise ValueError(f"encoder.drop_path={drop_path}: {name} has no stochastic depth; set it to 0")
        if self._architecture.get("timm_proj") == "none":
            self.width = int(tower.trunk.num_features)
        self.visual = tower

    def trunk_architecture(self) -> tuple[str, dict[str, Any]]:
        """Of a tower around one of timm's models: its name there, and the arguments that build it."""
        pool, size = self._architecture.get("timm_pool"), self.preprocessing.image_size_px
        is_fixed = size != self._native_px and hasattr(self.visual.trunk, "set_input_size")
        arguments = {"global_pool": pool} if pool else {}
        return str(self._architecture["timm_model_name"]), arguments | ({"img_size": size} if is_fixed else {})

    def encode(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B E"]:
        return self.visual(pixels)

    def encode_layers(self, pixels: Float[Tensor, "B 3 H W"], count: int) -> tuple[Tensor, list[Tensor]]:
        visual: Any = self.visual
        is_transformer = has_tokens(visual.trunk) if hasattr(visual, "trunk") else hasattr(visual, "transformer")
        said = visual.forward_intermediates(pixels, indices=count, output_fmt="NLC" if is_transformer else "NCHW")
        return said["image_features"], said["image_intermediates"]

    def blocks(self) -> list[list[nn.Parameter]]:
        visual: Any = self.visual
        if hasattr(visual, "trunk"):
            *groups, last = of_timm(visual.trunk)
            return [*groups, [*last, *visual.head.parameters()]]
        last = [visual.proj] if getattr(visual, "proj", None) is not None else []
        return of_modules(visual, self.block_modules(), last)

    def block_modules(self) -> list[nn.Module]:
        visual: Any = self.visual
        if hasattr(visual, "trunk"):
            return modules_of_timm(visual.trunk)
        return list(visual.transformer.resblocks) if hasattr(visual, "transformer") else _resnet_blocks(visual)

    def set_image_size(self, image_size_px: int) -> None:
        visual: Any = self.visual
        if image_size_px == self.preprocessing.image_size_px:
            return
        if hasattr(visual, "trunk"):
            _set_input_size(visual, image_size_px)
        elif hasattr(visual, "transformer"):
            weights = visual.state_dict()
            larger = self._tower(image_size_px).to(next(visual.parameters()))
            _resample_positions(weights, larger)
            larger.load_state_dict(weights)
            self.visual = larger.train(visual.training)
        else:
            raise ValueError(f"encoder.name={self.config.get('name')}: it has no other input size")
        self._note_image_size(image_size_px)

    def set_patch_dropout(self, rate: float) -> None:
        visual: Any = self.visual
        if hasattr(visual, "trunk") and has_tokens(visual.trunk):
            drop_patches(visual.trunk, rate)
        elif hasattr(visual, "transformer"):
            dropout = PatchDropout(rate, num_prefix_tokens=1).train(visual.training)
            visual.patch_dropout = dropout if rate else nn.Identity()
        else:
            super().set_patch_dropout(rate)

    def checkpoint_activations(self) -> None:
        visual: Any = self.visual
        if not hasattr(visual, "trunk") and not hasattr(visual, "transformer"):
            super().checkpoint_activations()
        visual.set_grad_checkpointing(True)

    def downloads(self) -> list[HubFile]:
        repository, filename = os.path.split(self._published.get("hf_hub", ""))
        # Of a folder open_clip takes this file first.
        return [HubFile(repository, filename or "open_clip_model.safetensors")] if repository else []

    def text_refusal(self, path: str | None = None) -> str | None:
        if self.width != open_clip.get_model_config(self._name)["embed_dim"]:
            return "the image tower has no projection into the space of the text tower"
        if path is not None and not text_weights(dict.fromkeys(read_keys(path))):
            return f"{path} holds no text tower"
        return text_tower_refusal(self._name)

    def text_features(
        self, prompts: Sequence[str], path: str | None, device: str, advance: Callable[[int], object]
    ) -> Float[Tensor, "N E"]:
        return text_features(self.text_tower(path), self._name, prompts, device, advance)

    def text_tower(self, path: str | None) -> nn.Module:
        """The tower that belongs to it, with the published weights or those of the file `path`."""
        where = self.weights_file(path)
        return build_text_tower(self._name, bool(self.facts["quick_gelu"]), read_weights(where), where)

    def load_pretrained(self, path: str | None = None) -> None:
        where = self.weights_file(path)
        weights = read_weights(where)
        tower = {key.removeprefix("visual."): value for key, value in weights.items() if key.startswith("visual.")}
        tower = tower or dict(weights)
        if "positional_embedding" in tower:
            _resample_positions(tower, self.visual)
            load_strictly(self.visual, tower, where)
        else:
            # timm's trunks resample theirs in the model.
            native = self._tower(self._native_px)
            load_strictly(native, tower, where)
            _set_input_size(native, self.preprocessing.image_size_px)
            self.visual.load_state_dict(native.state_dict())

    def weights_file(self, path: str | None) -> str:
        """The file of the weights: `path`, or the published ones, which are fetched."""
        if path is None and not self._published:
            raise ValueError("encoder.pretrained=true needs encoder.tag; or give a local weights file")
        try:
            return path or open_clip.download_pretrained(self._published)
        except (OSError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:120]
            raise ValueError(
                f"encoder.tag: its weights cannot be had ({reason}); give encoder.pretrained=FILE"
            ) from None

    def _tower(self, image_size_px: int) -> nn.Module:
        config = CLIPVisionCfg(**self._architecture)
        if config.timm_model_name is None:
            config.image_size = image_size_px
        tower = _build_vision_tower(self.width, config, quick_gelu=self.facts["quick_gelu"])
        if config.timm_model_name is not None and image_size_px != self._native_px:
            _set_input_size(tower, image_size_px)
        tower.output_tokens = False
        if self._drop_path and hasattr(tower, "transformer"):
            drop_blocks(list(tower.transformer.resblocks), self._drop_path)
        return tower


def _resample_positions(weights: dict[str, Tensor], tower: nn.Module) -> None:
    # open_clip resamples position embeddings of its own ViT in the state dict, under the model's key.
    wrapped = {"visual.positional_embedding": weights["positional_embedding"]}
    resize_pos_embed(wrapped, SimpleNamespace(visual=tower))
    weights["positional_embedding"] = wrapped["visual.positional_embedding"]


def _resnet_blocks(visual: Any) -> list[nn.Module]:
    return [block for layer in (visual.layer1, visual.layer2, visual.layer3, visual.layer4) for block in layer]


def _set_input_size(tower: Any, image_size_px: int) -> None:
    # Convolutional trunks take any size and have no such method.
    if hasattr(tower.trunk, "set_input_size"):
        tower.trunk.set_input_size(img_size=(image_size_px, image_size_px))


def _checked(vision_config: dict[str, Any]) -> dict[str, Any]:
    known = {field.name for field in fields(CLIPVisionCfg)}
    for key in vision_config:
        if key not in known:
            raise ValueError(f"encoder.vision_config.{key}: no such field{suggest(key, sorted(known))}")
    trunk = vision_config.get("timm_model_name")
    if trunk is not None and not timm.is_model(trunk):
        raise ValueError(f"encoder.vision_config.timm_model_name={trunk}: unknown to timm")
    # The trunk's own weights would be fetched by the constructor.
    return {**vision_config, "timm_model_pretrained": False}
