"""What conditions Stable Diffusion: a caption that BLIP gives an image, as tokens, and what its text encoder says of
them. Nothing here learns.

# B = images in the batch, P = side of BLIP's input, T = tokens of a context, K = their width
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int32, Int64
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
)

from img2prompt.encoders.parts import config_of, freeze, loaded, plain_config

CONTEXT_TOKENS = 77  # of CLIP's text encoders
_MOST_WORDS = 20  # pieces of words in a caption, as BLIP has it


class Captioner(nn.Module):
    """A BLIP (Li et al., 2022) whose captions, read by Stable Diffusion's text encoder, are contexts. `architecture`
    comes from `captioner_architecture`: all but the weights, which `load` or a checkpoint brings.
    """

    def __init__(self, architecture: Mapping[str, Any]) -> None:
        super().__init__()
        self._known = architecture
        self.blip: Any = BlipForConditionalGeneration(BlipConfig(**architecture["blip"]))
        self.text_encoder: Any = CLIPTextModel(CLIPTextConfig(**architecture["text_encoder"]))
        self._words = Tokenizer.from_str(architecture["words"])
        self._clip_words = Tokenizer.from_str(architecture["clip_words"])
        for part in (self.blip, self.text_encoder):
            freeze(part)

    def load(self, name: str, pipeline: str, revision: str | None) -> None:
        """The weights of the BLIP `name` and of the text encoder of a pipeline."""
        self.blip.load_state_dict(loaded("encoder.captioner", name, BlipForConditionalGeneration).state_dict())
        text = loaded("encoder.name", pipeline, CLIPTextModel, subfolder="text_encoder", revision=revision)
        self.text_encoder.load_state_dict(text.state_dict())

    @torch.no_grad()
    def captions(self, images: Float[Tensor, "B 3 H W"]) -> list[str]:
        """What BLIP says of images of values from 0 to 1, by its likeliest next word each time."""
        said = self._greedy(self._prepared(images)).tolist()
        return [self._words.decode(one, skip_special_tokens=True) for one in said]

    def tokens(self, images: Float[Tensor, "B 3 H W"]) -> Int32[Tensor, "B T"]:
        """The tokens of the captions, for the text encoder."""
        rows = [padded(self._clip_words.encode(one).ids, self._known["pad"]) for one in self.captions(images)]
        return torch.tensor(rows, dtype=torch.int32, device=images.device)

    @torch.no_grad()
    def contexts(self, tokens: Int32[Tensor, "B T"]) -> Float[Tensor, "B T K"]:
        return self.text_encoder.eval()(tokens.long())[0]

    def _prepared(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 P P"]:
        side = self._known["blip"]["vision_config"]["image_size"]
        fitted = functional.interpolate(images, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (fitted.new_tensor(self._known[key]).view(3, 1, 1) for key in ("mean", "std"))
        return (fitted - mean) / std

    def _greedy(self, pixels: Float[Tensor, "B 3 P P"]) -> Int64[Tensor, "B N"]:
        # The library's own `generate` asks for the device of a first parameter, and there is none.
        blip, config = self.blip.eval(), self.blip.config.text_config
        seen = blip.vision_model(pixels).last_hidden_state
        said = torch.full((len(pixels), 1), config.bos_token_id, device=pixels.device)
        over = torch.zeros(len(pixels), dtype=torch.bool, device=pixels.device)
        for _ in range(_MOST_WORDS):
            logits = blip.text_decoder(input_ids=said, encoder_hidden_states=seen, use_cache=False).logits[:, -1]
            word = torch.where(over, config.pad_token_id, logits.argmax(-1))
            over |= word == config.sep_token_id
            said = torch.cat([said, word[:, None]], dim=1)
            if over.all():
                break
        return said


def captioner_architecture(name: str, pipeline: str, revision: str | None) -> dict[str, Any]:
    """What builds a Captioner of the BLIP `name` and a diffusers pipeline, as plain data, its tokenizers included.
    ValueError when they are not to be had there, or are none.
    """
    advice = "give a BLIP that captions, a folder or an id of the Hub, such as Salesforce/blip-image-captioning-base"
    kind = config_of("encoder.captioner", name, "captioner", lambda: BlipConfig.get_config_dict(name)[0], advice)
    if kind.get("model_type") != "blip":
        told = kind.get("model_type", "nothing of its own")
        raise ValueError(f"encoder.captioner={name}: no BLIP there ({told}); {advice}")
    read_processor = BlipImageProcessor.get_image_processor_dict
    image = config_of("encoder.captioner", name, "processor", lambda: read_processor(name)[0], advice)
    words = loaded("encoder.captioner", name, AutoTokenizer)
    clip_words = loaded("encoder.name", pipeline, CLIPTokenizer, subfolder="tokenizer", revision=revision)
    text = loaded("encoder.name", pipeline, CLIPTextConfig, subfolder="text_encoder", revision=revision)
    return {
        "blip": plain_config(BlipConfig.from_pretrained(name).to_dict()),
        "mean": image["image_mean"],
        "std": image["image_std"],
        "words": words.backend_tokenizer.to_str(),
        "text_encoder": plain_config(text.to_dict()),
        "clip_words": clip_words.backend_tokenizer.to_str(),
        "pad": clip_words.pad_token_id,
    }


def padded(tokens: Sequence[int], pad: int) -> list[int]:
    """As many as the text encoder reads, the last of them the end."""
    kept = [*tokens[: CONTEXT_TOKENS - 1], tokens[-1]] if len(tokens) > CONTEXT_TOKENS else list(tokens)
    return kept + [pad] * (CONTEXT_TOKENS - len(kept))
