"""From settings to sources: the one that data= chose, or the items {source, root, …} of a list or of data.val."""

import math
from collections.abc import Collection, Mapping
from pathlib import PurePath
from typing import Any

import yaml
from hydra.utils import instantiate
from omegaconf import OmegaConf

from img2prompt.commands.conf import conf_folder
from img2prompt.commands.settings import did_you_mean
from img2prompt.data.mixture import mixed
from img2prompt.data.sample import Found, Source

# Drawings have no root, and a mixture has no mixtures.
_NO_ITEMS = ("demo", "mixture")


def find(data: dict[str, Any], made: Source | None = None) -> Found:
    """What the source, or the sources, of the data settings hold, and what was `made` for them; ValueError for an item
    that is none.
    """
    beside = {made.name: (made, float(data["synthesis"]["weight"]))} if made is not None else {}
    if "sources" not in data:
        source = instantiate(data["source"])
        return mixed({source.name: (source, 1.0), **beside}) if beside else source.find()
    if not isinstance(data["sources"], list):
        raise ValueError(f"data.sources={data['sources']}: must be a list, such as [{{source: folder, root: DIR}}]")
    named: dict[str, tuple[Source, float]] = {}
    for item in data["sources"]:
        source, name = item_source(item, data, "data.sources", ("weight",))
        if name in named:
            raise ValueError(f"data.sources: two are called {name}; give one of them another name")
        weight = item.get("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise ValueError(f"data.sources: the weight of {name} must be a number above 0, got {weight}")
        if name in beside:
            raise ValueError(f"data.sources: {name} is the name of what data.synthesis makes; give another one")
        named[name] = (source, weight)
    return mixed({**named, **beside})


def item_source(item: Any, data: Mapping[str, Any], key: str, others: Collection[str] = ()) -> tuple[Source, str]:
    """The source that {source: folder, root: DIR, …} says, and its name; `data` gives what it leaves out, and `others`
    are keys that are not for the source.
    """
    choices = sorted(path.stem for path in (conf_folder() / "data").glob("*.yaml") if path.stem not in _NO_ITEMS)
    if isinstance(item, dict) and item.get("root") and item.get("source") not in choices:
        close = did_you_mean(str(item.get("source")), choices)
        raise ValueError(f"{key}: no source {item.get('source')}{close}; choices: {', '.join(choices)}")
    if not isinstance(item, dict) or not item.get("root"):
        raise ValueError(
            f"{key}: expected {{source: {'|'.join(choices)}, root: DIR}}, got {item}; "
            "on the command line quote it, and paths in it"
        )
    choice = yaml.safe_load((conf_folder() / "data" / f"{item['source']}.yaml").read_text())
    own = {name: value for name, value in item.items() if name not in ("source", "name", *others)}
    for name in own.keys() - choice.keys() - {"root"}:
        raise ValueError(f"{key}: {name} is no key of {item['source']}{did_you_mean(name, list(choice))}")
    settings = {"threads": data["threads"], **choice, **own}
    node: Any = OmegaConf.to_container(OmegaConf.create({"data": settings}), resolve=True)
    name = str(item.get("name") or f"{item['source']}-{PurePath(str(item['root'])).name}")
    return instantiate(node["data"]["source"]), name
