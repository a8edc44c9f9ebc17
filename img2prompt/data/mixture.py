"""Several sources as one: each keeps its rows, its name before their ids, and its weight in an epoch."""

from collections.abc import Mapping
from dataclasses import replace

from img2prompt.data.sample import Found, Sample, Source


def mixed(sources: Mapping[str, tuple[Source, float]]) -> Found:
    """The rows of all sources (source, weight), by name. The prompts of a source of the largest weight come in every
    epoch, those of a source of half that weight in every other one. ValueError when a source has no usable row.
    """
    if not sources:
        raise ValueError("data=mixture needs data.sources=[{source: folder, root: DIR, weight: 1}, …]")
    together = Found([])
    for name, (source, weight) in sources.items():
        found = source.find()
        if not found.samples:
            first = f" (first: {found.skipped[0][0]}: {found.skipped[0][1]})" if found.skipped else ""
            raise ValueError(f"data.sources: no usable pair in {name}, {len(found.skipped)} skipped{first}")
        together.samples += named(found.samples, name)
        together.skipped += [(f"{name}/{one}", reason) for one, reason in found.skipped]
        together.weights[name] = weight
    return together


def named(samples: list[Sample], name: str) -> list[Sample]:
    """The samples with `name` as their source's name and before their ids, so that no two sources share one."""
    for source in {id(sample.source): sample.source for sample in samples}.values():
        source.name = name
    return [replace(sample, id=f"{name}/{sample.id}") for sample in samples]
