"""A regressor: an encoder and a head, with all that is needed to use it later. It saves and loads itself.

A checkpoint is one safetensors file. Its header holds plain data (format version, kind, configs of encoder and head,
target, scores), so reading it executes nothing; its tensors are the weights and the mean training target.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from img2prompt.build import build
from img2prompt.encoders.encoder import Encoder, Features, Uninitialised, load_strictly
from img2prompt.files import replacing
from img2prompt.heads import Head, Outputs

FORMAT_VERSION = 1
_HEADER = "img2prompt"
_MOST_DIMENSIONS = 65_536
# The encoder of the mean rung, which sees nothing.
BLIND = "img2prompt.encoders.blind.Blind"
# Given a name alone, these encoders would look their architecture up on the Hub; loading a checkpoint never does.
_NAMED_ELSEWHERE = ("img2prompt.encoders.huggingface.HuggingFace", "img2prompt.encoders.sd_unet.SDUNet")


@dataclass(frozen=True)
class Target:
    """The space that predictions lie in: a sentence encoder's, of `dimension` D."""

    model: str
    revision: str | None
    dimension: int


class Regressor(nn.Module):
    """Maps images to unit embeddings [B, D] in the space of `target`."""

    target_mean: Tensor

    def __init__(self, encoder: Encoder, head: Head, target: Target) -> None:
        super().__init__()
        self.encoder = encoder
        self.head: Head = head
        self.target = target
        # The constant prediction, for a baseline beside every score; filled in by training.
        self.register_buffer("target_mean", torch.zeros(target.dimension))

    def forward(self, inputs: Mapping[str, Tensor]) -> Outputs:
        return self.head(self.features(inputs))

    def features(self, inputs: Mapping[str, Tensor]) -> Features:
        """What the head reads of `inputs`."""
        return self.encoder(inputs, self.head.layers, self.head.reads_tokens)

    def save(
        self, path: Path, scores: Mapping[str, Any] | None = None, made_of: Mapping[str, Any] | None = None
    ) -> None:
        """Writes the checkpoint, whole or not at all; `scores` are plain data for people and reports, and so is
        `made_of`, which says of an average what its ingredients are.
        """
        header = {
            "format_version": FORMAT_VERSION,
            "kind": "regressor",
            "encoder": self.encoder.config,
            "head": self.head.config,
            "target": asdict(self.target),
            "scores": dict(scores or {}),
        }
        if made_of is not None:
            header["made_of"] = dict(made_of)
        tensors = {key: value.detach().cpu().contiguous() for key, value in merged_state(self).items()}
        with replacing(path, sum(tensor.nbytes for tensor in tensors.values())) as temporary:
            save_file(tensors, temporary, metadata={_HEADER: json.dumps(header)})


def merged_state(module: nn.Module) -> dict[str, Tensor]:
    """The state of a module whose layers may have adapters (see `encoders.lora`), as if these had been their weights
    from the beginning.
    """
    state = module.state_dict()
    for name, layer in module.named_modules():
        if hasattr(layer, "get_delta_weight") and hasattr(layer, "base_layer"):
            key = f"{name}.base_layer.weight"
            state[key] = state[key] + layer.get_delta_weight("default").detach()
    plain = {key: value for key, value in state.items() if ".lora_" not in key}
    return {key.replace(".base_layer.", "."): value for key, value in plain.items()}


def build_regressor(encoder: Encoder, head: Mapping[str, Any], target: Target) -> Regressor:
    """Joins an encoder with the head that `head` describes, at the widths of this encoder and target."""
    # Of what a head reads only its own class knows, and its widths depend on that.
    read = outline(head)
    pooled, tokens = encoder.widths(read.layers, read.reads_tokens)
    built = build(head, Head, in_features=pooled, out_features=target.dimension, token_features=tokens)
    return Regressor(encoder, built, target)


def outline(head: Mapping[str, Any]) -> Head:
    """The head that `head` describes, without weights and with no widths yet; ValueError where it describes none."""
    with torch.device("meta"):
        # Tokens of a width that their heads divide, however many these are.
        return build(head, Head, in_features=1, out_features=1, token_features=head.get("heads", 1))


@dataclass
class Header:
    """What a checkpoint says about itself."""

    encoder: dict[str, Any]
    head: dict[str, Any]
    target: Target
    scores: dict[str, Any] = field(default_factory=dict)
    made_of: dict[str, Any] = field(default_factory=dict)  # of an average; empty for what was trained


def read_header(path: Path) -> Header:
    """The header of a checkpoint; ValueError when the file is not one of ours."""
    if not path.is_file():
        raise ValueError(f"{path}: no such checkpoint; expected a run folder or a .safetensors file of a run")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_HEADER)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a safetensors file ({error}); expected checkpoints/*.safetensors") from None
    if text is None:
        raise ValueError(f"{path}: a safetensors file, but not a checkpoint of img2prompt; train one with train.py")
    try:
        header = json.loads(text)
        version, kind = header["format_version"], header["kind"]
        target = Target(
            str(header["target"]["model"]), header["target"]["revision"], int(header["target"]["dimension"])
        )
        parts = (dict(header["encoder"]), dict(header["head"]), target, dict(header["scores"]))
        found = Header(*parts, dict(header.get("made_of", {})))
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path}: its header is damaged ({type(error).__name__}: {error})") from None
    if version != FORMAT_VERSION or kind != "regressor":
        raise ValueError(
            f"{path}: format {version}, kind {kind!r}; this version reads format {FORMAT_VERSION}, kind 'regressor'. "
            "Update img2prompt"
        )
    return found


def load_regressor(path: Path) -> Regressor:
    """Rebuilds the regressor of a checkpoint on the CPU, in evaluation mode.

    Only our own encoder and head classes are built (see `build`), and nothing is downloaded. ValueError on any other
    file.
    """
    header = read_header(path)
    if header.encoder.get("_target_") in _NAMED_ELSEWHERE and not header.encoder.get("architecture"):
        raise ValueError(f"{path}: its header cannot be built: it names a model without its architecture")
    if not 0 < header.target.dimension <= _MOST_DIMENSIONS:
        raise ValueError(f"{path}: its header cannot be built: target dimension {header.target.dimension}")
    try:
        with Uninitialised():
            encoder = build(header.encoder, Encoder)
            regressor = build_regressor(encoder, header.head, header.target)
    except Exception as error:
        # Libraries raise nearly anything when widths and names do not fit together.
        raise ValueError(f"{path}: its header cannot be built: {error or type(error).__name__}") from None
    with safe_open(path, framework="pt") as file:
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    load_strictly(regressor, weights, str(path))
    return regressor.eval()
