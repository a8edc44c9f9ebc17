"""SD-IPC as a predictor: images become conditions of Stable Diffusion, and these embeddings, by a bank of prompts."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from img2prompt.bank import Bank
from img2prompt.data.images import decode
from img2prompt.data.prompt_files import read_bank_prompts
from img2prompt.encoders.parts import check_place
from img2prompt.hub import HubFile, describe
from img2prompt.predictions import Prediction
from img2prompt.predictors.predictor import Item, Predictor, Setting, nearest_columns
from img2prompt.sdipc.bridge import SPACES, WAYS, Bridge, images_in, load_tokenizer, text_states, texts_in
from img2prompt.sdipc.converter import load_clip, normalised, square_for
from img2prompt.sdipc.projector import Projector, projector_of_clip

_BATCH = 32
# The mean of fewer images is too much their own; that of more says no more.
_FEWEST_TO_CENTRE, _MOST_TO_CENTRE = 20, 1000


@dataclass(frozen=True)
class _Models:
    clip: Any
    projector: Projector

    def prepare(self, image: UInt8[Tensor, "3 H W"]) -> UInt8[Tensor, "3 S S"]:
        return square_for(self.clip, image)

    def states(self, space: str, prepared: Sequence[Tensor]) -> Float[Tensor, "B K"]:
        return images_in(space, self.clip, self.projector, normalised(torch.stack(list(prepared)).to(self.clip.device)))


class Sdipc(Predictor):
    """The embedding of an image by a bridge from one of the `SPACES`."""

    def __init__(self, models: _Models, bridge: Bridge, space: str, bank: Bank, setting: Setting) -> None:
        self.models, self.bridge, self.space, self.bank, self.top_k = models, bridge, space, bank, setting.top_k
        self.target, self.dimension = setting.target(bank.embeddings.shape[1]), bank.embeddings.shape[1]
        self.mean = bank.embeddings.mean(0).cpu()
        self.mean_of = "the bank"
        self.others: dict[str, Predictor] = {}

    def prepare(self, image: UInt8[Tensor, "3 H W"]) -> UInt8[Tensor, "3 S S"]:
        return self.models.prepare(image)

    def predict_batch(self, ids: list[str], prepared: list[Tensor]) -> Prediction:
        if not prepared:
            embeddings = torch.zeros(0, self.dimension)
        else:
            embeddings = self.bridge(self.models.states(self.space, prepared))
        columns = nearest_columns(self.bank, embeddings, self.top_k)
        return Prediction(ids, embeddings.numpy().astype(np.float32), columns)

    def controls(self) -> dict[str, Predictor]:
        return self.others


def predictor(
    setting: Setting,
    name: str,
    bank: str | Sequence[str] | None,
    way: str,
    space: str,
    neighbours: int,
    clip: str,
    clip_revision: str | None,
    norm: float,
    floor: float,
) -> Sdipc:
    """The predictor of these settings, and as its controls the other way and the other space. ValueError says what is
    wrong.
    """
    for key, value, choices in (("way", way, WAYS), ("space", space, SPACES)):
        if value not in choices:
            raise ValueError(f"predictor.{key}={value}: must be one of {', '.join(choices)}")
    if neighbours < 1:
        raise ValueError(f"predictor.neighbours must be at least 1, got {neighbours}")
    if floor < 0:
        raise ValueError(f"predictor.floor must be at least 0, got {floor}")
    if bank is None:
        raise ValueError(
            "predictor.bank must be given: a file of prompts, or a [list] of files, which the bridge is fitted on"
        )
    prompts = read_bank_prompts(bank)
    check_place("predictor.clip", clip)
    if not Path(clip).is_dir():
        print(f"loading {describe(HubFile(clip, 'model.safetensors', clip_revision))}", file=sys.stderr)
    model = load_clip(clip, clip_revision).to(setting.device).eval()
    models = _Models(model, projector_of_clip(model, norm, floor).to(setting.device))
    targets = torch.from_numpy(setting.embeddings(prompts))
    states = text_states(model, load_tokenizer(clip, clip_revision), prompts)
    seen = _seen(models, setting.items)
    told = (
        "are centred on their own mean" if seen is not None else f"are not centred: {_FEWEST_TO_CENTRE} are the least"
    )
    print(f"{len(setting.items)} images {told}", file=sys.stderr)
    known = Bank(prompts, targets)
    made = {}
    for a_space, a_way in product(SPACES, WAYS):
        of_space = None if seen is None else seen[a_space]
        bridge = Bridge(a_way, neighbours, texts_in(a_space, model, states), targets, of_space)
        made[a_space, a_way] = Sdipc(models, bridge, a_space, known, setting)
    chosen = made.pop((space, way))
    chosen.files = [Path(one) for one in ([bank] if isinstance(bank, str) else bank)]
    chosen.files += sorted(Path(clip).glob("*")) if Path(clip).is_dir() else []
    chosen.others = {f"{a_space}-space, {a_way}": one for (a_space, a_way), one in made.items()}
    return chosen


def _seen(models: _Models, items: Sequence[Item]) -> dict[str, Tensor] | None:
    """States of images that are to be predicted, by space; None of few, whose mean would be their own."""
    if len(items) < _FEWEST_TO_CENTRE:
        return None
    every = max(1, len(items) / _MOST_TO_CENTRE)
    chosen = [items[int(number * every)] for number in range(min(len(items), _MOST_TO_CENTRE))]
    parts: dict[str, list[Tensor]] = {space: [] for space in SPACES}
    prepared: list[Tensor] = []
    for item in chosen:
        try:
            prepared.append(models.prepare(decode(item.read())))
        except (OSError, ValueError):
            # It is counted when it is its turn.
            continue
        if len(prepared) == _BATCH:
            _add(models, parts, prepared)
    if prepared:
        _add(models, parts, prepared)
    if sum(map(len, parts["T"])) < _FEWEST_TO_CENTRE:
        return None
    return {space: torch.cat(some) for space, some in parts.items()}


def _add(models: _Models, parts: dict[str, list[Tensor]], prepared: list[Tensor]) -> None:
    for space, some in parts.items():
        some.append(models.states(space, prepared))
    prepared.clear()
