"""Which licences the weights inside an export have, as far as their publishers' names tell."""

from collections.abc import Mapping
from typing import Any

from timm.models import get_pretrained_cfg

_MINILM = "sentence-transformers/all-MiniLM-L6-v2"
# Tags of open_clip's weights, by how they begin.
_OPEN_CLIP = {
    "openai": "mit",
    "laion": "mit",
    "mscoco_finetuned_laion": "mit",
    "datacomp": "mit",
    "commonpool": "mit",
    "merged2b": "mit",
    "webli": "apache-2.0",
    "metaclip": "cc-by-nc-4.0",
    "dfn": "apple-amlr",
}
UNKNOWN = "unknown"


def encoder_licence(encoder: Mapping[str, Any], pretrained: Any) -> str | None:
    """The licence of the pretrained weights that an encoder began with, as the Hub spells it; UNKNOWN where its
    publisher must be asked, None where it began with none. `pretrained` is what the run's configuration said.
    """
    if pretrained is False:
        return None
    if isinstance(pretrained, str):
        return UNKNOWN
    library, name, tag = str(encoder.get("_target_")).rpartition(".")[2], str(encoder.get("name")), encoder.get("tag")
    if library == "OpenCLIP":
        begins = [key for key in _OPEN_CLIP if str(tag).startswith(key)]
        return _OPEN_CLIP[begins[0]] if begins else UNKNOWN
    if library == "Timm":
        full = name if "." in name or not tag else f"{name}.{tag}"
        return getattr(get_pretrained_cfg(full), "license", None) or UNKNOWN
    return UNKNOWN


def text_licence(model: str) -> str:
    return "apache-2.0" if model == _MINILM else UNKNOWN
