"""Which rows are batch k: a pure function of (rows, seed, stage, step), so that a resumed run sees what it would have.

In an epoch no prompt and no image comes twice: of several images of a prompt, and of several captions of an image, one
is drawn anew in each epoch.
"""

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import maximum_bipartite_matching


@dataclass(frozen=True, eq=False)
class Draws:
    """What the N training rows are of, by position: the numbers of their prompts and images, `rates`, in what share of
    the epochs a row's source wants its prompts drawn (the weights of a mixture, divided by the largest), and hashes.

    With a curriculum of several `stages`, `ease` says how easy a row is: epoch k, from 0, has the easiest
    1 / (stages - k) of the prompts, until it has all (Croitoru et al., Reverse Stable Diffusion, 2023).
    """

    prompts: np.ndarray  # int64 [N]
    images: np.ndarray  # int64 [N]
    rates: np.ndarray  # float64 [N], above 0, at most 1
    hashes: np.ndarray  # uint64 [N], of the rows' ids
    stages: int = 1
    ease: np.ndarray | None = None  # float [N], the larger the easier

    @cached_property
    def rate_of(self) -> np.ndarray:
        """The rate of each prompt: of its sources, the one that wants it most decides."""
        rates = np.zeros(int(self.prompts.max()) + 1)
        np.maximum.at(rates, self.prompts, self.rates)
        return rates

    @cached_property
    def count(self) -> int:
        """Rows in an epoch, the same in every epoch."""
        # Rounded up, or some prompt of a small rate would never have its turn.
        return math.ceil(float(self.rate_of[self.prompts[self.matched(0)]].sum()) - 1e-6)

    @cached_property
    def rank_of(self) -> np.ndarray:
        """The place of each row from the easiest on. Images of a prompt share one, by their mean, and where no prompt
        has two images the captions of an image do; of equals those with the earlier row come first.
        """
        assert self.ease is not None
        # An image is as easy as its captions are on the average, in whichever of their groups it stands.
        of_image = (np.bincount(self.images, self.ease) / np.maximum(np.bincount(self.images), 1))[self.images]
        joined = self.images if len(np.unique(self.prompts)) == len(self.prompts) else self.prompts
        sums, counts = np.bincount(joined, of_image), np.bincount(joined)
        first = np.full(len(sums), len(joined))
        np.minimum.at(first, joined, np.arange(len(joined)))
        order = np.lexsort((first, -sums / np.maximum(counts, 1)))
        ranks = np.empty(len(order), dtype=np.int64)
        ranks[order] = np.arange(len(order))
        return ranks[joined]

    def matched(self, chance: int) -> np.ndarray:
        """As many positions as can be without a prompt or an image twice; always as many. Which row stands for a prompt
        depends on `chance` and on the rows that share its prompt or an image, not on others.
        """
        ranks = np.argsort(_mixed(self.hashes, chance), kind="stable")
        prompts, images = self.prompts[ranks], self.images[ranks]
        first_prompts, first_images = (np.unique(one, return_index=True)[1] for one in (prompts, images))
        # Several images of a prompt or several captions of an image: the first by rank.
        if len(first_images) == len(ranks):
            return np.sort(ranks[first_prompts])
        if len(first_prompts) == len(ranks):
            return np.sort(ranks[first_images])
        # Both: numbers by rank, because the matching prefers small ones.
        prompts, images = (_by_first_place(one) for one in (prompts, images))
        width = int(max(prompts.max(), images.max())) + 1
        pairs = csr_matrix((np.ones(len(ranks), dtype=bool), (prompts, images)), shape=(width, width))
        image_of = maximum_bipartite_matching(pairs, perm_type="column")
        first = {
            pair: place for place, pair in zip(ranks[::-1], zip(prompts[::-1], images[::-1], strict=True), strict=True)
        }
        return np.sort(np.array([first[p, image_of[p]] for p in np.flatnonzero(image_of >= 0)], dtype=np.int64))


