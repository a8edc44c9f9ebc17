"""The demo's pairs: compositional prompts, and what a generator draws of them. No file is read."""

import io
from pathlib import Path

from PIL import Image

from img2prompt.data.sample import Found, Sample
from img2prompt.synthesis.generator import Generator
from img2prompt.synthesis.scenes import combinations, compose_prompts


class Drawings:
    """`count` drawings of distinct prompts, `images_per_prompt` of each; the same seed gives the same pairs."""

    name = "demo"
    images: Path | None = None

    def __init__(
        self, count: int, images_per_prompt: int, seed: int, generator: Generator, root: str | None = None
    ) -> None:
        if root is not None:
            raise ValueError(f"data.root={root}: data=demo reads no folder; add data=folder or data=kaggle")
        if count is None or count < 2:
            raise ValueError(f"data.count must be at least 2 for data=demo, got {count}")
        if images_per_prompt < 1:
            raise ValueError(f"data.images_per_prompt must be at least 1, got {images_per_prompt}")
        self.count = count
        self.images_per_prompt = images_per_prompt
        self.seed = seed
        self.generator = generator

    def find(self) -> Found:
        prompts = compose_prompts(-(-self.count // self.images_per_prompt), self.seed)
        pairs = [(prompt, replica) for prompt in prompts for replica in range(self.images_per_prompt)][: self.count]
        return Found(
            [
                Sample(f"{i:06d}", prompt, self, f"{replica} {prompt}", combinations(prompt))
                for i, (prompt, replica) in enumerate(pairs)
            ]
        )

    def stamp(self, location: str) -> str:
        raise ValueError("data.cache=disk: the demo's drawings are no files; use data.cache=ram or none")

    def read(self, location: str) -> bytes:
        """A PNG of the drawing; a location is a replica's number and the prompt."""
        replica, _, prompt = location.partition(" ")
        image = Image.fromarray(self.generator.generate([prompt], [self.seed * 1_000_003 + int(replica)])[0])
        file = io.BytesIO()
        image.save(file, "PNG", compress_level=1)
        return file.getvalue()
