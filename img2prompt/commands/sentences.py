"""One clear sentence for what went wrong, whatever library said it."""

import re

from img2prompt.commands.conf import conf_folder, groups
from img2prompt.commands.settings import all_keys, did_you_mean

# Packages that only an option needs, and the extra that brings each.
_EXTRAS = {
    "wandb": "wandb",
    "tensorboard": "tensorboard",
    "datasets": "hub",
    "py3langid": "language",
    "peft": "lora",
    "hanta": "vocabulary",
    "torch-fidelity": "evaluate",
    "clip-interrogator": "interrogator",
    "gradio": "app",
    "onnx": "onnx",
    "onnxscript": "onnx",
    "onnxruntime": "onnx",
    "psycopg2": "postgresql",
}


_LESS_MEMORY = {
    "train": "lower data.batch_size (and raise trainer.accumulate_grad_batches by as much), set "
    "trainer.activation_checkpointing=true, or train the last blocks alone with stages.finetune.unfrozen_blocks",
    "sweep": "lower data.batch_size",
    "predict": "lower batch_size",
    "synthesize": "lower batch_size",
    "evaluate": "lower batch_size, or set device=cpu",
    "app": "lower batch_size, or set device=cpu",
    "vary": "lower batch_size, set dtype=fp16 or size_px",
    "merge": "lower batch_size, or set device=cpu",
    "fit": "lower refiner.centroids (of refiner=dakl), predictor.batch_size or size_px (of predictor=sdipc_ft), or set "
    "device=cpu",
}


def sentence_of(command: str, error: Exception) -> str | None:
    """What to tell a user about `error`; None when it is a fault of ours, which deserves its traceback."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    # A class that raised while it was built is wrapped; what it said is what the user needs.
    inner: BaseException | None = error
    while isinstance(inner, HydraException):
        inner = inner.__cause__
    if isinstance(inner, ValueError | OSError | ImportError) and not isinstance(inner, OmegaConfBaseException):
        error = inner
    if isinstance(error, ImportError):
        missing = next((name for name in _EXTRAS if name in str(error).lower()), None)
        return f"{missing} is not installed; pip install 'img2prompt[{_EXTRAS[missing]}]'" if missing else None
    if isinstance(error, HydraException | OmegaConfBaseException):
        return _configuration_sentence(command, str(error))
    if type(error).__name__ == "OutOfMemoryError":
        return f"the GPU's memory is not enough; {_LESS_MEMORY[command]} ({' '.join(str(error).split())[:160]})"
    if isinstance(error, ValueError | OSError):
        return " ".join(str(error).split("\n"))
    return None


def _configuration_sentence(command: str, text: str) -> str:
    override = re.search(r"Could not override '([^']+)'", text) or re.search(r"Key '([^']+)' is not in struct", text)
    missing = re.search(r"(?:In '[^']*': )?Could not find '([^']+)'", text)
    if override:
        key = override[1]
        full = re.search(r"full_key: (\S+)", text)
        key = full[1] if full and "." in full[1] else key
        if key == "experiment":
            return "experiment is added to the defaults: write +experiment=NAME"
        return f"{key}: no such key{did_you_mean(key, list(all_keys(command)))}"
    if missing:
        group, _, choice = missing[1].rpartition("/")
        choices = groups(conf_folder()).get(group, [])
        return f"{group}={choice}: no such choice{did_you_mean(choice, choices)}; choices: {', '.join(choices)}"
    if "Missing mandatory value" in text:
        key = re.search(r"full_key: (\S+)", text) or re.search(r"Missing mandatory value: (\S+)", text)
        return f"{key[1] if key else 'a key'} must be given"
    return " ".join(text.split())
