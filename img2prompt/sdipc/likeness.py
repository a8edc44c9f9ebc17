"""How like their references, and their texts, variations are: the measures of the tables of Ding et al. (2023), which
are those of DreamBooth (Ruiz et al., 2023), and the distance of two sets of images (Heusel et al., 2017).

# V = variations, R = references, T = texts, E = width of an embedding
"""

import pickle
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional
from torchmetrics.image.fid import FrechetInceptionDistance

from img2prompt.data.decoding import ImageError
from img2prompt.data.fitting import fit
from img2prompt.data.images import decode
from img2prompt.data.listing import printable, read_bytes
from img2prompt.encoders.encoder import Encoder


@torch.inference_mode()
def embedded(encoder: Encoder, paths: Sequence[Path], batch_size: int, threads: int) -> Float[Tensor, "N E"]:
    """Unit embeddings of image files, on the CPU. Images are scaled by their shorter side, and their middle is seen."""
    want, device = encoder.preprocessing, next(encoder.parameters()).device
    parts = []
    for images in _batches(paths, want.image_size_px, want.interpolation, batch_size, threads):
        parts.append(functional.normalize(encoder.encode(encoder.normalise(images.to(device))).float(), dim=-1).cpu())
    return torch.cat(parts)


def likeness(
    variations: Float[Tensor, "V E"], others: Float[Tensor, "_ E"], own: Sequence[Sequence[int]]
) -> tuple[Float[Tensor, " V"], Float[Tensor, " V"]]:
    """The mean cosine of each variation with its `own` rows among the others (references or texts), and with all rows
    that are not: what any picture has in common with them. The second is NaN where there are none. Rows are units.
    """
    cosines = variations @ others.T
    is_own = torch.zeros(cosines.shape, dtype=torch.bool)
    for row, numbers in enumerate(own):
        is_own[row, list(numbers)] = True
    with_own = cosines.masked_fill(~is_own, 0).sum(1) / is_own.sum(1)
    return with_own, cosines.masked_fill(is_own, 0).sum(1) / (~is_own).sum(1)


def clip_scores(cosines: Float[Tensor, " V"]) -> Float[Tensor, " V"]:
    """CLIP-Score of images and their texts (Hessel et al., 2021, without its factor of 2.5)."""
    return cosines.clamp(min=0)


def inception(weights: str | None) -> FrechetInceptionDistance:
    """The judge of `frechet_distance`: Inception v3 with the `weights` of a file, or the usual ones, which are fetched.
    ValueError when they cannot be had.
    """
    try:
        if weights is not None:
            # The library would run whatever program a file holds; here it may hold tensors only.
            torch.load(weights, map_location="cpu", weights_only=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=UserWarning)  # that it takes memory
            # Images are resized as the first implementation did it, for that is what published figures are of.
            return FrechetInceptionDistance(feature_extractor_weights_path=weights, antialias=False)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:160]
        given = "inception: the usual weights" if weights is None else f"inception={weights}: Inception's weights"
        advice = "" if weights is not None else "; give inception=FILE, the weights that torch-fidelity publishes"
        raise ValueError(f"{given} cannot be had ({reason}){advice}") from None


def frechet_distance(
    judge: Any, real: Sequence[Path], made: Sequence[Path], device: str, batch_size: int, threads: int
) -> float:
    """FID of two sets of at least two images each; all are cut square, at the size of the first one made."""
    size_px = min(decode(read_bytes(made[0])).shape[1:])
    judge = judge.to(device)
    for paths, is_real in ((real, True), (made, False)):
        for images in _batches(paths, size_px, "bicubic", batch_size, threads):
            judge.update(images.to(device), real=is_real)
    return float(judge.compute())


def _batches(
    paths: Sequence[Path], size_px: int, interpolation: str, batch_size: int, threads: int
) -> Iterator[UInt8[Tensor, "B 3 S S"]]:
    def prepared(path: Path) -> Tensor:
        try:
            return fit(decode(read_bytes(path)), size_px, interpolation, "shortest")
        except ImageError as error:
            raise ValueError(f"{printable(path)}: {error}") from None

    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        for start in range(0, len(paths), batch_size):
            some: Iterable[Tensor] = pool.map(prepared, paths[start : start + batch_size])
            yield torch.stack(list(some))
