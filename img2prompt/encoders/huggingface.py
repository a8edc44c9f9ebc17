"""Vision encoders of transformers: a name on the Hub or a local folder with config.json and weights."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor
from transformers import AutoConfig, AutoModel
from transformers.utils import cached_file

from img2prompt.encoders.encoder import Encoder, Features, Preprocessing, load_strictly, read_weights
from img2prompt.hub import HubFile, describe, is_cached

# Backbones that are built from their config alone. Composite models (detectors, depth estimators) may name a second
# model in their config and fetch it while they are built; a checkpoint must not cause that.
MODEL_TYPES = (
    "beit",
    "clip_vision_model",
    "convnext",
    "convnextv2",
    "deit",
    "dinov2",
    "dinov2_with_registers",
    "dinov3_convnext",
    "dinov3_vit",
    "siglip2_vision_model",
    "siglip_vision_model",
    "swin",
    "swinv2",
    "vit",
    "vit_mae",
    "vit_msn",
)
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_PIL_RESAMPLING = {2: "bilinear", 3: "bicubic"}


class HuggingFace(Encoder):
    """The vision model `name` at revision `tag`; of a model with several towers, the image tower.

    Pooled features are the model's pooler output or, where it has none, the mean of its tokens. `architecture` is
    the model's config as plain data; it is read from the folder or the Hub when not given, and saved, so that a
    checkpoint is loaded without either. ValueError for an unknown name or a model that is no vision backbone.
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
        architecture: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self._name, self._revision = name, tag
        published: dict[str, Any] = {}
        if architecture is None:
            announced = HubFile(name, "config.json", tag)
            if not Path(name).is_dir() and not is_cached(announced):
                # The architecture is known from this file alone, so it is fetched before there is a plan to print.
                print(f"asking the Hub for {describe(HubFile(name, 'model.safetensors', tag))}", file=sys.stderr)
            architecture = _vision_config(_read_json(name, tag, "config.json", required=True))
            published = _read_json(name, tag, "preprocessor_config.json", required=False)
        architecture = dict(architecture)
        model_type = architecture.pop("model_type", None)
        if model_type not in MODEL_TYPES:
            raise ValueError(f"encoder.name={name}: {model_type} is not one of {', '.join(MODEL_TYPES)}")
        # Keys with an underscore and attn_implementation choose code; code comes from the library alone.
        plain = {key: value for key, value in architecture.items() if _is_architecture(key)}
        if image_size_px and "image_size" in plain:
            plain["image_size"] = image_size_px
        config = AutoConfig.for_model(model_type, **plain)
        self.model = AutoModel.from_config(
            config, attn_implementation="sdpa" if _has_attention(model_type) else "eager"
        )
        if model_type in ("vit", "deit"):
            # Their pooler belongs to a pretraining task and is missing from most published weights.
            self.model.pooler = None
        self.width = int(getattr(config, "hidden_size", None) or config.hidden_sizes[-1])
        self.preprocessing = Preprocessing(
            image_size_px or _size_px(published) or int(plain.get("image_size", 224)),
            mean or published.get("image_mean") or _IMAGENET[0],
            std or published.get("image_std") or _IMAGENET[1],
            interpolation or _PIL_RESAMPLING.get(published.get("resample", 3), "bicubic"),
            resize_mode or "longest",
        )
        self.facts = {
            **self.preprocessing.as_arguments(),
            "architecture": {"model_type": model_type, **plain},
        }

    def encode(self, pixels: Float[Tensor, "B 3 H W"]) -> Features:
        output = self.model(pixel_values=pixels)
        pooled = getattr(output, "pooler_output", None)
        return Features(pooled=output.last_hidden_state.mean(dim=1) if pooled is None else pooled.flatten(1))

    def download(self) -> HubFile | None:
        return None if Path(self._name).is_dir() else HubFile(self._name, "model.safetensors", self._revision)

    def load_pretrained(self, path: str | None = None) -> None:
        if path is not None:
            load_strictly(self.model, _without_prefix(read_weights(path), self.model.base_model_prefix), path)
            return
        # from_pretrained renames keys of older files and resamples position embeddings where the model can.
        loaded, report = type(self.model).from_pretrained(
            self._name,
            revision=self._revision or "main",
            config=self.model.config,
            use_safetensors=True,
            output_loading_info=True,
        )
        if report["missing_keys"]:
            raise ValueError(f"{self._name}: no weights for {sorted(report['missing_keys'])[0]}")
        self.model.load_state_dict(loaded.state_dict())


def _read_json(name: str, revision: str | None, filename: str, required: bool) -> dict[str, Any]:
    try:
        path = cached_file(
            name,
            filename,
            revision=revision or "main",
            _raise_exceptions_for_missing_entries=required,
            _raise_exceptions_for_connection_errors=required,
        )
    except OSError as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"encoder.name={name}: neither a folder with {filename} nor a model to be had from the Hub ({reason})"
        ) from None
    return json.loads(Path(path).read_text()) if path else {}


def _vision_config(config: dict[str, Any]) -> dict[str, Any]:
    vision = config.get("vision_config")
    if not isinstance(vision, dict):
        return config
    # Older files leave the tower's type to the model's: clip -> clip_vision_model.
    return {**vision, "model_type": vision.get("model_type") or f"{config['model_type']}_vision_model"}


def _is_architecture(key: str) -> bool:
    return not key.startswith("_") and key not in ("attn_implementation", "auto_map", "quantization_config")


def _has_attention(model_type: str) -> bool:
    return not model_type.startswith(("convnext", "dinov3_convnext", "swin"))


def _size_px(published: Mapping[str, Any]) -> int | None:
    # {"size": 224} or {"size": {"height": 224, …}} or {"size": {"shortest_edge": 256}, "crop_size": {"height": 224}}
    size = published.get("crop_size") or published.get("size")
    if isinstance(size, Mapping):
        size = size.get("height") or size.get("shortest_edge")
    return int(size) if size else None


def _without_prefix(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    start = f"{prefix}."
    inside = {key.removeprefix(start): value for key, value in weights.items() if key.startswith(start)}
    return inside or weights
