"""Opens an exported folder as what it was exported to."""

from pathlib import Path

from img2prompt.predictors.exported import Exported
from img2prompt.provenance import PROVENANCE, Provenance, read_provenance


def open_exported(folder: Path, device: str, precision: str) -> Exported:
    """The predictor of an exported folder whose format is another library's."""
    provenance = read_provenance(folder)
    if provenance.format == "diffusers":
        raise ValueError(f"{folder}: a pipeline of diffusers, which makes images; img2prompt synthesize uses it")
    try:
        return _opened(provenance, folder, device, precision)
    except (OSError, KeyError, TypeError, AssertionError, RuntimeError) as error:
        # Of a folder that lacks files, or whose parts do not belong together.
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise ValueError(f"{folder}: cannot be opened as {provenance.format} ({reason})") from None


def _opened(provenance: Provenance, folder: Path, device: str, precision: str) -> Exported:
    # Each format imports its own library, and no other.
    if provenance.format == "sentence_transformers":
        from img2prompt.predictors.sentence_transformers import SentenceTransformersFolder

        return SentenceTransformersFolder(folder, provenance, device, precision)
    if provenance.format == "timm":
        from img2prompt.predictors.timm import TimmFolder

        return TimmFolder(folder, provenance, device, precision)
    if provenance.format == "onnx":
        from img2prompt.predictors.onnx import OnnxFolder

        return OnnxFolder(folder, provenance, device, precision)
    raise ValueError(f"{folder / PROVENANCE}: format {provenance.format!r} is unknown to this version")
