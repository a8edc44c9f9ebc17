"""From pairs to pictures in shards: what is missing is made, batch by batch, and looked at before it is kept."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from img2prompt.synthesis.generator import Generator
from img2prompt.synthesis.pairs import Pair, Wanted
from img2prompt.synthesis.store import PictureStore

# A picture without more contrast than this, of 255, shows nothing.
_LEAST_CONTRAST = 3


@dataclass
class Work:
    """What there is to do for one worker."""

    wanted: Wanted
    missing: list[int] = field(default_factory=list)  # shards
    count: int = 0  # pairs in them
    there: int = 0  # pairs that are done
    again: int = 0  # of the missing ones, those that are there in a shard that grows


def work_of(store: PictureStore, wanted: Wanted, shards: Iterable[int]) -> Work:
    """What is missing of these shards; ValueError when the folder holds other pairs."""
    work = Work(wanted)
    for shard in shards:
        own = wanted.pairs(shard * store.shard_size, (shard + 1) * store.shard_size)
        if store.is_done(shard, own):
            work.there += len(own)
        else:
            work.missing.append(shard)
            work.count += len(own)
            work.again += len(store.rows(shard))
    return work


def produce(
    work: Work, generator: Generator, store: PictureStore, batch_size: int, advance: Callable[[int], object]
) -> list[Pair]:
    """Makes what is missing; the pairs without a picture, which stayed blank in float32 too, are returned.

    Batches begin anew in every shard, so that a picture depends on its shard and on no other work.
    """
    failed: list[Pair] = []
    for shard in work.missing:
        pairs = work.wanted.pairs(shard * store.shard_size, (shard + 1) * store.shard_size)
        with store.writing(shard, pairs) as writer:
            if writer is None:
                advance(len(pairs))
                continue
            for start in range(0, len(pairs), batch_size):
                batch = pairs[start : start + batch_size]
                # A last batch of another size would be compiled, and rounded, by itself.
                spare = batch_size - len(batch) if len(pairs) > batch_size else 0
                pictures = _made(generator, [*batch, *[batch[-1]] * spare])[: len(batch)]
                again = [number for number, picture in enumerate(pictures) if is_blank(picture)]
                if generator.settings.get("dtype") == "fp32":
                    # It would be the same picture again.
                    again = []
                for number in again:
                    # One by one: what fits in half precision may not fit in float32.
                    pictures[number] = _made(generator, [batch[number]], precise=True)[0]
                for number, (pair, picture) in enumerate(zip(batch, pictures, strict=True)):
                    reason = _reason(picture) if is_blank(picture) else ""
                    failed += [pair] if reason else []
                    details = {**generator.details(pair.seed), "batch_size": len(batch) + spare}
                    precise = {"dtype": "fp32", "batch_size": 1, "compiled": False} if number in again else {}
                    writer.add(pair, details | precise, picture, reason)
                advance(len(batch))
    return failed


def _made(generator: Generator, pairs: Sequence[Pair], precise: bool = False) -> np.ndarray:
    return generator.generate([pair.prompt for pair in pairs], [pair.seed for pair in pairs], precise)


def is_blank(picture: np.ndarray) -> bool:
    """Whether a picture, uint8 [H, W, 3], is of one colour, which is how a failed generation looks."""
    # A few pixels tell it of nearly all pictures.
    return all(_contrast(part) < _LEAST_CONTRAST for part in (picture[::16, ::16], picture))


def _contrast(picture: np.ndarray) -> int:
    return max(int(plane.max()) - int(plane.min()) for plane in np.moveaxis(picture, -1, 0))


def _reason(picture: np.ndarray) -> str:
    return "black" if picture.max() < _LEAST_CONTRAST else "of one colour"
