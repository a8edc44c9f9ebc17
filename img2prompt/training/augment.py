"""Augmentation on the device: other views of an image for the same prompt, drawn anew for each image in every step.

# B = images, H, W = rows and columns; pixels are in 0..255
"""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor
from torch.nn import functional

from img2prompt.data.sample import Batch

_LOG_ASPECT = math.log(4 / 3)
# Rec. 601, as JPEG and the published transforms weigh the channels.
_LUMA = (0.299, 0.587, 0.114)
_TO_YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
_TO_RGB = ((1.0, 0.0, 1.402), (1.0, -0.344136, -0.714136), (1.0, 1.772, 0.0))
# The luminance table of ITU-T T.81, annex K; JPEG noise uses it for all three channels.
_QUANTISATION = (
    *(16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56),
    *(14, 17, 22, 29, 51, 87, 80, 62, 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92),
    *(49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99),
)


@dataclass(frozen=True)
class Augment:
    """What is done to training images, in this order; with the defaults nothing is.

    `min_area`: a crop of so much to all of the image, aspect 3/4 to 4/3, resized to the full size. `flip`: probability
    of mirroring, never where a prompt speaks of left or right. `jitter`: brightness, contrast and saturation are scaled
    by 1 - jitter to 1 + jitter, and hues turned by up to jitter quarters of a circle. `jpeg`: probability of JPEG
    noise of quality `jpeg_quality` to 95. `erase`: probability that a rectangle of 2 to 33 % of the image is filled
    with grey. `mixup`: see `mixed`. Chance comes from torch's generator, which the training step seeds.
    """

    min_area: float = 1.0
    flip: float = 0.0
    jitter: float = 0.0
    jpeg: float = 0.0
    jpeg_quality: int = 50
    erase: float = 0.0
    mixup: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.min_area <= 1:
            raise ValueError(f"augment.min_area must be above 0 and at most 1, got {self.min_area}")
        for name in ("flip", "jitter", "jpeg", "erase"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"augment.{name} must be between 0 and 1, got {getattr(self, name)}")
        if self.mixup < 0:
            raise ValueError(f"augment.mixup must be at least 0, got {self.mixup}")
        if not 1 <= self.jpeg_quality <= 95:
            raise ValueError(f"augment.jpeg_quality must be between 1 and 95, got {self.jpeg_quality}")

    @property
    def changes_images(self) -> bool:
        """Whether an image looks otherwise each time; MixUp blends what it looks like."""
        return replace(self, mixup=0.0, jpeg_quality=50) != Augment()

    def __call__(
        self, images: UInt8[Tensor, "B 3 H W"], mirrorable: Bool[Tensor, " B"]
    ) -> UInt8[Tensor, "B 3 H W"] | Float[Tensor, "B 3 H W"]:
        """The pixels as they came, or float where something was done to them."""
        # Drawn on the CPU, so that every device sees the same views; always as many, so that one does not move another.
        chance = torch.rand(16, len(images)).to(images.device, non_blocking=True)
        # 256 levels and the places of pixels are more than bfloat16 can tell apart.
        with torch.autocast(images.device.type, enabled=False):
            if self.min_area < 1 or self.flip > 0:
                mirrored = (chance[0] < self.flip) & mirrorable
                images = _cropped(images, chance[1:5], self.min_area, mirrored)
            if self.jitter > 0:
                images = _jittered(images.float(), (2 * chance[5:9] - 1) * self.jitter)
            if self.jpeg > 0:
                quality = self.jpeg_quality + (95 - self.jpeg_quality) * chance[9]
                chosen = (chance[10] < self.jpeg)[:, None, None, None]
                images = torch.where(chosen, jpeg_noise(images.float(), quality), images.float())
            if self.erase > 0:
                images = _erased(images.float(), chance[11:15], chance[15] < self.erase)
        return images


def mixed(values: Tensor, batch: Batch, alpha: float) -> tuple[Tensor, Batch]:
    """MixUp (Zhang et al., 2018): each of B items, its target and its labels blended with another's of the batch, at a
    share drawn from Beta(alpha, alpha); targets keep unit length.
    """
    count = len(values)
    share = torch.distributions.Beta(alpha, alpha).sample((count,)).to(values.device, non_blocking=True)
    other = torch.randperm(count).to(values.device, non_blocking=True)
    shares = share.view(-1, *[1] * (values.ndim - 1))
    blended = shares * values.float() + (1 - shares) * values[other].float()

    def both(own: Tensor) -> Tensor:
        return share[:, None] * own + (1 - share[:, None]) * own[other]

    labels = None if batch.labels is None else both(batch.labels)
    return blended, replace(batch, targets=functional.normalize(both(batch.targets), dim=-1), labels=labels)


