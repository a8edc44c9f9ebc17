"""The encoder that sees nothing: with a bias for a head it is the constant, the first rung of every ladder."""

import torch
from torch import Tensor

from img2prompt.encoders.encoder import Encoder, Preprocessing


class Blind(Encoder):
    """Zero features for every image, so that the mean embedding is a model like any other."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 0
        self.preprocessing = Preprocessing(image_size_px=1, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
        self.facts = {}

    def encode(self, pixels: Tensor) -> Tensor:
        return torch.zeros(len(pixels), 0, device=pixels.device)
