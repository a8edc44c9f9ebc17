"""Parts of models on the Hub or in a folder: their configurations, and their weights, which hold no programs."""

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diffusers.utils import logging as diffusers_logging
from huggingface_hub import constants
from torch import nn
from transformers.utils import logging as transformers_logging


def config_of(key: str, name: str, part: str, read: Callable[[], Any], advice: str) -> dict[str, Any]:
    """What `read` finds of a part, as plain data; ValueError, with the setting's `key` and `advice`, where it is not to
    be had.
    """
    diffusers_logging.disable_progress_bar()
    check_place(key, name)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The `local_dir_use_symlinks`")  # diffusers' own way of asking
            return plain_config(read())
    except (OSError, ValueError, TypeError) as error:
        if constants.HF_HUB_OFFLINE and not Path(name).is_dir():
            raise ValueError(
                f"{key}={name}: not in the Hub's cache, and the Hub cannot be asked, as it is offline"
            ) from None
        told = " ".join(str(error).split())[:160]
        raise ValueError(f"{key}={name}: no configuration of a {part} to be had there ({told}); {advice}") from None


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What builds the model, as plain data; where it came from is not part of it, its class is."""
    kept = {key: value for key, value in config.items() if not key.startswith("_") or key == "_class_name"}
    return json.loads(json.dumps(kept))


def loaded(key: str, name: str, kind: Any, **where: Any) -> Any:
    """A model or tokenizer of this kind; ValueError when it cannot be loaded, or not as a whole."""
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    # What is missing is told below, in a sentence.
    transformers_logging.set_verbosity_error()
    check_place(key, name)
    part = where.get("subfolder") or kind.__name__
    is_model = issubclass(kind, nn.Module)
    # Other kinds of weights can hold programs.
    options = {"use_safetensors": True, **where, **({"output_loading_info": True} if is_model else {})}
    if kind.__name__.startswith("Auto"):
        # Else the library asks at the terminal whether to run a stranger's program.
        options["trust_remote_code"] = False
    try:
        found = kind.from_pretrained(name, **options)
    except (OSError, ValueError, RuntimeError) as error:
        told = " ".join(str(error).split())[:160]
        raise ValueError(f"{key}={name}: its {part} cannot be loaded ({told})") from None
    if not is_model:
        return found
    model, info = found
    missing = sorted(info["missing_keys"])
    if missing:
        # The libraries would draw them at random, and only warn.
        raise ValueError(f"{key}={name}: no {part}: {len(missing)} of its tensors are not there (first: {missing[0]})")
    return model


def check_place(key: str, name: str) -> None:
    """ValueError for what can only be a folder, and is none."""
    if (name.startswith((".", "~", "/")) or name.count("/") > 1) and not Path(name).is_dir():
        raise ValueError(f"{key}={name}: no such folder")


def freeze(module: nn.Module) -> None:
    """Makes buffers of its parameters, so that no stage trains them."""
    for one in module.modules():
        for name, parameter in list(one.named_parameters(recurse=False)):
            delattr(one, name)
            # Its own, also where two layers share it: shared tensors cannot be saved.
            one.register_buffer(name, parameter.data.clone())
