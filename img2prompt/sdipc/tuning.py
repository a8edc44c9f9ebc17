"""SD-IPC-FT and SD-IPC-CT: what little of CLIP and of Stable Diffusion learns from a few images (Ding et al., 2023).

Deep prompts, tokens that are learnt and put among those of an image before each layer of CLIP's image tower, and the
keys and values of the U-Net's cross-attention; all else is fixed, the inverse included.

# B = images in the batch, N = all images, V = width of an image's state, L = layers, P = prompts of a layer
# T = tokens of a condition, K = their width, C, h, w = channels, height and width of a latent
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler
from jaxtyping import Float, Int, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from img2prompt.files import replacing
from img2prompt.sdipc.converter import Converter

_KIND = "img2prompt sdipc tuning 1"
_PROMPTS = "prompts"
_SCHEDULES = ("cosine", "constant")
# What a file says of the models that it belongs to.
_HEADER: dict[str, Any] = {
    "pipeline": str,
    "revision": str | None,
    "clip": str,
    "clip_revision": str | None,
    "norm": int | float,
    "floor": int | float,
}


@dataclass(frozen=True)
class Tuning:
    """How it learns: `epochs` over the images or, where given, `iterations`. `text_term` adds the loss with the image's
    prompt as the condition, which holds the U-Net where it was. With `other_of_prompt` what is to be made is another
    image of the same prompt, where there is one.
    """

    name: str
    epochs: int | None = 50
    iterations: int | None = None
    lr: float = 1e-5
    schedule: str = "cosine"
    batch_size: int = 4
    text_term: bool = True
    prompts_per_layer: int = 50
    other_of_prompt: bool = False

    def __post_init__(self) -> None:
        for key, least, most in (("lr", 0, 1), ("batch_size", 1, math.inf), ("prompts_per_layer", 0, math.inf)):
            value = getattr(self, key)
            if value is None or not least <= value <= most:
                limits = f"at least {least}" if most == math.inf else f"from {least} to {most}"
                raise ValueError(f"predictor.{key} must be {limits}, got {value}")
        said = [one for one in (self.epochs, self.iterations) if one is not None]
        if len(said) != 1 or said[0] < 1:
            raise ValueError(
                f"predictor.epochs={self.epochs}, predictor.iterations={self.iterations}: one of them says how long, "
                "and is at least 1; the other one is null"
            )
        if self.schedule not in _SCHEDULES:
            raise ValueError(f"predictor.schedule={self.schedule}: must be one of {', '.join(_SCHEDULES)}")

    def steps(self, images: int) -> int:
        return self.iterations or (self.epochs or 0) * math.ceil(images / self.batch_size)

    def lr_at(self, step: int, total: int) -> float:
        return self.lr if self.schedule == "constant" else self.lr * 0.5 * (1 + math.cos(math.pi * step / total))


@dataclass
class References:
    """What is learnt from: images as CLIP wants them [N, 3, S, S], their latents [N, C, h, w], and their prompts."""

    images: UInt8[Tensor, "N 3 S S"]
    latents: Float[Tensor, "N C h w"]
    prompts: Sequence[str] | None = None


def learning(converter: Converter, prompts_per_layer: int, seed: int) -> dict[str, nn.Parameter]:
    """Gives the converter its prompts, and gradients to what learns, by the names that it is saved under."""
    config = converter.clip.config.vision_config
    converter.pipeline.unet.requires_grad_(False)
    drawn = torch.Generator().manual_seed(seed)
    shape = (config.num_hidden_layers, prompts_per_layer, config.hidden_size)
    converter.prompts = nn.Parameter((torch.randn(shape, generator=drawn) * 0.02).to(converter.device))
    found: dict[str, nn.Parameter] = {_PROMPTS: converter.prompts} if prompts_per_layer else {}
    for name, one in _keys_and_values(converter.pipeline.unet).items():
        one.requires_grad_(True)
        found[name] = one
    return found


def _keys_and_values(unet: Any) -> dict[str, nn.Parameter]:
    """Those of cross-attention, by the names that they are saved under."""
    ends = ("attn2.to_k.weight", "attn2.to_v.weight")
    return {f"unet.{name}": one for name, one in unet.named_parameters() if name.endswith(ends)}


def tune(
    converter: Converter,
    references: References,
    how: Tuning,
    seed: int,
    advance: Callable[[dict[str, float]], object] = lambda losses: None,
) -> dict[str, Tensor]:
    """Learns, and returns what has been learnt. `advance` is called with the losses of each step. A step depends on the
    seed and its number alone. ValueError, and nothing is returned, when a gradient is not finite.
    """
    unet, device = converter.pipeline.unet, converter.device
    on_gpu = device.type == "cuda"
    if on_gpu:
        # Else a batch of four at 512 px would need more memory than most GPUs have.
        unet.enable_gradient_checkpointing()
    # Where the GPU has bfloat16 itself; what learns stays in float32.
    halves = on_gpu and torch.cuda.get_device_capability(device) >= (8, 0)
    learnt = learning(converter, how.prompts_per_layer, seed)
    noise = DDPMScheduler.from_config(converter.pipeline.scheduler.config)
    if noise.config.prediction_type not in ("epsilon", "v_prediction"):
        raise ValueError(f"a U-Net that predicts {noise.config.prediction_type} cannot be tuned")
    optimizer = torch.optim.AdamW(learnt.values(), lr=how.lr, weight_decay=0.0)
    with torch.no_grad():
        # Of what SD-IPC-FT has; SD-IPC-CT has no prompts.
        texts = converter.text_states(list(references.prompts)) if how.text_term and references.prompts else None
    total = how.steps(len(references.images))
    for step in range(total):
        places, targets = _drawn(references, how, seed, step)
        dice = torch.Generator().manual_seed(_mixed(seed, step))
        clean = references.latents[targets].to(device)
        noises = torch.randn(clean.shape, generator=dice).to(device)
        times = torch.randint(0, noise.config.num_train_timesteps, (len(clean),), generator=dice).to(device)
        is_v = noise.config.prediction_type == "v_prediction"
        wanted = noise.get_velocity(clean, noises, times) if is_v else noises
        noisy = noise.add_noise(clean, noises, times)
        optimizer.zero_grad()
        said = {}
        # Equation 9, term by term: the gradient of a sum is the sum of gradients, and half of the memory does.
        for term, condition in _conditions(converter, references.images[places], texts, targets):
            with torch.autocast(device.type, torch.bfloat16, enabled=halves):
                loss = noise_loss(unet, noisy, times, wanted, condition)
            loss.backward()
            said[term] = float(loss.detach())
        length = torch.nn.utils.get_total_norm([one.grad for one in learnt.values() if one.grad is not None])
        if not length.isfinite():
            raise ValueError(f"step {step + 1} of {total}: its gradient is not finite; lower predictor.lr")
        for group in optimizer.param_groups:
            group["lr"] = how.lr_at(step, total)
        optimizer.step()
        advance(said)
    found = {name: parameter.detach().cpu().contiguous() for name, parameter in learnt.items()}
    if not all(value.isfinite().all() for value in found.values()):
        raise ValueError(f"after {total} steps what has learnt is not finite; lower predictor.lr")
    return found


def _conditions(
    converter: Converter, images: UInt8[Tensor, "B 3 S S"], texts: Float[Tensor, "N T K"] | None, targets: list[int]
) -> Iterator[tuple[str, Float[Tensor, "B T K"]]]:
    yield "image", converter.conditions(converter.convert(images))
    if texts is not None:
        yield "text", texts[targets]


def noise_loss(
    unet: Any,
    noisy: Float[Tensor, "B C h w"],
    times: Int[Tensor, " B"],
    wanted: Float[Tensor, "B C h w"],
    condition: Float[Tensor, "B T K"],
) -> Float[Tensor, ""]:
    """A term of equation 9: the mean squared error of what the U-Net predicts under a condition."""
    predicted = unet(noisy, times, encoder_hidden_states=condition).sample
    return functional.mse_loss(predicted.float(), wanted.float())


def _drawn(references: References, how: Tuning, seed: int, step: int) -> tuple[list[int], list[int]]:
    """Of a step, which images are the references, and which are to be made of them."""
    count = len(references.images)
    each = math.ceil(count / how.batch_size)
    epoch, part = divmod(step, each)
    order = np.random.default_rng([seed, epoch]).permutation(count)
    places = order[part * how.batch_size : (part + 1) * how.batch_size].tolist()
    if not how.other_of_prompt or references.prompts is None:
        return places, places
    dice = np.random.default_rng([seed, epoch, part, 1])
    targets = []
    for place in places:
        alike = [i for i, one in enumerate(references.prompts) if one == references.prompts[place] and i != place]
        targets.append(int(dice.choice(alike)) if alike else place)
    return places, targets


def _mixed(seed: int, step: int) -> int:
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> 1)


def save_tuning(path: Path, learnt: Mapping[str, Tensor], how: Tuning, about: Mapping[str, Any]) -> None:
    """Only what has learnt, and in the header which models it belongs to."""
    header = json.dumps({"kind": _KIND, **about, "tuning": asdict(how)})
    with replacing(path) as temporary:
        save_file(dict(learnt), temporary, {"img2prompt": header})


def read_tuning(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and the tensors of a file of `save_tuning`; ValueError when it is none."""
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("img2prompt", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"ckpt={path}: cannot be read ({str(error)[:120]})") from None
    if not isinstance(about, dict) or about.get("kind") != _KIND:
        raise ValueError(f"ckpt={path}: no file of img2prompt fit predictor=sdipc_ft or sdipc_ct")
    for key, kinds in _HEADER.items():
        if not isinstance(about.get(key), kinds) or isinstance(about[key], bool):
            raise ValueError(f"ckpt={path}: its header is damaged ({key})")
    return about, tensors


def apply_tuning(path: str, tensors: Mapping[str, Tensor], converter: Converter) -> None:
    """Puts what was learnt in its places; ValueError when these are not there."""
    prompts = tensors.get(_PROMPTS)
    if prompts is not None:
        config = converter.clip.config.vision_config
        if prompts.ndim != 3 or (len(prompts), prompts.shape[2]) != (config.num_hidden_layers, config.hidden_size):
            raise ValueError(f"ckpt={path}: its prompts {list(prompts.shape)} are of another CLIP")
        if not prompts.is_floating_point() or not prompts.isfinite().all():
            raise ValueError(f"ckpt={path}: its prompts are damaged")
        converter.prompts = prompts.to(converter.device)
    own = _keys_and_values(converter.pipeline.unet)
    other = sorted(own.keys() ^ (tensors.keys() - {_PROMPTS}))
    if other:
        raise ValueError(f"ckpt={path}: of another U-Net, or damaged: {len(other)} tensors (first: {other[0]})")
    for name, parameter in own.items():
        value = tensors[name]
        if parameter.shape != value.shape or not value.is_floating_point() or not value.isfinite().all():
            raise ValueError(f"ckpt={path}: {name} is of another U-Net, or damaged")
        parameter.data.copy_(value)
