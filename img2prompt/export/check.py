"""Whether an export says what the checkpoint says: the same images through both, as their users would give them."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Float
from PIL import Image

from img2prompt.data.listing import list_images
from img2prompt.predictions import joined
from img2prompt.predictors.predictor import Item, Predictor, items_of, predict_items
from img2prompt.synthesis.grammar import grammar
from img2prompt.synthesis.procedural import Procedural

IMAGES = 32
EXACT, INT8 = 0.99999, 0.99  # the least cosine of an image
TEXTS, OF_A_BANK = 16, 0.999  # banks have half precision
_BATCH = 8
# Height and width: odd ones, wide, high, smaller and larger than what encoders read.
_SIZES = ((224, 224), (301, 199), (97, 411), (640, 333), (53, 37), (400, 400), (31, 200), (257, 256))


@dataclass(frozen=True)
class Agreement:
    """The cosines of the embeddings of the same images."""

    least: float
    mean: float
    images: int
    of: str

    def line(self) -> str:
        return f"{self.images} {self.of}: cosine at least {self.least:.7f}, mean {self.mean:.7f}"


def items_to_compare(images: str | None) -> tuple[list[Item], str]:
    """The user's first images or, without any, as many that are drawn, and what they are called."""
    if images is None:
        return drawn(), "drawn images of odd sizes"
    listing = list_images(images)
    if not listing.files:
        raise ValueError(f"images={images}: no image file there")
    return items_of(listing.files[:IMAGES]), "of your images"


def drawn() -> list[Item]:
    """Pictures of all shapes, as PNG."""
    prompts = list(grammar(IMAGES, 0))
    pictures = Procedural(96).generate(prompts, range(IMAGES))
    found = []
    for number, picture in enumerate(pictures):
        height, width = _SIZES[number % len(_SIZES)]
        file = io.BytesIO()
        Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC).save(file, "PNG")
        found.append(Item(f"{number:02d}", f"drawn {number}", partial(bytes, file.getvalue())))
    return found


def agreement(ours: Predictor, theirs: Predictor, items: Sequence[Item], of: str) -> Agreement:
    """The cosine of each image between both; ValueError when either can read none, or they read others."""
    return of_embeddings(embeddings(ours, items), embeddings(theirs, items), of)


def of_embeddings(
    ours: Mapping[str, Float[np.ndarray, " D"]], theirs: Mapping[str, Float[np.ndarray, " D"]], of: str
) -> Agreement:
    """The same of embeddings by id."""
    if ours.keys() != theirs.keys() or not ours:
        raise ValueError(f"{len(ours)} images were read by img2prompt and {len(theirs)} by the export")
    cosines = [_cosine(ours[one], theirs[one]) for one in ours]
    return Agreement(min(cosines), sum(cosines) / len(cosines), len(cosines), of)


def embeddings(predictor: Predictor, items: Sequence[Item]) -> dict[str, Float[np.ndarray, " D"]]:
    try:
        found = joined(list(predict_items(predictor, items, _BATCH, 2)))
    except RuntimeError as error:
        raise ValueError(f"the model cannot be run as it is ({' '.join(str(error).split())[:160]})") from None
    return dict(zip(found.ids, found.embeddings, strict=True))


def _cosine(one: Float[np.ndarray, " D"], other: Float[np.ndarray, " D"]) -> float:
    # In float64, where a length of 1 is one.
    one, other = one.astype(np.float64), other.astype(np.float64)
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))
