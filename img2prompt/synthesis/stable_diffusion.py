"""Pictures by a diffusion model of diffusers: prompt and seed in, pixels out.

Stable Diffusion 1 and 2 are sampled by a loop of our own (`denoising.py`), any other text-to-image pipeline by its own
call.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from img2prompt.hub import PIPELINE, HubFile
from img2prompt.synthesis.denoising import denoised, noise_of
from img2prompt.synthesis.sampling import Sampling
from img2prompt.synthesis.weights import weights_of

# B = images in the batch, T = tokens, E = their width

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_Drawn = dict[str, Any]  # guidance, scheduler and negative prompt of a picture
_Dice = list[torch.Generator]


class StableDiffusion:
    """A `Generator` by the diffusers pipeline `model`, an id of the Hub at `revision` or a folder.

    `preset` gives what is left None: scheduler, steps, guidance and size. `guidance` of two numbers is drawn between
    them for each picture, several schedulers or negative prompts are drawn from; all by the picture's seed, so that
    `details` knows them. Without a negative prompt, versions 1 and 2 of Stable Diffusion read an empty one. Nothing
    asks for a GPU before `check`, or loads weights before `load`. ValueError where the settings, the device or the
    model do not go together.
    """

    def __init__(
        self,
        model: str,
        revision: str | None = None,
        preset: str | None = "fast",
        scheduler: str | Sequence[str] | None = None,
        steps: int | None = None,
        guidance: float | Sequence[float] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        size_px: int | None = None,
        saved_px: int | None = None,
        dtype: str = "bf16",
        device: str = "auto",
        compile: bool | None = None,
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"generator.dtype={dtype}: must be one of {', '.join(DTYPES)}")
        self.sampling = Sampling(preset, scheduler, steps, guidance, negative_prompt, size_px, saved_px)
        self.model = model
        self.revision = revision
        self.dtype = dtype
        self.device = device
        self.compile = compile
        self._is_folder = Path(model).is_dir()
        self._weights: str | None = None
        self._pipeline: Any = None
        self._precise: Any = None  # in float32, from the first picture that needs it
        self._own_scheduler: Any = None
        self._contexts: dict[tuple[str, torch.dtype], Tensor] = {}  # of negative prompts

    @property
    def settings(self) -> dict[str, Any]:
        if self._weights is None:
            self._check_model()
            self._weights = weights_of(self.model, self.revision)
        return {
            "model": Path(self.model).name if self._is_folder else self.model,
            "revision": self.revision,
            # What is at a revision, or in a folder, may change. Of the Hub it is known once it has been fetched.
            "weights": self._weights,
            **self.sampling.settings,
            "dtype": self.dtype,
        }

    @property
    def size_px(self) -> tuple[int, int]:
        return self.sampling.size_px, self.sampling.size_px

    @property
    def saved_px(self) -> int | None:
        return self.sampling.saved_px

    @property
    def download(self) -> HubFile | None:
        return HubFile(self.model, PIPELINE, self.revision) if _is_id(self.model) else None

    def check(self) -> None:
        _device_of(self.device)
        self._check_model()

    def _check_model(self) -> None:
        if not _is_id(self.model) and not (Path(self.model) / PIPELINE).is_file():
            told = f"no pipeline of diffusers, it has no {PIPELINE}" if self._is_folder else "no such folder"
            raise ValueError(f"generator.model={self.model}: {told}")

    def load(self) -> None:
        if self._pipeline is not None:
            return
        # Seconds of imports, for which pairs that are there need not wait.
        from img2prompt.synthesis.pipeline import is_stable_diffusion, load_pipeline, placed

        self.check()
        self.device = _device_of(self.device)
        pipeline = load_pipeline(self.model, self._pinned)
        self._check_call(pipeline)
        told, factor = f"generator.model={self.model}: {type(pipeline).__name__}", pipeline.vae_scale_factor
        if self.sampling.size_px % factor:
            raise ValueError(f"{told}: generator.size_px must be a multiple of {factor}, got {self.sampling.size_px}")
        if not is_stable_diffusion(pipeline) and self.sampling.guidance[0] < self.sampling.guidance[-1]:
            raise ValueError(f"{told} takes one guidance for all; give a number")
        self._own_scheduler = pipeline.scheduler
        self._pipeline = placed(pipeline, self.device, DTYPES[self.dtype], self._compiles)

    @property
    def _pinned(self) -> str | None:
        """The commit that is in the Hub's cache, where one is: what `settings` names is what is loaded."""
        found = self.settings["weights"] or ""
        return found.removeprefix("commit ") if found.startswith("commit ") else self.revision

    def _check_call(self, pipeline: Any) -> None:
        from img2prompt.synthesis.pipeline import is_stable_diffusion

        takes = inspect.signature(pipeline.__call__).parameters
        told = f"generator.model={self.model}: {type(pipeline).__name__}"
        if "image" in takes:
            raise ValueError(f"{told} makes images of images; give a model that makes them of texts alone")
        if not is_stable_diffusion(pipeline) and "negative_prompt" not in takes and self.sampling.negatives != [None]:
            raise ValueError(f"{told} takes no negative prompt; leave generator.negative_prompt=null")

    def details(self, seed: int) -> dict[str, Any]:
        return {**self.sampling.draws(seed), "compiled": self._compiles}

    def generate(self, prompts: Sequence[str], seeds: Sequence[int], precise: bool = False) -> np.ndarray:
        from img2prompt.synthesis.pipeline import is_stable_diffusion, scheduler_of

        details = [self.details(seed) for seed in seeds]
        pictures = np.empty((len(prompts), self.sampling.size_px, self.sampling.size_px, 3), np.uint8)
        with self._loaded(precise) as pipeline, torch.inference_mode():
            for name in dict.fromkeys(one["scheduler"] for one in details):
                rows = [row for row, one in enumerate(details) if one["scheduler"] == name]
                pipeline.scheduler = scheduler_of(name, self._own_scheduler)
                sample = self._sample if is_stable_diffusion(pipeline) else self._call
                # Compiled for each size: not for each that the parts of a batch may have.
                spare = min(2 ** (len(rows) - 1).bit_length(), len(prompts)) - len(rows)
                padded = rows + rows[-1:] * (spare if self._compiles else 0)
                images = sample(
                    pipeline,
                    [prompts[row] for row in padded],
                    [details[row] for row in padded],
                    [torch.Generator().manual_seed(seeds[row]) for row in padded],
                )
                pictures[rows] = _bytes(images).cpu().numpy()[: len(rows)]
        return pictures

    def _sample(self, pipeline: Any, prompts: list[str], drawn: list[_Drawn], dice: _Dice) -> Float[Tensor, "B 3 H W"]:
        """Pictures in 0..1, by our own loop."""
        weight = torch.tensor([one["guidance"] for one in drawn]).to(self.device)[:, None, None, None]
        without = None
        # By what may be drawn, and not by what was: a picture must not depend on its batch.
        if self.sampling.guidance[-1] > 1:
            without = self._negative_context(pipeline, [one["negative_prompt"] or "" for one in drawn])
        noise, context = noise_of(pipeline, self.sampling.size_px, dice), self._context(pipeline, prompts)
        return denoised(pipeline, noise, context, without, weight, self.sampling.steps, dice)

    def _call(self, pipeline: Any, prompts: list[str], drawn: list[_Drawn], dice: _Dice) -> Float[Tensor, "B 3 H W"]:
        """Pictures in 0..1, by the pipeline itself."""
        negatives = [one["negative_prompt"] for one in drawn]
        return pipeline(
            prompt=prompts,
            # For some, none is another thing than an empty one.
            **({} if None in negatives else {"negative_prompt": negatives}),
            num_inference_steps=self.sampling.steps,
            guidance_scale=drawn[0]["guidance"],
            height=self.sampling.size_px,
            width=self.sampling.size_px,
            generator=dice,
            output_type="pt",
        ).images.float()

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

    @contextmanager
    def _loaded(self, precise: bool) -> Iterator[Any]:
        self.load()
        if not precise or self.dtype == "fp32":
            yield self._pipeline
            return
        # Loaded once more: weights that were rounded are not what they had been, and some may have become infinite.
        if self._precise is None:
            from img2prompt.synthesis.pipeline import load_pipeline

            self._precise = load_pipeline(self.model, self._pinned)
        try:
            yield self._precise.to(self.device, torch.float32)
        finally:
            self._precise.to("cpu")

    @property
    def _compiles(self) -> bool:
        return self.device.startswith("cuda") if self.compile is None else self.compile


