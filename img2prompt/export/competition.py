"""What the notebook of `format=kaggle` runs: a folder of images becomes submission.csv, and no connection is opened.

It stands in the exported folder with what it imports (`own_code`), so it has to get along with Pillow alone for the
images, and with whatever torch there is.
"""

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional

from img2prompt.data.decoding import EXTENSIONS, ImageError, decode_with_pillow
from img2prompt.data.fitting import fit
from img2prompt.encoders.encoder import Features
from img2prompt.prediction import Prediction
from img2prompt.regressor import Regressor, load_regressor
from img2prompt.submission import write_submission

BATCH = 64
_TOLD = 20  # of the images that could not be read, so many by name


def submit(weights: Path, images: Path, sample: Path, out: Path) -> list[tuple[str, str]]:
    """Writes the submission for the images of a folder, whole and validated or not at all; what could not be read gets
    the mean of the training targets, and is returned with its reason.

    The order is that of `sample`, where there is such a file, and of the file names for what it does not name.
    """
    begun = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    regressor = load_regressor(weights).to(device).to(memory_format=torch.channels_last)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
    print(f"{weights.name}: {precision_of(device)} on {where}".replace("torch.", ""))
    paths = found_images(images, sample)
    unread: list[tuple[str, str]] = []
    write_submission(out, _predicted(regressor, device, paths, unread), list(paths))
    for image_id, reason in unread[:_TOLD]:
        print(f"{image_id}: {reason}; the mean of the training targets stands for it")
    if len(unread) > _TOLD:
        print(f"… and {len(unread) - _TOLD} more: {len(unread)} of {len(paths)} have no prediction of their own")
    print(f"{out}: {len(paths)} images, written and validated, in {time.monotonic() - begun:.0f} s")
    return unread


def precision_of(device: torch.device) -> torch.dtype:
    """What an encoder computes in: a T4 has no bfloat16, and a CPU nothing faster than float32 that is as exact."""
    return torch.float16 if device.type == "cuda" else torch.float32


@torch.inference_mode()
def embed(regressor: Regressor, images: UInt8[Tensor, "B 3 S S"], dtype: torch.dtype) -> Float[Tensor, "B D"]:
    """Unit embeddings. The encoder computes in `dtype` where that is safe, the head and its norm always in float32.

    An encoder whose activations leave the range of float16 is asked again in float32; ValueError where even that is
    not finite.
    """
    with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        said = regressor.features({"images": images})
    tokens = None if said.tokens is None else said.tokens.float()
    embeddings = regressor.head(Features(said.pooled.float(), tokens)).embedding
    if embeddings.isfinite().all():
        return embeddings
    if dtype != torch.float32:
        return embed(regressor, images, torch.float32)
    raise ValueError("the model predicts values that are not finite; its weights are damaged, export it again")


def found_images(images: Path, sample: Path) -> dict[str, Path | None]:
    """The image of each id, in the order of a submission; None where `sample` names one that is not there."""
    files = sorted(path for path in images.glob("*") if path.suffix.lower() in EXTENSIONS)
    by_id = {path.stem: path for path in files}
    if len(by_id) < len(files):
        twice = next(path for path in files if by_id[path.stem] != path)
        raise ValueError(f"{images}: {twice.name} and {by_id[twice.stem].name} have one id; keep one of them")
    order = dict.fromkeys(_ids_of(sample) if sample.is_file() else ())
    if not by_id:
        raise ValueError(f"{images}: no images there; attach the competition's data, or set IMAGES to their folder")
    return {image_id: by_id.get(image_id) for image_id in [*order, *by_id]}


def _ids_of(sample: Path) -> Iterator[str]:
    with sample.open(encoding="utf-8") as file:
        next(file, None)
        for line in file:
            # 20057f34d_0,0.018848453
            yield line.rpartition(",")[0].rpartition("_")[0]


def _predicted(
    regressor: Regressor, device: torch.device, paths: dict[str, Path | None], unread: list[tuple[str, str]]
) -> Iterator[Prediction]:
    want = regressor.encoder.preprocessing
    mean = functional.normalize(regressor.target_mean.float().cpu(), dim=0)

    def prepare(path: Path | None) -> Tensor | str:
        if path is None:
            return "the sample submission names it, and it is not among the images"
        try:
            image = decode_with_pillow(path.read_bytes())
            return fit(image, want.image_size_px, want.interpolation, want.resize_mode)
        except (ImageError, OSError) as error:
            return str(error)

    ids = list(paths)
    prepared = _in_threads(prepare, list(paths.values()))
    for first in range(0, len(ids), BATCH):
        these = ids[first : first + BATCH]
        images = [next(prepared) for _ in these]
        rows = mean.repeat(len(these), 1)
        good = [i for i, image in enumerate(images) if isinstance(image, Tensor)]
        if good:
            batch = torch.stack([image for image in images if isinstance(image, Tensor)]).to(device)
            rows[good] = embed(regressor, batch, precision_of(device)).cpu()
        unread += [(one, image) for one, image in zip(these, images, strict=True) if isinstance(image, str)]
        if first // (BATCH * 25) < (first + BATCH) // (BATCH * 25):
            print(f"{first + len(these)} of {len(ids)} images")
        yield Prediction(these, rows.numpy())


def _in_threads(prepare: Callable[[Path | None], Tensor | str], paths: Sequence[Path | None]) -> Iterator[Tensor | str]:
    """What `prepare` makes of each, in order; no more than a few batches are ahead."""
    waiting: deque[Future[Tensor | str]] = deque()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for path in paths:
            waiting.append(pool.submit(prepare, path))
            if len(waiting) > 3 * BATCH:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def main(arguments: Sequence[str]) -> None:
    weights, images, sample, out = map(Path, arguments)
    try:
        submit(weights, images, sample, out)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main(sys.argv[1:])
