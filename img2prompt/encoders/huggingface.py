"""Vision encoders of transformers: a name on the Hub or a local folder with config.json and weights."""

import inspect
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from img2prompt.encoders.blocks import of_modules
from img2prompt.encoders.encoder import Encoder, Preprocessing, checked_rate, read_weights
from img2prompt.hub import HubFile, describe, is_cached

# Backbones that are built from their config alone, and see the whole image (vit_mae hides a part, at random). Composite
# models (detectors, depth estimators) may name a second model in their config and fetch it while they are built; a
# checkpoint must not cause that.
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
    "siglip_vision_model",
    "swin",
    "swinv2",
    "vit",
    "vit_msn",
)
# Their pooler belongs to a pretraining task and is missing from most published weights.
_POOLERLESS = ("vit", "deit")
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_PIL_RESAMPLING = {2: "bilinear", 3: "bicubic"}


class HuggingFace(Encoder):
    """The vision model `name` at revision `tag`; of a model with several towers, the image tower.

    Pooled features are the model's pooler output or, where it has none, the mean of its tokens. `architecture` is
    the model's config as plain data; it is read from the folder or the Hub when not given, and saved, so that a
    checkpoint is loaded without either. `drop_path`: the rate of stochastic depth in training. ValueError for an
    unknown name or a model that is no vision backbone.
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
        drop_path: float = 0.0,
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
        config = AutoConfig.for_model(model_type, **plain)
        if checked_rate("encoder.drop_path", drop_path):
            if not hasattr(config, "drop_path_rate"):
                raise ValueError(f"encoder.drop_path={drop_path}: {model_type} has no stochastic depth; set it to 0")
            config.drop_path_rate = drop_path
        self.model = AutoModel.from_config(
            config, attn_implementation="sdpa" if _has_attention(model_type) else "eager"
        )
        if model_type in _POOLERLESS:
            self.model.pooler = None
        self.width = int(getattr(config, "hidden_size", None) or config.hidden_sizes[-1])
        self.preprocessing = Preprocessing(
            image_size_px or _size_px(published) or int(plain.get("image_size", 224)),
            mean or published.get("image_mean") or _IMAGENET[0],
            std or published.get("image_std") or _IMAGENET[1],
            interpolation or _PIL_RESAMPLING.get(published.get("resample", 3), "bicubic"),
            resize_mode or "longest",
        )
        takes = inspect.signature(self.model.forward).parameters
        # Models with learned positions resample them to another input size, if they are told to.
        self._options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in takes else {}
        self.facts = {
            **self.preprocessing.as_arguments(),
            "architecture": {"model_type": model_type, **plain},
        }

    def encode(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B E"]:
        return _pooled(self.model(pixel_values=pixels, **self._options))

    def encode_layers(self, pixels: Float[Tensor, "B 3 H W"], count: int) -> tuple[Tensor, list[Tensor]]:
        output = self.model(pixel_values=pixels, output_hidden_states=True, **self._options)
        # The first is what the embeddings say. Swin gives its maps under another name.
        said = (getattr(output, "reshaped_hidden_states", None) or output.hidden_states)[1:]
        if count > len(said):
            raise ValueError(f"encoder.name={self._name}: head.layers={count}, the encoder has {len(said)}")
        return _pooled(output), list(said[-count:])

    def blocks(self) -> list[list[nn.Parameter]]:
        return of_modules(self.model, self.block_modules())

    def block_modules(self) -> list[nn.Module]:
        # The modules that the library never splits over devices are its blocks; some models count the embeddings too.
        names = {name for name in self.model._no_split_modules or () if "Embeddings" not in name}
        return [module for module in self.model.modules() if type(module).__name__ in names]

    def set_image_size(self, image_size_px: int) -> None:
        # These models resample their positions as they go.
        self._note_image_size(image_size_px)

    def checkpoint_activations(self) -> None:
        if not self.model.supports_gradient_checkpointing:
            super().checkpoint_activations()
        # Renamed in transformers 5.
        enable = (
            getattr(self.model, "activation_checkpointing_enable", None) or self.model.gradient_checkpointing_enable
        )
        enable({"use_reentrant": False})

    def downloads(self) -> list[HubFile]:
        return [] if Path(self._name).is_dir() else [HubFile(self._name, "model.safetensors", self._revision)]

    def load_pretrained(self, path: str | None = None) -> None:
        # from_pretrained renames the keys of published files, which are not those of the model in memory.
        transformers_logging.disable_progress_bar()
        where = path or self._name
        try:
            loaded, report = type(self.model).from_pretrained(
                None if path else self._name,
                state_dict=read_weights(path) if path else None,
                revision=self._revision or "main",
                config=self.model.config,
                use_safetensors=True,
                output_loading_info=True,
            )
        except RuntimeError as error:
            raise ValueError(f"{where}: not the weights of this model ({' '.join(str(error).split())[:160]})") from None
        missing = sorted(key for key in report["missing_keys"] if key in self.model.state_dict())
        if missing:
            raise ValueError(
                f"{where}: not the weights of this model: {len(missing)} tensors missing (first: {missing[0]}); check "
                "the encoder name against the file"
            )
        if loaded.config.model_type in _POOLERLESS:
            loaded.pooler = None
        self.model.load_state_dict(loaded.state_dict())


def _pooled(output: Any) -> Tensor:
    pooled = getattr(output, "pooler_output", None)
    return output.last_hidden_state.mean(dim=1) if pooled is None else pooled.flatten(1)


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
        raise ValueError(
            f"encoder.name={name}: neither a folder with {filename} nor a model to be had from the Hub "
            f"({type(error).__name__}); check the name and the connection (HF_HUB_OFFLINE forbids it)"
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
