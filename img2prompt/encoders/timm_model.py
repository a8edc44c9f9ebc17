"""Encoders of timm, by name: any of its image models without its classifier."""

from collections.abc import Mapping, Sequence
from typing import Any

import timm
from jaxtyping import Float
from timm.models import get_pretrained_cfg, load_state_dict_from_hf
from torch import Tensor, nn

from img2prompt.encoders.blocks import has_tokens, modules_of_timm, of_timm
from img2prompt.encoders.dropping import drop_patches
from img2prompt.encoders.encoder import Encoder, Preprocessing, checked_rate, load_strictly, read_weights, suggest
from img2prompt.hub import HubFile

# Arguments of timm's factory that read other files or ask the network; a checkpoint must not set them.
REFUSED = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "num_classes")


class Timm(Encoder):
    """timm's model `name` (with `tag`, as in vit_base_patch16_224 and augreg_in21k), pooled before the classifier.

    Mean, standard deviation, size and interpolation are the tag's unless given. Images are fitted whole with a white
    margin (`resize_mode` longest), because a prompt speaks of all of the image. `model_kwargs` go to the model's
    constructor; `drop_path` is its rate of stochastic depth in training. ValueError for an unknown name, tag or
    argument.
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
        model_kwargs: Mapping[str, Any] | None = None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        name, _, own_tag = name.partition(".")
        tag = tag or own_tag or None
        if not timm.is_model(name):
            raise ValueError(f"encoder.name={name}: unknown to timm{suggest(name, timm.list_models())}")
        self._name = f"{name}.{tag}" if tag else name
        try:
            published: Any = get_pretrained_cfg(self._name, allow_unregistered=False)
        except RuntimeError:
            tags = [full.partition(".")[2] for full in timm.list_models(f"{name}.*", pretrained=True)]
            raise ValueError(f"encoder.tag={tag}: {name} has the tags {', '.join(tags) or '(none)'}") from None
        self._kwargs = dict(model_kwargs or {})
        for key in self._kwargs:
            if key in REFUSED:
                raise ValueError(
                    f"encoder.model_kwargs.{key}: set by the encoder; use encoder.pretrained and encoder.tag"
                )
        if checked_rate("encoder.drop_path", drop_path):
            self._kwargs["drop_path_rate"] = drop_path
        native_px = published.input_size[-1]
        size_px = image_size_px or self._kwargs.get("img_size") or native_px
        if size_px != native_px and published.fixed_input_size:
            # Transformers are built for one size; convolutional networks take any and know no such argument.
            self._kwargs.setdefault("img_size", size_px)
        try:
            model: Any = timm.create_model(self._name, pretrained=False, num_classes=0, **self._kwargs)
        except TypeError as error:
            raise ValueError(
                f"encoder.model_kwargs: {name}: {error}; they are those of encoder=small where no other is chosen, as "
                "encoder=timm is"
            ) from None
        # Some models keep a hidden layer before the classifier and count it apart.
        self.width = int(getattr(model, "head_hidden_size", None) or model.num_features)
        self.model = model
        self.preprocessing = Preprocessing(
            size_px,
            mean or published.mean,
            std or published.std,
            interpolation or published.interpolation,
            resize_mode or "longest",
        )
        self.facts = self.preprocessing.as_arguments()
        self._published = published

    def architecture(self) -> tuple[str, dict[str, Any]]:
        """timm's name of the model, and the arguments that build it."""
        return self._name, {key: value for key, value in self._kwargs.items() if key != "drop_path_rate"}

    def encode(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B E"]:
        return self.model(pixels)

    def encode_layers(self, pixels: Float[Tensor, "B 3 H W"], count: int) -> tuple[Tensor, list[Tensor]]:
        if not hasattr(self.model, "forward_intermediates"):
            raise ValueError(f"encoder.name={self._name}: timm gives no features of its layers")
        layout = "NLC" if has_tokens(self.model) else "NCHW"
        final, said = self.model.forward_intermediates(pixels, indices=count, output_fmt=layout)
        return self.model.forward_head(final), said

    def blocks(self) -> list[list[nn.Parameter]]:
        return of_timm(self.model)

    def block_modules(self) -> list[nn.Module]:
        return modules_of_timm(self.model)

    def set_image_size(self, image_size_px: int) -> None:
        if image_size_px == self.preprocessing.image_size_px:
            return
        if hasattr(self.model, "set_input_size"):
            self.model.set_input_size(img_size=(image_size_px, image_size_px), **_same_windows(self.model))
        elif self._published.fixed_input_size:
            raise ValueError(f"encoder.name={self._name}: it has no other input size")
        # The size is one fact, and no longer an argument of the library's.
        kwargs = {key: value for key, value in self.config.get("model_kwargs", {}).items() if key != "img_size"}
        self.config["model_kwargs"] = kwargs
        self._note_image_size(image_size_px)

    def set_patch_dropout(self, rate: float) -> None:
        if has_tokens(self.model):
            drop_patches(self.model, rate)
        else:
            super().set_patch_dropout(rate)

    def checkpoint_activations(self) -> None:
        if not hasattr(self.model, "set_grad_checkpointing"):
            super().checkpoint_activations()
        self.model.set_grad_checkpointing(True)

    def downloads(self) -> list[HubFile]:
        if not self._published.hf_hub_id:
            return []
        return [HubFile(self._published.hf_hub_id, self._published.hf_hub_filename or "model.safetensors")]

    def load_pretrained(self, path: str | None = None) -> None:
        hub = self.downloads()
        if path is not None:
            weights = read_weights(path)
        elif hub:
            weights = load_state_dict_from_hf(hub[0].repository, weights_only=True)
        else:
            raise ValueError(
                f"encoder.name={self._name}: timm has no weights for it; use encoder.pretrained=FILE or false"
            )
        where = path or self._name
        # timm checks weights strictly only if the classifier fits as well, so it is loaded too and then dropped; its
        # own loader is used because it renames keys and resamples position embeddings to the input size.
        classifier = self._published.classifier
        names = (classifier,) if isinstance(classifier, str) else tuple(classifier or ())
        rows = [len(weights[f"{one}.weight"]) for one in names if f"{one}.weight" in weights]
        classes = rows[0] if rows else 0
        overlay = {"state_dict": weights, "num_classes": classes}
        try:
            whole: Any = timm.create_model(
                self._name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=classes, **self._kwargs
            )
        except (RuntimeError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{where}: not the weights of {self._name} ({reason})") from None
        whole.reset_classifier(0)
        load_strictly(self.model, whole.state_dict(), where)


def _same_windows(model: Any) -> dict[str, Any]:
    """Of a model that attends in windows, their size, for timm would let them grow with the input."""
    # The first stage has the largest map: its windows are never cut to fit.
    blocks = getattr(model.layers[0], "blocks", []) if hasattr(model, "layers") else []
    return {"window_size": tuple(blocks[0].window_size)} if blocks and hasattr(blocks[0], "window_size") else {}
