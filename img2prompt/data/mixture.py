"""Several sources as one: each keeps its rows, its name before their ids, and its weight in an epoch."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from img2prompt.data.sample import Found, Sample, Source


class Mixture:
    """The rows of all `sources`, by name. The prompts of a source of the largest weight come in every epoch, those of a
    source of half that weight in every other one. ValueError when there are none.
    """

    name = "mixture"
    images: Path | None = None

    def __init__(self, sources: Mapping[str, tuple[Source, float]]) -> None:
        if not sources:
            raise ValueError("data=mixture needs data.sources=[{source: folder, root: DIR, weight: 1}, …]")
        self.sources = sources

    def find(self) -> Found:
        together = Found([])
        for name, (source, weight) in self.sources.items():
            found = source.find()
            together.samples += named(found.samples, name)
            together.skipped += [(f"{name}/{one}", reason) for one, reason in found.skipped]
            together.weights[name] = weight
        return together

    def read(self, location: str) -> bytes:
        raise NotImplementedError("the rows of a mixture are read by their own sources")

    def stamp(self, location: str) -> str:
        raise NotImplementedError("the rows of a mixture are stamped by their own sources")


def named(samples: list[Sample], name: str) -> list[Sample]:
    """The samples with `name` as their source's name and before their ids, so that no two sources share one."""
    for source in {id(sample.source): sample.source for sample in samples}.values():
        source.name = name
    return [replace(sample, id=f"{name}/{sample.id}") for sample in samples]
