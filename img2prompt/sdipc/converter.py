"""CLIP and the pipeline that reads its texts: images become conditions, and conditions become pictures.

# B = images, V = width of an image's state, K = width of a text's state, T = tokens of a condition,
# C, h, w = channels, height and width of a latent
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from transformers import CLIPModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from img2prompt.data.fitting import fit
from img2prompt.encoders.parts import loaded
from img2prompt.sdipc.editing import ALPHA, edited, ends_of
from img2prompt.sdipc.projector import FLOOR, NORM, projector_of_clip, pseudo_prompt
from img2prompt.sdipc.prompts import prompted_states
from img2prompt.synthesis.denoising import denoised, noise_of
from img2prompt.synthesis.pipeline import is_stable_diffusion


class Converter:
    """A CLIPModel of transformers and a pipeline of Stable Diffusion 1, whose text encoder is that CLIP's. `norm` is
    the length of what images are converted to. ValueError where the two do not belong together.
    """

    def __init__(self, clip: Any, pipeline: Any, norm: float = NORM, floor: float = FLOOR) -> None:
        check_pair(clip, pipeline)
        self.clip = clip.eval().requires_grad_(False)
        self.pipeline = pipeline
        for part in (pipeline.text_encoder, pipeline.vae):
            part.requires_grad_(False)
        self.projector = projector_of_clip(clip, norm, floor).to(clip.device)
        vision = clip.config.vision_config
        # Deep ones of the image tower [layers, prompts, V], where they were tuned; see tuning.py.
        self.prompts = torch.empty(vision.num_hidden_layers, 0, vision.hidden_size, device=clip.device)
        with torch.no_grad():
            self.null = self.text_states([""])

    @property
    def device(self) -> torch.device:
        return self.clip.device

    def prepare(self, image: UInt8[Tensor, "3 H W"]) -> UInt8[Tensor, "3 S S"]:
        """As this CLIP wants it."""
        return square_for(self.clip, image)

    def pixels(self, images: UInt8[Tensor, "B 3 S S"]) -> Float[Tensor, "B 3 S S"]:
        return normalised(images.to(self.device))

    def states(self, images: UInt8[Tensor, "B 3 S S"]) -> Float[Tensor, "B V"]:
        """What CLIP says of images, behind its last layer norm: f_img."""
        return prompted_states(self.clip.vision_model, self.pixels(images), self.prompts)

    def convert(self, images: UInt8[Tensor, "B 3 S S"]) -> Float[Tensor, "B K"]:
        """f_cnvrt of images."""
        return self.projector(self.states(images))

    def tokens(self, texts: Sequence[str]) -> Int[Tensor, "B T"]:
        """As Stable Diffusion reads them: of a long one its beginning."""
        tokenizer = self.pipeline.tokenizer
        most = tokenizer.model_max_length
        told = tokenizer(list(texts), padding="max_length", truncation=True, max_length=most, return_tensors="pt")
        return told.input_ids.to(self.device)

    def too_long(self, texts: Sequence[str]) -> list[str]:
        """Why some of the texts are not read to their end: a sentence for each of these."""
        tokenizer = self.pipeline.tokenizer
        most = tokenizer.model_max_length
        counts = [len(tokenizer(text, verbose=False).input_ids) for text in texts]
        return [
            f"{text[:60]}…: {count} CLIP tokens, and {most} are read"
            for text, count in zip(texts, counts, strict=True)
            if count > most
        ]

    def text_states(self, texts: Sequence[str]) -> Float[Tensor, "B T K"]:
        """What Stable Diffusion reads of texts."""
        return self.pipeline.text_encoder(self.tokens(texts))[0].float()

    def end_states(self, texts: Sequence[str]) -> Float[Tensor, "B K"]:
        """f_txt: the states of texts at their end."""
        tokens = self.tokens(texts)
        states = self.pipeline.text_encoder(tokens)[0].float()
        return states[torch.arange(len(tokens)), ends_of(tokens, self.pipeline.tokenizer.eos_token_id)]

    def conditions(
        self, converted: Float[Tensor, "B K"], texts: Sequence[str] | None = None, alpha: float = ALPHA
    ) -> Float[Tensor, "B T K"]:
        """Equation 7 or, with a text for each image, equation 8."""
        if texts is None:
            return pseudo_prompt(self.null[0], converted)
        ends = ends_of(self.tokens(texts), self.pipeline.tokenizer.eos_token_id)
        return edited(self.text_states(texts), ends, converted, alpha)

    @torch.no_grad()
    def latent(self, image: UInt8[Tensor, "3 H W"]) -> Float[Tensor, "1 C h w"]:
        """What the U-Net knows of an image: the mean of the VAE's distribution, scaled."""
        vae = self.pipeline.vae
        pixels = image[None].to(vae.device, vae.dtype) / 127.5 - 1
        return vae.encode(pixels).latent_dist.mode().float() * vae.config.scaling_factor

    def measure_norm(self, prompts: Sequence[str], batch_size: int = 32) -> float:
        """The mean length of prompts' states at their end, which takes the place of the fixed one."""
        lengths = [
            self.end_states(prompts[start : start + batch_size]).norm(dim=1)
            for start in range(0, len(prompts), batch_size)
        ]
        norm = float(torch.cat(lengths).mean())
        self.projector.norm.fill_(norm)
        return norm

    def pictures(
        self,
        conditions: Float[Tensor, "B T K"],
        seeds: Sequence[int],
        guidance: float = 7.5,
        steps: int = 50,
        size_px: int | None = None,
    ) -> UInt8[Tensor, "B H W 3"]:
        """One picture of each condition, by its own seed: no other one changes it but for rounding. ValueError when one
        is not finite.
        """
        pipeline = self.pipeline
        dice = [torch.Generator().manual_seed(seed) for seed in seeds]
        size_px = size_px or native_size_px(pipeline)
        # 1 and less is no guidance.
        without = self.null.expand(len(conditions), -1, -1) if guidance > 1 else None
        weight = torch.full((len(conditions), 1, 1, 1), float(guidance), device=self.device)
        noise = noise_of(pipeline, size_px, dice)
        images = denoised(pipeline, noise, conditions, without, weight, steps, dice)
        if not images.isfinite().all():
            raise ValueError("a picture is not finite: the model's numbers are too large for its dtype; set dtype=fp32")
        return (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()


def native_size_px(pipeline: Any) -> int:
    """The side of the pictures that the pipeline was made for."""
    side = pipeline.unet.config.sample_size
    return int(side if isinstance(side, int) else side[0]) * pipeline.vae_scale_factor


def square_for(clip: Any, image: UInt8[Tensor, "3 H W"]) -> UInt8[Tensor, "3 S S"]:
    """An image as a CLIP wants it."""
    return fit(image, int(clip.config.vision_config.image_size), "bicubic", "shortest")


def normalised(images: UInt8[Tensor, "B 3 S S"]) -> Float[Tensor, "B 3 S S"]:
    mean, std = (torch.tensor(one).view(3, 1, 1).to(images.device) for one in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (images.float() / 255 - mean) / std


def load_clip(name: str, revision: str | None = None) -> Any:
    """The CLIPModel of a folder or an id of the Hub; ValueError when it is none."""
    return loaded("clip", name, CLIPModel, revision=revision).float()


def check_pair(clip: Any, pipeline: Any) -> None:
    """ValueError where the pipeline does not read this CLIP's texts, or not as they are in the space of images."""
    if not is_stable_diffusion(pipeline):
        raise ValueError(f"this pipeline is a {type(pipeline).__name__}; Stable Diffusion 1 is needed")
    texts, own, unet = clip.config.text_config, pipeline.text_encoder.config, pipeline.unet.config
    if unet.in_channels != pipeline.vae.config.latent_channels:
        raise ValueError(
            f"this pipeline's U-Net takes {unet.in_channels} channels, and its VAE makes "
            f"{pipeline.vae.config.latent_channels}: it is for inpainting or the like; Stable Diffusion 1 is needed"
        )
    if unet.use_linear_projection or own.num_hidden_layers == texts.num_hidden_layers - 1:
        raise ValueError(
            "this pipeline is Stable Diffusion 2: it reads its text encoder's last layer but one, into which nothing "
            "leads back from the space that images and texts share; Stable Diffusion 1 is needed"
        )
    for what, width in (("text encoder", own.hidden_size), ("U-Net", unet.cross_attention_dim)):
        if width != texts.hidden_size:
            raise ValueError(
                f"the CLIP's texts have {texts.hidden_size} dimensions, the pipeline's {what} has {width}; give the "
                "CLIP that the pipeline reads, for Stable Diffusion 1 openai/clip-vit-large-patch14"
            )
    ours, theirs = _weights(clip.text_model), _weights(pipeline.text_encoder)
    other = [name for name in ours if name not in theirs or not _alike(ours[name], theirs[name])]
    if other:
        raise ValueError(
            f"the pipeline's text encoder is not this CLIP's: {len(other)} of {len(ours)} tensors differ (first: "
            f"{other[0]}); give the CLIP that the pipeline reads"
        )


def _weights(model: Any) -> dict[str, Tensor]:
    return {name.removeprefix("text_model."): value for name, value in model.named_parameters()}


def _alike(one: Tensor, other: Tensor) -> bool:
    # Pipelines are often saved in half precision.
    return one.shape == other.shape and torch.allclose(one.float(), other.float(), rtol=1e-2, atol=2e-3)
