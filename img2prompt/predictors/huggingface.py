"""Captioners of transformers: BLIP, BLIP-2, GIT, an encoder and a decoder (ViT-GPT2), or a model that answers questions
about images; whatever AutoModelForImageTextToText knows.

# B = images in the batch, N = tokens
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
)

from img2prompt.encoders.parts import check_place, loaded
from img2prompt.hub import HubFile, describe
from img2prompt.predictors.captioning import Captioning
from img2prompt.predictors.predictor import Setting

# What a model is asked that wants to be asked something.
QUESTION = "Describe this image in one sentence, as a prompt for an image generator."


class Captioner:
    """The model `name` at `revision`. `text` is how its captions begin or, of a model with a chat template, the
    question.
    """

    def __init__(
        self,
        name: str,
        revision: str | None,
        text: str | None,
        max_new_tokens: int,
        beams: int,
        device: str,
        precision: str,
    ) -> None:
        # Loaded so and not made so afterwards, because some numbers of a model stay in float32.
        self.model: Any = _model(name, revision, torch.bfloat16 if precision == "bf16" else torch.float32)
        self.model.to(device).eval()
        words = loaded("predictor.model", name, AutoTokenizer, revision=revision)
        processor = _processor(name, revision)
        self._has_template = bool(getattr(processor, "chat_template", None))
        # Where images are among the words, the processor puts both together, but for BLIP-2 without words.
        has_places = any(hasattr(self.model.config, key) for key in ("image_token_index", "image_token_id"))
        speaks_alone = text is None and self.model.config.model_type == "blip-2"
        self._together = processor if self._has_template or (has_places and not speaks_alone) else None
        # A processor may want texts; captioners take pixels alone.
        self._pixels = loaded("predictor.model", name, AutoImageProcessor, revision=revision)
        self._words = words
        self._text = QUESTION if self._has_template and text is None else text
        # The processor has a tokenizer of its own. Answers are behind the question, so what fills a batch is before it.
        for one in (words, getattr(processor, "tokenizer", None) or words):
            one.padding_side = "left"
            if one.pad_token_id is None:
                one.pad_token = one.eos_token
        generation = self.model.generation_config
        if generation.pad_token_id is None:
            generation.pad_token_id = words.pad_token_id
        self._options = {"max_new_tokens": max_new_tokens, "num_beams": beams, "do_sample": False}

    def fit(self, image: UInt8[Tensor, "3 H W"]) -> Tensor:
        """Its pixels; an image that is put together with words stays as it is until then."""
        if self._together is not None:
            return image
        return self._pixels(images=[image], return_tensors="pt")["pixel_values"][0]

    @torch.inference_mode()
    def say(self, prepared: Sequence[Tensor]) -> list[str]:
        if self._together is not None:
            inputs = self._with_words(prepared)
            said = self.model.generate(**inputs, **self._options)
            if self._has_template:
                # The question comes first.
                said = said[:, inputs["input_ids"].shape[1] :]
        else:
            pixels = torch.stack(list(prepared)).to(self.model.device, self.model.dtype)
            said = self.model.generate(pixel_values=pixels, **self._begun(len(prepared)), **self._options)
        return self._words.batch_decode(said, skip_special_tokens=True)

    def _begun(self, count: int) -> dict[str, Int64[Tensor, "B N"]]:
        if self._text is None:
            return {}
        config = self.model.config
        tokens = self._words(self._text, return_tensors="pt").input_ids
        # It is a beginning and has no end, but for BLIP, which takes the end away itself.
        if config.model_type != "blip" and tokens[0, -1] in (self._words.sep_token_id, self._words.eos_token_id):
            tokens = tokens[:, :-1]
        name = "decoder_input_ids" if config.is_encoder_decoder else "input_ids"
        return {name: tokens.expand(count, -1).clone().to(self.model.device)}

    def _with_words(self, images: Sequence[Tensor]) -> Any:
        assert self._together is not None
        words = self._text or ""
        if self._has_template:
            turn = [{"type": "image"}, {"type": "text", "text": words}]
            words = self._together.apply_chat_template([{"role": "user", "content": turn}], add_generation_prompt=True)
        # A template may have said how a text begins.
        start = self._words.bos_token
        whole = {"add_special_tokens": False} if start and words.startswith(start) else {}
        texts, listed = [words] * len(images), [[image] for image in images]
        inputs = self._together(text=texts, images=listed, padding=True, return_tensors="pt", **whole)
        return inputs.to(self.model.device, dtype=self.model.dtype)


def predictor(
    setting: Setting, name: str, model: str, revision: str | None, text: str | None, max_new_tokens: int, beams: int
) -> Captioning:
    """The predictor of these settings. ValueError says what is wrong."""
    for key, value in (("max_new_tokens", max_new_tokens), ("beams", beams)):
        if value < 1:
            raise ValueError(f"predictor.{key} must be at least 1, got {value}")
    captioner = Captioner(model, revision, text, max_new_tokens, beams, setting.device, setting.precision)
    found = Captioning(captioner.fit, captioner.say, setting)
    found.files = sorted(Path(model).glob("*")) if Path(model).is_dir() else []
    return found


def _model(name: str, revision: str | None, dtype: torch.dtype) -> Any:
    check_place("predictor.model", name)
    if not Path(name).is_dir():
        print(f"loading {describe(HubFile(name, 'model.safetensors', revision))}", file=sys.stderr)
    config = loaded("predictor.model", name, AutoConfig, revision=revision)
    kinds = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if type(config) not in kinds:
        raise ValueError(
            f"predictor.model={name}: a {config.model_type} says nothing of images; give a captioner, such as "
            "Salesforce/blip-image-captioning-large"
        )
    # Many older ones have no other file than torch's, of which only tensors are read.
    return loaded("predictor.model", name, kinds[type(config)], revision=revision, use_safetensors=None, dtype=dtype)


def _processor(name: str, revision: str | None) -> Any:
    """What puts questions and images together; None of a model that has none."""
    try:
        return AutoProcessor.from_pretrained(name, revision=revision, trust_remote_code=False)
    except (OSError, ValueError):
        return None
