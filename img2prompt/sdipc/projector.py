"""An image as a condition of Stable Diffusion, in closed form: The CLIP Model is Secretly an Image-to-Prompt Converter
(Ding et al., NeurIPS 2023; the numbers of equations are theirs).

CLIP maps states of images and of texts into one space C, linearly. Stable Diffusion reads the states of texts, in their
own space T. So what CLIP says of an image is carried to T by the inverse of the map of texts, and takes there the place
of a prompt.

# B = images, V = width of an image's state, K = width of a text's state (of T), P = width of C, T = tokens
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

# Singular values below it are noise, which the inverse would blow up.
FLOOR = 0.3
# Of states of prompts at their end, in T.
NORM = 27.5


class Projector(nn.Module):
    """`matrix` [K, V] carries states of images (CLIP's, behind its last layer norm) to T; each result is given the
    length `norm`. `rank` of the `full` singular values of the map of texts were above the `floor`.
    """

    def __init__(self, matrix: Float[Tensor, "K V"], norm: float, floor: float, rank: int, full: int) -> None:
        super().__init__()
        if not norm > 0:
            raise ValueError(f"norm must be above 0, got {norm}")
        self.rank, self.full = rank, full
        self.register_buffer("matrix", matrix)
        self.register_buffer("norm", torch.tensor(float(norm)))
        self.register_buffer("floor", torch.tensor(float(floor)))

    matrix: Tensor
    norm: Tensor
    floor: Tensor

    def forward(self, states: Float[Tensor, "B V"]) -> Float[Tensor, "B K"]:
        """f_cnvrt of equation 6."""
        return self.norm * functional.normalize(functional.linear(states, self.matrix), dim=-1)


def projector_of(
    image_map: Float[Tensor, "P V"], text_map: Float[Tensor, "P K"], norm: float = NORM, floor: float = FLOOR
) -> Projector:
    """Equation 6, folded: matrix = text_map⁺ image_map of a CLIP's two projections. ValueError when no singular value
    is above the floor.
    """
    # Once, on whatever device; the inverse in double precision, so that a floor is a floor.
    wide = text_map.detach().double().cpu()
    kept = int((torch.linalg.svdvals(wide) > floor).sum())
    if not kept:
        raise ValueError(f"floor={floor}: no singular value of CLIP's map of texts is above it; lower it")
    matrix = truncated_inverse(wide, floor) @ image_map.detach().double().cpu()
    return Projector(matrix.float(), norm, floor, kept, min(wide.shape))


def truncated_inverse(matrix: Float[Tensor, "P K"], floor: float) -> Float[Tensor, "K P"]:
    """The pseudo-inverse in which singular values up to `floor` are taken for 0."""
    return torch.linalg.pinv(matrix, atol=floor, rtol=0.0)


def projector_of_clip(clip: Any, norm: float = NORM, floor: float = FLOOR) -> Projector:
    """That of a CLIPModel of transformers."""
    return projector_of(clip.visual_projection.weight, clip.text_projection.weight, norm, floor)


def pseudo_prompt(null: Float[Tensor, "T K"], converted: Float[Tensor, "B K"]) -> Float[Tensor, "B T K"]:
    """Equation 7: the start of the null prompt, and at all other places what the image was converted to."""
    start = null[:1].expand(len(converted), 1, -1)
    return torch.cat([start, converted[:, None].to(null.dtype).expand(-1, len(null) - 1, -1)], dim=1)
