"""What a model named on the Hugging Face Hub would cost to download, said before the first byte is fetched."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

# Of the classes of a pipeline's parts.
_WITH_WEIGHTS = ("Model", "AutoencoderKL", "ModelWithProjection")
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
# What lies in the folder of a diffusers pipeline, and names its parts.
PIPELINE = "model_index.json"


@dataclass(frozen=True)
class HubFile:
    """A model on the Hub: one file of it or, without a file name, the folder."""

    repository: str
    filename: str | None = None
    revision: str | None = None


def is_cached(file: HubFile) -> bool:
    """Whether loading `file` needs no network. A folder counts as cached when its config is."""
    found = huggingface_hub.try_to_load_from_cache(
        file.repository, file.filename or "config.json", revision=file.revision
    )
    if not isinstance(found, str) or file.filename != PIPELINE:
        return isinstance(found, str)
    # An interrupted download has the list of the parts, and not all of their weights.
    said = json.loads(Path(found).read_text(encoding="utf-8"))
    models = [name for name, one in said.items() if isinstance(one, list) and str(one[-1]).endswith(_WITH_WEIGHTS)]
    folders = [Path(found).parent / name for name in models if name != "safety_checker"]
    return all(any(folder.glob("*.safetensors")) for folder in folders)


def commit_of(file: HubFile) -> str | None:
    """The commit whose files lie in the Hub's cache; None when none of them does."""
    found = huggingface_hub.try_to_load_from_cache(
        file.repository, file.filename or "config.json", revision=file.revision
    )
    # …/snapshots/<commit>/model_index.json
    return f"commit {Path(found).parent.name}" if isinstance(found, str) else None


def describe(file: HubFile) -> str:
    """One line for people: "laion/CLIP-… (3.94 GB)", or that it is cached. Asks the Hub for the size."""
    name = file.repository + (f" at revision {file.revision}" if file.revision else "")
    if is_cached(file):
        return f"{name} (already in the Hub's cache)"
    try:
        info = huggingface_hub.HfApi().model_info(
            file.repository, revision=file.revision, files_metadata=True, timeout=10
        )
    except (OSError, HfHubHTTPError, OfflineModeIsEnabled) as error:
        return f"{name} (size unknown: the Hub cannot be asked, {type(error).__name__})"
    sizes = {item.rfilename: item.size or 0 for item in info.siblings or []}
    return f"{name} ({_size_of_download(sizes, file.filename) / 1e9:.2f} GB)"


def _size_of_download(sizes: dict[str, int], filename: str | None) -> int:
    if filename in sizes:
        return sizes[filename]
    if filename == PIPELINE:
        # Of each part its weights, and not what lies beside the parts.
        parts = re.compile(r"[^/]+/(?:model|diffusion_pytorch_model)(?:-\d+-of-\d+)?\.safetensors")
        return sum(size for name, size in sizes.items() if parts.fullmatch(name))
    # Repositories hold the same weights in several formats; safetensors is what the libraries fetch first.
    weights = {name: size for name, size in sizes.items() if name.endswith(".safetensors")} or sizes
    shards = [size for name, size in weights.items() if re.search(r"-\d+-of-\d+\.", name)]
    return sum(shards) or max(weights.values(), default=0)
