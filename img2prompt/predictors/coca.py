"""CoCa (Yu et al., 2022) of open_clip as a captioner.

# B = images in the batch, N = tokens so far
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from img2prompt.data.fitting import fit
from img2prompt.encoders.encoder import load_strictly, read_weights, suggest
from img2prompt.hub import HubFile, describe
from img2prompt.predictors.captioning import Captioning
from img2prompt.predictors.predictor import Setting

# Shorter captions are not ended, as in open_clip.
_LEAST_TOKENS = 5


class Captioner:
    """The model `name`, without weights. It says the likeliest next word each time, up to `max_tokens` tokens.

    The library has a loop of its own, which asks transformers for a class that is no longer there.
    """

    def __init__(self, name: str, max_tokens: int, device: str, precision: str) -> None:
        self.model: Any = open_clip.create_model(name).eval()
        self._dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self._device, self._size_px = device, int(self.model.visual.image_size[0])
        self._words: Any = open_clip.get_tokenizer(name)
        self._most = min(max_tokens, self.model.context_length)

    def load(self, weights: str) -> None:
        load_strictly(self.model, read_weights(weights), weights)
        self.model.to(self._device, self._dtype)

    def fit(self, image: UInt8[Tensor, "3 H W"]) -> UInt8[Tensor, "3 S S"]:
        return fit(image, self._size_px, "bicubic", "shortest")

    def say(self, prepared: Sequence[Tensor]) -> list[str]:
        return [self._read(tokens) for tokens in self.tokens(torch.stack(list(prepared))).tolist()]

    @torch.inference_mode()
    def tokens(self, images: UInt8[Tensor, "B 3 S S"]) -> Int64[Tensor, "B N"]:
        model, start, end = self.model, self._words.sot_token_id, self._words.eot_token_id
        facts = (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
        mean, std = (torch.tensor(one, device=self._device).view(3, 1, 1) for one in facts)
        pixels = ((images.to(self._device).float() / 255 - mean) / std).to(self._dtype)
        latent, seen = model._encode_image(pixels)
        said = torch.full((len(images), 1), start, device=self._device)
        over = torch.zeros(len(images), dtype=torch.bool, device=self._device)
        while said.shape[1] < self._most and not over.all():
            told = model(None, said, image_latent=latent, image_embs=seen, output_labels=False)["logits"][:, -1]
            if said.shape[1] < _LEAST_TOKENS:
                told[:, end] = -torch.inf
            word = torch.where(over, model.pad_id, told.argmax(-1))
            over |= word == end
            said = torch.cat([said, word[:, None]], dim=1)
        return said

    def _read(self, tokens: list[int]) -> str:
        ends = (self._words.eot_token_id, self.model.pad_id)
        words = tokens[1:]
        stop = next((place for place, one in enumerate(words) if one in ends), len(words))
        return self._words.decode(words[:stop])


def predictor(setting: Setting, name: str, model: str, tag: str, pretrained: bool | str, max_tokens: int) -> Captioning:
    """The predictor of these settings. ValueError says what is wrong."""
    config = open_clip.get_model_config(model) if ":" not in model else None
    if config is None or "multimodal_cfg" not in config:
        known = [one for one in open_clip.list_models() if one.startswith("coca")]
        told = f"no CoCa of open_clip{suggest(model, known)}; there are {', '.join(known)}"
        raise ValueError(f"predictor.model={model}: {told}")
    if max_tokens <= _LEAST_TOKENS:
        raise ValueError(f"predictor.max_tokens must be above {_LEAST_TOKENS}, got {max_tokens}")
    if pretrained is False:
        raise ValueError("predictor.pretrained must be true or a file: weights drawn at random say nothing")
    # Before the model, which takes seconds to draw.
    weights = _weights(model, tag) if pretrained is True else str(pretrained)
    captioner = Captioner(model, max_tokens, setting.device, setting.precision)
    captioner.load(weights)
    found = Captioning(captioner.fit, captioner.say, setting)
    found.files = [] if pretrained is True else [Path(str(pretrained))]
    return found


def _weights(model: str, tag: str) -> str:
    tags = open_clip.list_pretrained_tags_by_model(model)
    if tag not in tags:
        raise ValueError(f"predictor.tag={tag}: {model} has the tags {', '.join(tags)}")
    published = open_clip.get_pretrained_cfg(model, tag)
    repository = published["hf_hub"].rstrip("/")
    print(f"loading {describe(HubFile(repository, 'open_clip_model.safetensors'))}", file=sys.stderr)
    try:
        return open_clip.download_pretrained(published)
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"predictor.tag={tag}: its weights cannot be had ({reason})") from None
