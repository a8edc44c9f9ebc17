"""I1, I3, I4: JPEG (quality 95, 512 px) to 224 px against Pillow; two threads against one; batches from kept pixels.

Goals: at least 2.5x with a pixel difference of at most 1 of 255, 1.8x, and 20x Pillow's rate. FOLDER holds any images;
without it, drawings with grain are used. One thread where nothing else is said.

    python benchmarks/decoding.py [FOLDER] [rounds]
"""

import io
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from record import record
from rounds import paired, ratio

from img2prompt.data.fitting import fit
from img2prompt.data.images import decode
from img2prompt.data.kaggle import Kaggle
from img2prompt.data.listing import list_images
from img2prompt.data.pixels import Pixels
from img2prompt.synthesis.procedural import Procedural

SIDE = 224


def pictures(folder: str | None) -> list[Image.Image]:
    if folder:
        found = [Image.open(file.path).convert("RGB") for file in list_images(folder).files[:32]]
        return [image.resize((512, 512), Image.Resampling.LANCZOS) for image in found]
    drawn = Procedural(512).generate([f"a red star and {i} blue moons" for i in range(16)], list(range(16)))
    grain = np.random.default_rng(0).normal(0, 12, (512, 512, 1))
    return [Image.fromarray((image + grain).clip(0, 255).astype(np.uint8)) for image in drawn]


def jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95)
    return file.getvalue()


def with_pillow(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def ours(data: bytes) -> np.ndarray:
    return fit(decode(data), SIDE, "bicubic", "squash").permute(1, 2, 0).numpy()


def rate(work, items) -> float:
    began = time.perf_counter()
    for item in items:
        work(item)
    return len(items) / (time.perf_counter() - began)


def main() -> None:
    torch.set_num_threads(1)
    folder = sys.argv[1] if len(sys.argv) > 1 else None
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 7
    files = [jpeg(image) for image in pictures(folder)]
    many = (files * (400 // len(files) + 1))[:400]
    difference = max(int(np.abs(ours(data).astype(int) - with_pillow(data)).max()) for data in files)
    speeds = paired({"ours": lambda: rate(ours, many), "pillow": lambda: rate(with_pillow, many)}, rounds)
    rows = [
        {
            "claim": "I1 decode and resize, against Pillow",
            "ours_images_per_second": f"{statistics.median(speeds['ours']):.0f}",
            "other_images_per_second": f"{statistics.median(speeds['pillow']):.0f}",
            **ratio(speeds["ours"], speeds["pillow"]),
            "pixel_difference": difference,
        }
    ]
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "images").mkdir()
        (root / "prompts.csv").write_text("imgId,prompt\n" + "".join(f"{i},p{i}\n" for i in range(len(many))))
        for i, data in enumerate(many):
            (root / "images" / f"{i}.jpg").write_bytes(data)
        samples = Kaggle(root).find().samples

        def pixels(threads: int, **kept) -> Pixels:
            return Pixels(samples, SIDE, "bicubic", "squash", threads=threads, **kept)

        batches = np.random.default_rng(0).permutation(len(samples)).reshape(-1, 50).tolist()
        one, two = pixels(1, keep_gib=-1.0), pixels(2, keep_gib=-1.0)
        speeds = paired(
            {name: lambda found=found: 50 * rate(found.of, batches) for name, found in (("two", two), ("one", one))},
            rounds,
        )
        rows.append(
            {
                "claim": "I3 two threads, against one",
                "ours_images_per_second": f"{statistics.median(speeds['two']):.0f}",
                "other_images_per_second": f"{statistics.median(speeds['one']):.0f}",
                **ratio(speeds["two"], speeds["one"]),
                "pixel_difference": "",
            }
        )
        for where, kept in (("memory", {"keep_gib": 8.0}), ("disk", {"folder": root / "cache"})):
            found = pixels(2, **kept)
            found.fill(lambda count: None)
            speeds = paired(
                {
                    "kept": lambda found=found: 50 * rate(found.of, batches * 20),
                    "pillow": lambda: rate(with_pillow, many[:100]),
                },
                rounds,
            )
            rows.append(
                {
                    "claim": f"I4 batches of 50 from {where}, against Pillow",
                    "ours_images_per_second": f"{statistics.median(speeds['kept']):.0f}",
                    "other_images_per_second": f"{statistics.median(speeds['pillow']):.0f}",
                    **ratio(speeds["kept"], speeds["pillow"]),
                    "pixel_difference": "",
                }
            )
    record("decoding", rows)


if __name__ == "__main__":
    main()