def jpeg_noise(images: Float[Tensor, "B 3 H W"], quality: Float[Tensor, " B"]) -> Float[Tensor, "B 3 H W"]:
    """What JPEG of these qualities (1 to 100) leaves of the images: 8 x 8 blocks of the discrete cosine transform of
    YCbCr, rounded to multiples of the quantisation table; without subsampling of the colours.
    """
    height, width = images.shape[2:]
    padded = functional.pad(images, (0, -width % 8, 0, -height % 8), mode="replicate")
    to_ycbcr, to_rgb = (torch.tensor(one, device=images.device) for one in (_TO_YCBCR, _TO_RGB))
    blocks = torch.einsum("cd,bdhw->bchw", to_ycbcr, padded)
    blocks = blocks.unflatten(3, (-1, 8)).unflatten(2, (-1, 8))  # [B, 3, H/8, 8, W/8, 8]
    dct = _dct_matrix().to(images.device)
    offset = torch.tensor([128.0, 0.0, 0.0], device=images.device)[:, None, None, None, None]
    coefficients = torch.einsum("iy,jx,bchywx->bchiwj", dct, dct, blocks - offset)
    # The scale of libjpeg: 5000 / quality below 50, 200 - 2 quality above, in percent.
    scale = torch.where(quality < 50, 5000 / quality, 200 - 2 * quality)
    table = torch.tensor(_QUANTISATION, device=images.device, dtype=torch.float32).view(8, 8)
    step = ((table * scale[:, None, None] + 50) / 100).floor().clamp(1, 255)[:, None, None, :, None, :]
    coefficients = (coefficients / step).round() * step
    blocks = torch.einsum("iy,jx,bchiwj->bchywx", dct, dct, coefficients) + offset
    ycbcr = blocks.flatten(4, 5).flatten(2, 3)[:, :, :height, :width]
    return torch.einsum("cd,bdhw->bchw", to_rgb, ycbcr).round().clamp(0, 255)


def _cropped(images: Tensor, chance: Tensor, min_area: float, mirrored: Tensor) -> Tensor:
    area = min_area + (1 - min_area) * chance[0]
    aspect = torch.exp((2 * chance[1] - 1) * _LOG_ASPECT) if min_area < 1 else torch.ones_like(area)
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    # In the coordinates of grid_sample, -1 to 1, the crop is an affine map of the output.
    theta = torch.zeros(len(images), 2, 3, device=images.device)
    theta[:, 0, 0] = torch.where(mirrored, -width, width)
    theta[:, 1, 1] = height
    theta[:, 0, 2] = (2 * chance[2] - 1) * (1 - width)
    theta[:, 1, 2] = (2 * chance[3] - 1) * (1 - height)
    grid = functional.affine_grid(theta, list(images.shape), align_corners=False)
    return functional.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)


def _jittered(images: Tensor, amount: Tensor) -> Tensor:
    brightness, contrast, saturation, hue = amount[:, :, None, None, None]
    luma = torch.tensor(_LUMA, device=images.device)[:, None, None]
    images = (images * (1 + brightness)).clamp(0, 255)
    grey = (images * luma).sum(1, keepdim=True).mean((2, 3), keepdim=True)
    images = (grey + (images - grey) * (1 + contrast)).clamp(0, 255)
    grey = (images * luma).sum(1, keepdim=True)
    images = (grey + (images - grey) * (1 + saturation)).clamp(0, 255)
    # A turn of the plane of Cb and Cr.
    angle = hue[:, 0, 0, 0] * (math.pi / 2)
    to_ycbcr, to_rgb = (torch.tensor(one, device=images.device) for one in (_TO_YCBCR, _TO_RGB))
    turn = torch.eye(3, device=images.device).repeat(len(images), 1, 1)
    turn[:, 1, 1], turn[:, 1, 2], turn[:, 2, 1], turn[:, 2, 2] = angle.cos(), -angle.sin(), angle.sin(), angle.cos()
    matrix = to_rgb @ turn @ to_ycbcr
    return torch.einsum("bcd,bdhw->bchw", matrix, images).clamp(0, 255)


def _erased(images: Tensor, chance: Tensor, chosen: Tensor) -> Tensor:
    height, width = images.shape[2:]
    area = 0.02 + 0.31 * chance[0]
    aspect = torch.exp((2 * chance[1] - 1) * math.log(3.3))
    high, wide = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    top, left = chance[2] * (1 - high), chance[3] * (1 - wide)
    y = ((torch.arange(height, device=images.device) + 0.5) / height)[None]
    x = ((torch.arange(width, device=images.device) + 0.5) / width)[None]
    rows = (y >= top[:, None]) & (y < (top + high)[:, None])
    columns = (x >= left[:, None]) & (x < (left + wide)[:, None])
    hole = rows[:, :, None] & columns[:, None, :] & chosen[:, None, None]
    return images.masked_fill(hole[:, None], 127.5)


def _dct_matrix() -> Tensor:
    """The orthonormal DCT-II of eight values, rows are frequencies."""
    place, frequency = torch.arange(8.0), torch.arange(8.0)[:, None]
    matrix = torch.cos((2 * place + 1) * frequency * math.pi / 16) / 2
    matrix[0] /= math.sqrt(2)
    return matrix
