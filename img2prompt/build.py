"""The one door for what is saved in a checkpoint.

Encoders and heads are built here, for training and for loading alike. A checkpoint is somebody else's file: its
config may name a class of ours in one of the modules listed below, with plain data as arguments, and nothing else.
A rule such as "begins with img2prompt." would not do: `img2prompt.files.os.system` begins so too.
"""

import inspect
from collections.abc import Mapping
from importlib import import_module
from typing import Any, TypeVar

ROOMS = (
    "img2prompt.encoders.blind",
    "img2prompt.encoders.huggingface",
    "img2prompt.encoders.openclip",
    "img2prompt.encoders.sd_unet",
    "img2prompt.encoders.timm_model",
    "img2prompt.heads",
)

Interface = TypeVar("Interface")


def build(config: Mapping[str, Any], interface: type[Interface], **found: Any) -> Interface:
    """Builds what `config` describes: `_target_` names a class in one of `ROOMS`, the rest are its arguments.

    `found` holds arguments that are known only now (a head's widths), of which a class takes those it needs. The
    result carries `config`, the plain record from which the same module is built again: what was given, completed by
    what the class found out (`facts`, such as the mean and standard deviation that belong to a pretrained tag).
    ValueError on anything else.
    """
    target = config.get("_target_")
    if not isinstance(target, str):
        raise ValueError(f"a config needs a _target_ that names a class, got {target!r}")
    module_name, _, name = target.rpartition(".")
    if module_name not in ROOMS:
        raise ValueError(f"{target} is not one of our {interface.__name__} classes; modules: {', '.join(ROOMS)}")
    cls: Any = vars(import_module(module_name)).get(name)
    ours = isinstance(cls, type) and issubclass(cls, interface) and cls.__module__ == module_name
    if not ours or inspect.isabstract(cls):
        raise ValueError(f"{target} is not one of our {interface.__name__} classes")
    arguments = {key: _plain(value, f"{target}: {key}") for key, value in config.items() if key != "_target_"}
    takes = inspect.signature(cls)
    found = {key: value for key, value in found.items() if key in takes.parameters}
    try:
        takes.bind(**arguments, **found)
    except TypeError as error:
        raise ValueError(f"{target}: {error}; it takes {', '.join(takes.parameters)}") from None
    built: Any = cls(**arguments, **found)
    built.config = {"_target_": target, **arguments, **getattr(built, "facts", {})}
    return built


def _plain(value: Any, where: str) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item, where) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, where) for item in value]
    raise ValueError(f"{where} must be plain data, got {type(value).__name__}")
