"""Augmentation on the device: other views of an image for the same prompt, drawn anew in every step."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional

_LOG_ASPECT = math.log(4 / 3)


@dataclass(frozen=True)
class Augment:
    """Random crops (of `min_area` to all of the image, aspect 3/4 to 4/3) resized to the full size, and mirroring.

    Chance comes from torch's generator, which the training step seeds. A mirrored image no longer shows what a prompt
    says of left and right; `flip` is a probability.
    """

    min_area: float = 1.0
    flip: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.min_area <= 1:
            raise ValueError(f"augment.min_area must be above 0 and at most 1, got {self.min_area}")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"augment.flip must be between 0 and 1, got {self.flip}")

    def __call__(self, images: UInt8[Tensor, "B 3 H W"]) -> UInt8[Tensor, "B 3 H W"] | Float[Tensor, "B 3 H W"]:
        """Pixels in 0..255; float where they were resampled."""
        if self.min_area == 1 and self.flip == 0:
            return images
        count = len(images)
        # Drawn on the CPU, so that every device sees the same views.
        chance = torch.rand(5, count)
        area = self.min_area + (1 - self.min_area) * chance[0]
        aspect = torch.exp((2 * chance[1] - 1) * _LOG_ASPECT) if self.min_area < 1 else torch.ones(count)
        width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
        mirror = torch.where(chance[4] < self.flip, -1.0, 1.0)
        # In the coordinates of grid_sample, -1 to 1, the crop is an affine map of the output.
        theta = torch.zeros(count, 2, 3)
        theta[:, 0, 0] = width * mirror
        theta[:, 1, 1] = height
        theta[:, 0, 2] = (2 * chance[2] - 1) * (1 - width)
        theta[:, 1, 2] = (2 * chance[3] - 1) * (1 - height)
        grid = functional.affine_grid(theta.to(images.device), list(images.shape), align_corners=False)
        return functional.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
