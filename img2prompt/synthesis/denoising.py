"""The loop of Stable Diffusion 1 and 2: from noise and what is to be shown to a picture.

With DDIM and DPM-Solver++ the host never waits for the GPU.

# B = images in the batch, C = channels of the latent, h, w = its height and width, T = tokens, E = their width
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def noise_of(pipeline: Any, size_px: int, dice: Sequence[torch.Generator]) -> Float[Tensor, "B C h w"]:
    """Drawn on the CPU, where a seed means the same on every machine, each picture's by itself."""
    side = size_px // pipeline.vae_scale_factor
    shape = (1, pipeline.unet.config.in_channels, side, side)
    return torch.cat([torch.randn(shape, generator=one) for one in dice])


def denoised(
    pipeline: Any,
    noise: Float[Tensor, "B C h w"],
    given: Float[Tensor, "B T E"],
    without: Float[Tensor, "B T E"] | None,
    guidance: Float[Tensor, "B 1 1 1"],
    steps: int,
    dice: Sequence[torch.Generator],
) -> Float[Tensor, "B 3 H W"]:
    """Pictures in 0..1 under the condition `given`, by the pipeline's scheduler; guided away from `without`, where it
    is given. Latents stay in float32 between the steps, of whatever dtype the model is.
    """
    unet, scheduler, dtype = pipeline.unet, pipeline.scheduler, pipeline.unet.dtype
    # On the CPU, where the scheduler reads them without waiting; the model has its own copy.
    scheduler.set_timesteps(steps, device="cpu")
    times = scheduler.timesteps.to(unet.device)
    own = {"generator": list(dice)} if _takes_generator(scheduler) else {}
    latents = noise.to(unet.device) * scheduler.init_noise_sigma
    context = (given if without is None else torch.cat([without, given])).to(dtype)
    for number, time in enumerate(scheduler.timesteps):
        doubled = latents if without is None else torch.cat([latents, latents])
        doubled = scheduler.scale_model_input(doubled, time).to(dtype)
        predicted = unet(doubled, times[number], encoder_hidden_states=context, return_dict=False)[0].float()
        if without is not None:
            # Classifier-free guidance (Ho and Salimans 2022), in their notation (1 + w) = guidance.
            away, towards = predicted.chunk(2)
            predicted = away + guidance * (towards - away)
        latents = scheduler.step(predicted, time, latents, return_dict=False, **own)[0]
    latents = (latents / pipeline.vae.config.scaling_factor).to(dtype)
    return pipeline.vae.decode(latents, return_dict=False)[0].float() / 2 + 0.5


def _takes_generator(scheduler: Any) -> bool:
    return "generator" in inspect.signature(scheduler.step).parameters