def _bytes(images: Float[Tensor, "B 3 H W"]) -> Tensor:
    """uint8 [B, H, W, 3] on the device; a picture with values that are not finite is black."""
    is_whole = images.isfinite().all(dim=3).all(dim=2).all(dim=1)[:, None, None, None]
    images = torch.where(is_whole, images, torch.zeros_like(images))
    return (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _device_of(device: str) -> str:
    """ValueError where it is none, or none that is there."""
    try:
        wanted = torch.device("cuda" if device == "auto" else device)
    except RuntimeError:
        wanted = torch.device("meta")
    if wanted.type not in ("cpu", "cuda"):
        raise ValueError(f"device={device}: must be auto, cpu, cuda or cuda:1")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted.type == "cuda" and not count:
        raise ValueError(
            f"device={device}: no GPU is there for the diffusion model; generator=procedural draws without one, and "
            "device=cpu takes minutes for each image"
        )
    if wanted.type == "cuda" and (wanted.index or 0) >= count:
        raise ValueError(f"device={device}: this machine has {count} GPUs, from cuda:0 on")
    return "cuda" if device == "auto" else device


def _is_id(model: str) -> bool:
    """Whether it can be an id of the Hub, owner/name, and is no folder."""
    return not (model.startswith((".", "~", "/")) or model.count("/") > 1 or "\\" in model or Path(model).is_dir())
