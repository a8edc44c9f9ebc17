"""SD-IPC-FT and SD-IPC-CT: what little of CLIP and of Stable Diffusion learns from a few images (Ding et al., 2023).

Deep prompts, tokens that are learnt and put among those of an image before each layer of CLIP's image tower, and the
keys and values of the U-Net's cross-attention; all else is fixed, the inverse included.

# B = images in the batch, V = width of an image's state, N = tokens of an image, L = layers, P = prompts of a layer
# C, h, w = channels, height and width of a latent
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
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
        for key, least in (("lr", 0), ("batch_size", 1), ("prompts_per_layer", 0)):
            if not getattr(self, key) >= least:
                raise ValueError(f"predictor.{key} must be at least {least}, got {getattr(self, key)}")
        if (self.epochs is None) == (self.iterations is None) or min(self.epochs or 1, self.iterations or 1) < 1:
            raise ValueError(
                f"predictor.epochs={self.epochs}, predictor.iterations={self.iterations}: one of them says how long"
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
    found = {_PROMPTS: converter.prompts} if prompts_per_layer else {}
    for name, parameter in converter.pipeline.unet.named_parameters():
        if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
            found[f"unet.{name}"] = parameter.requires_grad_(True)
    return found


def tune(
    converter: Converter,
    references: References,
    how: Tuning,
    seed: int,
    advance: Callable[[dict[str, float]], object] = lambda losses: None,
) -> dict[str, Tensor]:
    """Learns, and returns what has been learnt. `advance` is called with the losses of each step. A step depends on the
    seed and its number alone.
    """
    unet, device = converter.pipeline.unet, converter.device
    learnt = learning(converter, how.prompts_per_layer, seed)
    noise = DDPMScheduler.from_config(converter.pipeline.scheduler.config)
    if noise.config.prediction_type not in ("epsilon", "v_prediction"):
        raise ValueError(f"a U-Net that predicts {noise.config.prediction_type} cannot be tuned")
    optimizer = torch.optim.AdamW(learnt.values(), lr=how.lr, weight_decay=0.0)
    with torch.no_grad():
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
        conditions = {"image": converter.conditions(converter.convert(references.images[places]))}
        if texts is not None:
            conditions["text"] = texts[targets]
        losses = noise_losses(unet, noisy, times, wanted, conditions)
        for group in optimizer.param_groups:
            group["lr"] = how.lr_at(step, total)
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        said = {name: float(value.detach()) for name, value in losses.items()}
        if not all(map(math.isfinite, said.values())):
            raise ValueError(f"step {step + 1} of {total}: the loss is not finite; lower predictor.lr")
        advance(said)
    return {name: parameter.detach().cpu().contiguous() for name, parameter in learnt.items()}


def noise_losses(
    unet: Any,
    noisy: Float[Tensor, "B C h w"],
    times: Int[Tensor, " B"],
    wanted: Float[Tensor, "B C h w"],
    conditions: Mapping[str, Float[Tensor, "B T K"]],
) -> dict[str, Tensor]:
    """The terms of equation 9: the mean squared error of what the U-Net predicts, under each of the conditions."""
    count = len(conditions)
    both = torch.cat(list(conditions.values()))
    repeat = (count, 1, 1, 1)
    predicted = unet(noisy.repeat(repeat), times.repeat(count), encoder_hidden_states=both).sample
    return {
        name: functional.mse_loss(part.float(), wanted.float())
        for name, part in zip(conditions, predicted.chunk(count), strict=True)
    }


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
    return about, tensors


def apply_tuning(path: str, tensors: Mapping[str, Tensor], converter: Converter) -> None:
    """Puts what was learnt in its places; ValueError when these are not there."""
    prompts = tensors.get(_PROMPTS)
    if prompts is not None:
        config = converter.clip.config.vision_config
        if prompts.ndim != 3 or (len(prompts), prompts.shape[2]) != (config.num_hidden_layers, config.hidden_size):
            raise ValueError(f"ckpt={path}: its prompts {list(prompts.shape)} are of another CLIP")
        converter.prompts = prompts.to(converter.device)
    unet = dict(converter.pipeline.unet.named_parameters())
    for name, value in tensors.items():
        if name == _PROMPTS:
            continue
        own = unet.get(name.removeprefix("unet."))
        if own is None or own.shape != value.shape or not value.isfinite().all():
            raise ValueError(f"ckpt={path}: {name} is of another U-Net, or damaged")
        own.data.copy_(value)
