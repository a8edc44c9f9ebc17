"""A trained regressor as a predictor, with the bank of its training prompts where the run has one."""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from img2prompt.bank import Bank, read_bank
from img2prompt.data.fitting import fit
from img2prompt.encoders.attention import sequence_first
from img2prompt.predictions import Prediction
from img2prompt.predictors.opened import open_exported
from img2prompt.predictors.predictor import Predictor, Setting, nearest_columns
from img2prompt.provenance import checkpoint_of, is_foreign, located
from img2prompt.regressor import Regressor, load_regressor

PRECISIONS = ("fp32", "bf16")


class Trained(Predictor):
    """Embeddings of a regressor; with a bank, also the `top_k` nearest training prompts and their cosines; and of a
    vocabulary, where the head has one, the `top_words` likeliest words and their probabilities. `norm` is the length
    that an embedding had.
    """

    def __init__(
        self,
        regressor: Regressor,
        bank: Bank | None = None,
        device: str = "cpu",
        precision: str = "fp32",
        top_k: int = 5,
        top_words: int = 10,
    ) -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
        self.device = torch.device(device)
        self.regressor = regressor.to(self.device).to(memory_format=torch.channels_last).eval()
        self.bank = bank
        self.precision = precision
        if precision == "bf16" and self.device.type == "cpu":
            sequence_first(self.regressor.encoder)
        self.top_k = top_k
        self.vocabulary = regressor.head.vocabulary
        self.top_words = min(top_words, len(self.vocabulary))
        self.target, self.dimension = regressor.target, regressor.target.dimension
        self.mean, self.mean_of = regressor.target_mean.cpu(), "the training targets"

    def prepare(self, image: UInt8[Tensor, "3 H W"]) -> UInt8[Tensor, "3 S S"]:
        want = self.regressor.encoder.preprocessing
        return fit(image, want.image_size_px, want.interpolation, want.resize_mode)

    @torch.inference_mode()
    def predict_batch(self, ids: list[str], prepared: list[Tensor]) -> Prediction:
        logits: Tensor | None = None
        norms = torch.zeros(0)
        if not prepared:
            embeddings = torch.zeros(0, self.dimension)
        else:
            images = torch.stack(prepared).to(self.device, non_blocking=True)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                outputs = self.regressor({"images": images})
            embeddings, logits = outputs.embedding.float(), outputs.words
            assert outputs.norm is not None
            norms = outputs.norm.float()
            if not embeddings.isfinite().all():
                raise ValueError(
                    f"the model predicts values that are not finite (first image: {ids[0]}); its weights "
                    "are damaged, or need precision=fp32"
                )
        columns = {"norm": norms.tolist(), **nearest_columns(self.bank, embeddings, self.top_k)}
        if self.top_words > 0:
            # Of equal ones the earlier, which is the more frequent.
            said = torch.zeros(0, len(self.vocabulary)) if logits is None else logits
            found = said.sigmoid().cpu().sort(dim=1, descending=True, stable=True)
            chosen = found.indices[:, : self.top_words].tolist()
            columns["words"] = [[self.vocabulary[number] for number in row] for row in chosen]
            columns["word_probabilities"] = found.values[:, : self.top_words].tolist()
        return Prediction(ids, embeddings.cpu().numpy().astype(np.float32), columns)


def load(
    path: str | Path, device: str = "auto", precision: str = "fp32", top_k: int = 5, top_words: int = 10
) -> Predictor:
    """The predictor of a run folder (its best rung), of one checkpoint, or of an exported folder, on `device` (auto,
    cpu, cuda, mps); of hf-hub:user/name the folder is fetched.

    Else nothing is downloaded, and nothing in the file is executed. ValueError says what was expected.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    found = Path(located(str(path)))
    where = pick_device(device)
    if is_foreign(found):
        return open_exported(found, where, precision)
    return load_trained(found, where, precision, top_k, top_words)


def load_trained(path: Path, where: str, precision: str, top_k: int, top_words: int) -> Trained:
    """The same of a run folder or a checkpoint."""
    checkpoint = checkpoint_of(path)
    regressor = load_regressor(checkpoint)
    file = bank_of(checkpoint)
    bank = read_bank(file, where) if file.is_file() else None
    if bank is not None and bank.embeddings.shape[1] != regressor.target.dimension:
        raise ValueError(
            f"{file}: embeddings of {bank.embeddings.shape[1]} numbers, {checkpoint} predicts "
            f"{regressor.target.dimension}; it belongs to another run"
        )
    found = Trained(regressor, bank, where, precision, top_k, top_words)
    found.files = (checkpoint, file)
    return found


def predictor(setting: Setting, name: str, ckpt: str | None) -> Predictor:
    """The same of these settings."""
    if not ckpt:
        raise ValueError("ckpt must be given: a run folder, a .safetensors checkpoint, or what export wrote")
    return load(ckpt, setting.device, setting.precision, setting.top_k, setting.top_words)


def bank_of(checkpoint: Path) -> Path:
    """Where the bank of a run's checkpoint is, if it has one; a checkpoint that was moved elsewhere has none."""
    folder = checkpoint.absolute().parent
    return folder.parent / "bank.parquet" if folder.name == "checkpoints" else folder / "no bank"


def confidence_of(checkpoint: Path) -> Path:
    """Where a run keeps what it learnt of the confidence of its best checkpoint."""
    return bank_of(checkpoint).with_name("confidence.json")


def pick_device(device: str) -> str:
    """`auto` becomes the best device there is; others are checked. ValueError names what there is."""
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available = [f"cuda:{i}" for i in range(torch.cuda.device_count())] + ["cuda"] + available
    if device == "auto":
        return "cuda" if "cuda" in available else available[0]
    if device not in available:
        raise ValueError(f"device={device}: not available here; use auto, {', '.join(available)}")
    return device
