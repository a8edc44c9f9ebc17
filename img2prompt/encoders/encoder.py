"""What every image encoder is: pixels in, features out, with the facts of its own input.

# B = images in the batch, E = width of the pooled features, N = tokens of an image, T = their width
"""

import difflib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from img2prompt.hub import HubFile

INTERPOLATIONS = ("bicubic", "bilinear")
# shortest: the shorter side is fitted and the centre cut out; longest: the longer side is fitted and the rest is
# white; squash: both sides are fitted.
RESIZE_MODES = ("shortest", "longest", "squash")


@dataclass
class Features:
    """What an encoder says about B images: all that a head sees. `tokens` are those of the last block, if asked for."""

    pooled: Float[Tensor, "B E"]
    tokens: Float[Tensor, "B N T"] | None = None


@dataclass(frozen=True)
class Preprocessing:
    """How an encoder wants its images: square of `image_size_px`, then (x / 255 - mean) / std per channel."""

    image_size_px: int
    mean: Sequence[float]
    std: Sequence[float]
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"

    def __post_init__(self) -> None:
        # Equal whether they come from a registry, a header or a command line.
        object.__setattr__(self, "mean", tuple(float(value) for value in self.mean))
        object.__setattr__(self, "std", tuple(float(value) for value in self.std))
        if self.image_size_px < 1:
            raise ValueError(f"image_size_px must be at least 1, got {self.image_size_px}")
        finite = all(math.isfinite(value) for value in (*self.mean, *self.std))
        if len(self.mean) != 3 or len(self.std) != 3 or not finite or min(self.std) <= 0:
            raise ValueError(f"mean and std need three numbers each, std above 0, got {self.mean} and {self.std}")
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation must be one of {INTERPOLATIONS}, got {self.interpolation!r}")
        if self.resize_mode not in RESIZE_MODES:
            raise ValueError(f"resize_mode must be one of {RESIZE_MODES}, got {self.resize_mode!r}")

    def as_arguments(self) -> dict[str, Any]:
        """The same as plain data, under the names that every encoder's constructor takes."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}


class Encoder(nn.Module, ABC):
    """An image encoder. Its constructor draws the architecture only; weights come by `load_pretrained` or a checkpoint.

    Set by the constructor: `width` (E), `preprocessing`, and `facts`: the arguments that complete its config so that
    the same encoder is built again without asking any registry.
    """

    config: dict[str, Any]
    width: int
    preprocessing: Preprocessing
    facts: dict[str, Any]
    prefix_names: tuple[str, ...] = ()  # of what `prefix` makes, where the encoder has one

    @abstractmethod
    def encode(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B E"]:
        """Pooled features of normalised pixels, or of what the prefix made of them, in its order."""

    def prefix(self, pixels: Float[Tensor, "B 3 H W"]) -> tuple[Tensor, ...]:
        """What the part that never learns makes of normalised pixels: all that `encode` takes. Without augmentation it
        is computed once and kept.
        """
        return (pixels,)

    def prefix_state(self, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """All that one word of the prefix depends on besides the pixels: its configuration and its tensors."""
        raise ValueError(f"{type(self).__name__} has no prefix")

    def frozen(self, images: UInt8[Tensor, "B 3 H W"]) -> dict[str, Tensor]:
        """What `forward` takes in place of these images."""
        return dict(zip(self.prefix_names, self.prefix(self.normalise(images)), strict=True))

    def encode_layers(self, pixels: Float[Tensor, "B 3 H W"], count: int) -> tuple[Tensor, list[Tensor]]:
        """The same, and what the last `count` blocks said: tokens [B, N, T] or maps [B, T, h, w] each. Of a
        convolutional network a stage is one block.
        """
        raise ValueError(f"{type(self).__name__} has no layers to read")

    def blocks(self) -> list[list[nn.Parameter]]:
        """Every parameter exactly once, in the order in which an image meets them: what embeds it, then block by block;
        what follows the last block is in its group.
        """
        return [list(self.parameters())]

    def block_modules(self) -> list[nn.Module]:
        """The blocks themselves, or the stages of a convolutional network: what is compiled one by one."""
        return []

    def compile_blocks(self) -> None:
        """Lets torch.compile make its own code for each block, once for all blocks that are alike."""
        for block in self.block_modules():
            block.compile()

    def set_image_size(self, image_size_px: int) -> None:
        """Makes it an encoder of images of another size, with its learned positions resampled; ValueError where it can
        be none. New parameters may take the place of old ones.
        """
        raise ValueError(f"{type(self).__name__} has no other input size")

    def _note_image_size(self, image_size_px: int) -> None:
        self.preprocessing = replace(self.preprocessing, image_size_px=image_size_px)
        self.facts["image_size_px"] = self.config["image_size_px"] = image_size_px

    def set_patch_dropout(self, rate: float) -> None:
        """From now on so many of the patches are left out in training; ValueError where there are no patches."""
        if rate:
            raise ValueError(f"encoder.name={self.config.get('name')}: it has no patches that could be left out")

    def checkpoint_activations(self) -> None:
        """From now on activations are computed again for the gradient, instead of being kept; ValueError where they can
        only be kept.
        """
        raise ValueError(
            f"trainer.activation_checkpointing=true: {self.config.get('name')} cannot compute activations again"
        )

    def forward(self, inputs: Mapping[str, Tensor], layers: int = 0, tokens: bool = False) -> Features:
        """Features of {"images": pixels in 0..255}, of what `frozen` made of them, or of {"pooled": what it said of
        them before}.

        The means of the last `layers` blocks are joined to the pooled features.
        """
        if "pooled" in inputs:
            return Features(inputs["pooled"], inputs.get("tokens"))
        kept = tuple(inputs[name] for name in self.prefix_names if name in inputs)
        pixels, *known = kept or self.prefix(self.normalise(inputs["images"]))
        if not layers and not tokens:
            return Features(self.encode(pixels, *known))
        pooled, found = self.encode_layers(pixels, max(layers, 1), *known)
        said = [_as_tokens(one) for one in found]
        means = [one.mean(dim=1) for one in said[len(said) - layers :]]
        return Features(torch.cat([pooled, *means], dim=1), said[-1] if tokens else None)

    def widths(self, layers: int, tokens: bool) -> tuple[int, int]:
        """The width of the pooled features with the means of so many blocks, and of the tokens (0 without)."""
        if not layers and not tokens:
            return self.width, 0
        try:
            features = self.dry_run(layers, tokens)
        except (AssertionError, RuntimeError, IndexError) as error:
            reason = " ".join(str(error).split())[:160]
            raise ValueError(f"head.layers={layers}: {self.config.get('name')} has not as many ({reason})") from None
        return features.pooled.shape[1], features.tokens.shape[2] if features.tokens is not None else 0

    def dry_run(self, layers: int = 0, tokens: bool = False) -> Features:
        """Features of one image that are shapes alone: nothing is computed."""
        size = self.preprocessing.image_size_px
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            images = torch.zeros(1, 3, size, size, device=next(self.parameters()).device)
            return self.forward({"images": images}, layers, tokens)

    def normalise(self, images: UInt8[Tensor, "B 3 H W"] | Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
        """(x / 255 - mean) / std of pixels in 0..255, on the device they are on."""
        # Made on the host and sent: a tensor that is made on a GPU makes the host wait for it.
        mean, std = (
            torch.tensor(values).view(3, 1, 1).to(images.device, non_blocking=True)
            for values in (self.preprocessing.mean, self.preprocessing.std)
        )
        pixels = (images.float() / 255 - mean) / std
        # Convolutions follow the layout of their input: on a CPU this one is four times as fast, on a GPU twice.
        return pixels.contiguous(memory_format=torch.channels_last)

    def downloads(self) -> list[HubFile]:
        """What `load_pretrained()` would fetch; nothing where no weights are published for name and tag."""
        return []

    def text_refusal(self, path: str | None = None) -> str | None:
        """Why prompts have no features in the space of the pooled ones, with the weights of a local file or, without
        one, the published weights; None where `text_features` gives them.
        """
        return "the encoder has no text tower"

    def text_features(
        self, prompts: Sequence[str], path: str | None, device: str, advance: Callable[[int], object]
    ) -> Float[Tensor, "N E"]:
        """Features of prompts in the space of the pooled ones; ValueError where `text_refusal` says why not."""
        raise ValueError(f"{type(self).__name__}: {self.text_refusal(path)}")

    def check_weights_file(self, path: str) -> None:
        """ValueError where `load_pretrained` takes no file."""
        return None

    def load_pretrained(self, path: str | None = None) -> None:
        """Fills in the weights of a local file or, without one, the published weights of name and tag."""
        raise ValueError(f"{type(self).__name__} has no pretrained weights; set encoder.pretrained=false")


def _as_tokens(values: Tensor) -> Tensor:
    return values.flatten(2).transpose(1, 2) if values.ndim == 4 else values


class Uninitialised(TorchFunctionMode):
    """Within it, layers are built without drawing their weights: for a model that is loaded strictly next.

    Drawing a ViT-L/14 takes four seconds on two cores, building it without 0.02. Buffers that a constructor computes,
    such as rotary positions, are computed as ever, which they would not be on the meta device. Only torch.nn.init is
    left out: other code draws until its numbers are in range, and must get real ones.
    """

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


def checked_rate(key: str, rate: float) -> float:
    """A share that may be left out; ValueError names the key."""
    if not 0 <= rate < 1:
        raise ValueError(f"{key} must be from 0 to below 1, got {rate}")
    return rate


def suggest(word: str, known: Sequence[str]) -> str:
    """What to add to a sentence about an unknown name."""
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    return f"; did you mean {', '.join(close)}?" if close else ""


def load_strictly(model: nn.Module, weights: Mapping[str, Tensor], where: str) -> None:
    """Loads all of `weights` into all of `model`.

    ValueError names what is missing, surplus or of another shape: a half-loaded encoder trains without complaint.
    """
    expected = model.state_dict()
    missing = [key for key in expected if key not in weights]
    surplus = [key for key in weights if key not in expected]
    wrong = [key for key in weights if key in expected and weights[key].shape != expected[key].shape]
    for problem, keys in (("missing", missing), ("unknown", surplus), ("of another shape", wrong)):
        if keys:
            raise ValueError(
                f"{where}: not the weights of this model: {len(keys)} of {len(expected)} tensors {problem} "
                f"(first: {keys[0]}); check the encoder name against the file"
            )
    for key, value in weights.items():
        if expected[key].is_floating_point() and not (value.is_floating_point() and value.isfinite().all()):
            raise ValueError(f"{where}: {key} holds values that are not finite, or no floating-point numbers")
    model.load_state_dict(weights)


def read_keys(path: str) -> list[str]:
    """The names of the tensors of a weights file, without reading the tensors where the format allows that."""
    if not path.endswith(".safetensors"):
        return list(read_weights(path))
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: cannot be read as weights ({error})") from None


@contextmanager
def told_as(names: Mapping[str, str]) -> Iterator[None]:
    """What an encoder says of its settings (encoder.name, …) is said by other names, where others were given."""
    try:
        yield
    except ValueError as error:
        told = str(error)
        for own, other in names.items():
            told = told.replace(own, other)
        raise ValueError(told) from None


def read_weights(path: str) -> dict[str, Tensor]:
    """The tensors of a .safetensors, .pt, .pth or .bin file; nothing in the file is executed."""
    try:
        if path.endswith(".safetensors"):
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such weights file; encoder.pretrained is true, false or a local file") from None
    except (SafetensorError, OSError, RuntimeError, EOFError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as weights ({error})") from None
    except Exception as error:
        # weights_only refuses whatever is not plain tensors by an UnpicklingError.
        raise ValueError(f"{path}: refused, it holds more than plain tensors ({type(error).__name__})") from None
    for wrapper in ("state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise ValueError(f"{path}: holds no table of tensors")
    return dict(loaded)
