"""Zero-shot retrieval: the prompts of a bank that CLIP finds nearest to an image, and the mean of their embeddings.

# B = images in the batch, N = prompts of the bank, E = width of CLIP's space, D = width of the embeddings
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from img2prompt.bank import Bank
from img2prompt.data.fitting import fit
from img2prompt.data.listing import file_stamp
from img2prompt.data.mapped import mapped_rows
from img2prompt.data.prompt_files import read_bank_prompts
from img2prompt.data.targets import TextEncoder
from img2prompt.encoders.attention import sequence_first
from img2prompt.encoders.encoder import told_as
from img2prompt.encoders.openclip import OpenCLIP
from img2prompt.encoders.text_tower import text_features
from img2prompt.hub import describe
from img2prompt.predictions import Prediction
from img2prompt.predictors.predictor import Predictor, Setting, nearest_columns
from img2prompt.search import nearest

_MEAN_AT_ONCE = 65_536


class Retrieval(Predictor):
    """The mean of the embeddings of the `neighbours` prompts that are nearest to an image in CLIP's space, weighed by a
    softmax of their cosines over `temperature`. `keys` are the bank's prompts in that space.
    """

    def __init__(
        self,
        encoder: OpenCLIP,
        keys: Float[Tensor, "N E"],
        bank: Bank,
        neighbours: int,
        temperature: float,
        setting: Setting,
    ) -> None:
        self.encoder, self.keys, self.bank = encoder.to(setting.device).eval(), keys, bank
        if setting.precision == "bf16" and setting.device == "cpu":
            sequence_first(self.encoder)
        self._targets = bank.embeddings
        self.neighbours, self.temperature = neighbours, temperature
        self._setting = setting
        self.dimension = bank.embeddings.shape[1]
        self.target = setting.target(self.dimension)
        self.mean, self.mean_of = _mean(bank.embeddings), "the bank"

    def prepare(self, image: UInt8[Tensor, "3 H W"]) -> UInt8[Tensor, "3 S S"]:
        want = self.encoder.preprocessing
        return fit(image, want.image_size_px, want.interpolation, want.resize_mode)

    @torch.inference_mode()
    def predict_batch(self, ids: list[str], prepared: list[Tensor]) -> Prediction:
        if not prepared:
            embeddings = torch.zeros(0, self.dimension)
        else:
            images = torch.stack(prepared).to(self._setting.device)
            with torch.autocast(images.device.type, torch.bfloat16, enabled=self._setting.precision == "bf16"):
                said = self.encoder.encode(self.encoder.normalise(images))
            embeddings = self.retrieved(functional.normalize(said.float(), dim=-1))
        columns = nearest_columns(self.bank, embeddings, self._setting.top_k)
        return Prediction(ids, embeddings.numpy().astype(np.float32), columns)

    def retrieved(self, images: Float[Tensor, "B E"]) -> Float[Tensor, "B D"]:
        """Unit embeddings, on the CPU, of unit features of images."""
        cosines, rows = nearest(images, self.keys, self.neighbours)
        weights = (cosines / self.temperature).softmax(dim=-1).cpu()
        found = self._targets[rows.cpu()].float()
        return functional.normalize((weights[..., None] * found).sum(1), dim=-1)


def predictor(
    setting: Setting,
    name: str,
    bank: str | Sequence[str] | None,
    model: str,
    tag: str,
    pretrained: bool | str,
    neighbours: int,
    temperature: float,
    vision_config: dict[str, Any],
) -> Retrieval:
    """The predictor of these settings. ValueError says what is wrong."""
    if bank is None:
        raise ValueError("predictor.bank must be given: a file of prompts, or a [list] of files, that is searched")
    if neighbours < 1:
        raise ValueError(f"predictor.neighbours must be at least 1, got {neighbours}")
    if not temperature > 0:
        raise ValueError(f"predictor.temperature must be above 0, got {temperature}")
    if pretrained is False:
        raise ValueError("predictor.pretrained must be true or a file: weights drawn at random find nothing")
    file = None if pretrained is True else str(pretrained)
    prompts = read_bank_prompts(bank)
    encoder = clip_of(model, tag, file, vision_config)
    weights = encoder.weights_file(file)
    is_bf16 = setting.precision == "bf16"
    folder = setting.cache / "banks"
    folder.mkdir(parents=True, exist_ok=True)
    with tqdm(total=2 * len(prompts), desc="bank", unit=" rows", disable=not sys.stderr.isatty()) as bar:
        towers: list[Any] = []

        def in_clip(some: list[str]) -> Float[np.ndarray, "B E"]:
            # The tower is read when it is needed, and once.
            towers[:] = towers or [encoder.text_tower(file)]
            return text_features(towers[0], model, some, setting.device, lambda count: None, is_bf16).numpy()

        about = about_clip(encoder, model, vision_config, weights, setting)
        keys = mapped_rows(folder, prompts, about, encoder.width, in_clip, bar.update)
        towers.clear()
        targets = target_rows(prompts, setting, bar.update)
    found = Retrieval(encoder, keys, Bank(prompts, targets), neighbours, temperature, setting)
    found.files = [Path(weights), *(Path(one) for one in ([bank] if isinstance(bank, str) else bank))]
    return found


def target_rows(
    prompts: Sequence[str], setting: Setting, advance: Callable[[int], object] = lambda count: None
) -> Float[Tensor, "N D"]:
    """The target embeddings of a bank, in half precision on disk and read as they are needed."""
    folder = setting.cache / "banks"
    folder.mkdir(parents=True, exist_ok=True)
    encoders: list[TextEncoder] = []

    def embedded(some: list[str]) -> Float[np.ndarray, "B D"]:
        encoders[:] = encoders or [TextEncoder(setting.text, setting.device, "fp32")]
        return encoders[0].embed(some)

    # What had to be fetched is here after the first.
    width = setting.embeddings(prompts[:1]).shape[1]
    about = ["target", setting.text.name, setting.text.revision, *map(file_stamp, setting.text_files())]
    return mapped_rows(folder, prompts, about, width, embedded, advance)


def about_clip(
    encoder: OpenCLIP, model: str, vision_config: Mapping[str, Any], weights: str, setting: Setting
) -> list[Any]:
    """All that the features of texts depend on."""
    how = ["CLIP", model, vision_config, encoder.facts["quick_gelu"], setting.precision]
    return [*how, file_stamp(Path(weights))]


def clip_of(model: str, tag: str, file: str | None, vision_config: Mapping[str, Any]) -> OpenCLIP:
    """The image tower with its weights, the published ones or a file's, of a CLIP whose texts can be read, too."""
    with told_as({"encoder.name": "predictor.model", "encoder.": "predictor."}):
        # The tag's facts are those of a file of its weights, too; of a model of one's own there is no tag.
        known = tag in open_clip.list_pretrained_tags_by_model(model)
        encoder = OpenCLIP(model, tag if file is None or known else None, vision_config=vision_config)
        refusal = encoder.text_refusal(file)
        if refusal is not None:
            raise ValueError(f"predictor.model={model}: no texts can be compared: {refusal}")
        if file is None:
            print(f"loading {'; '.join(map(describe, encoder.downloads()))}", file=sys.stderr)
        encoder.load_pretrained(file)
    return encoder


def _mean(rows: Float[Tensor, "N D"]) -> Float[Tensor, " D"]:
    total = torch.zeros(rows.shape[1], dtype=torch.float64)
    for start in range(0, len(rows), _MEAN_AT_ONCE):
        total += rows[start : start + _MEAN_AT_ONCE].double().sum(0)
    return (total / len(rows)).float()