def steps_per_epoch(count: int, batch_size: int) -> int:
    """Batches in an epoch over `count` rows. The remainder of a full batch is left out: other rows in each epoch."""
    return max(1, count // batch_size)


def rows_in_epoch(count: int, epoch: int, stages: int) -> int:
    """How many of `count` rows an epoch of a curriculum has, counted from 0; without one, of 1 stage, all."""
    return -(-count // max(1, stages - epoch))


def steps_of(count: int, batch_size: int, epochs: int, stages: int = 1) -> int:
    """Batches of so many epochs together."""
    growing = min(epochs, stages - 1)
    first = sum(steps_per_epoch(rows_in_epoch(count, epoch, stages), batch_size) for epoch in range(growing))
    return first + (epochs - growing) * steps_per_epoch(count, batch_size)


def place_of(count: int, batch_size: int, stages: int, step: int) -> tuple[int, int]:
    """The epoch of batch `step`, and which of its batches it is, both from 0."""
    for epoch in range(stages - 1):
        steps = steps_per_epoch(rows_in_epoch(count, epoch, stages), batch_size)
        if step < steps:
            return epoch, step
        step -= steps
    more, batch = divmod(step, steps_per_epoch(count, batch_size))
    return stages - 1 + more, batch


def batch_rows(draws: Draws, batch_size: int, seed: int, stage: str, step: int) -> np.ndarray:
    """Positions of the rows of batch `step`, counted from the start of the stage; int64."""
    epoch, batch = place_of(draws.count, batch_size, draws.stages, step)
    return epoch_rows(draws, seed, stage, epoch)[batch * batch_size : (batch + 1) * batch_size]


@lru_cache(maxsize=2)
def epoch_rows(draws: Draws, seed: int, stage: str, epoch: int) -> np.ndarray:
    """Positions of the rows of an epoch, in their order; int64 [draws.count], or fewer while a curriculum grows."""
    chance = step_seed(seed, f"{stage}/order", epoch)
    rows = draws.matched(chance)
    rates = draws.rate_of[draws.prompts[rows]]
    if (rates < 1).any():
        # A prompt of rate r is due when its phase has gone on by r past one: in a share r of the epochs, evenly.
        phases = _phases(draws, np.random.default_rng(step_seed(seed, f"{stage}/rates", 0)))[draws.prompts[rows]]
        due = np.where(rates < 1, np.mod(phases + epoch * rates, 1) / rates, 0)
        rows = rows[np.argsort(due, kind="stable")]
    rows = rows[: draws.count]
    if rows_in_epoch(draws.count, epoch, draws.stages) < draws.count:
        easiest = np.argsort(draws.rank_of[rows], kind="stable")
        rows = np.sort(rows[easiest[: rows_in_epoch(draws.count, epoch, draws.stages)]])
    return np.random.default_rng(chance).permutation(rows)


def step_seed(seed: int, stage: str, step: int) -> int:
    """A seed for everything random in one step (dropout, augmentation), in 0..2^63-1."""
    digest = hashlib.blake2b(f"{seed}\0{stage}\0{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _phases(draws: Draws, chance: np.random.Generator) -> np.ndarray:
    """A number in 0..1 for each prompt, evenly spaced among the prompts of a rate."""
    phases = np.zeros(len(draws.rate_of))
    for rate in np.unique(draws.rate_of):
        members = chance.permutation(np.flatnonzero(draws.rate_of == rate))
        phases[members] = (np.arange(len(members)) + 0.5) / len(members)
    return phases


def _mixed(hashes: np.ndarray, chance: int) -> np.ndarray:
    """The hashes mixed with `chance`, uint64 [N]: the finaliser of SplitMix64."""
    mixed = hashes ^ np.uint64(chance)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))


def _by_first_place(numbers: np.ndarray) -> np.ndarray:
    """Other numbers for the same partition: 0 for that of the first element, then in the order of appearance."""
    _, first, dense = np.unique(numbers, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[dense]
