"""Which rows are batch k: a pure function of (rows, seed, stage, step), so that a resumed run sees what it would have.

In an epoch no prompt and no image comes twice: of several images of a prompt, and of several captions of an image, one
is drawn anew in each epoch.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import maximum_bipartite_matching


@dataclass(frozen=True, eq=False)
class Draws:
    """What the N training rows are of, by position: the numbers of their prompts and images, and `rates`, in what share
    of the epochs a row's source wants its prompts drawn (the weights of a mixture, divided by the largest).
    """

    prompts: np.ndarray  # int64 [N]
    images: np.ndarray  # int64 [N]
    rates: np.ndarray  # float64 [N], above 0, at most 1

    @cached_property
    def count(self) -> int:
        """Rows in an epoch, the same in every epoch."""
        rows = self.matched(np.random.default_rng(0))
        return max(1, round(float(self.rates[rows].sum())))

    def matched(self, chance: np.random.Generator) -> np.ndarray:
        """As many positions as can be without a prompt or an image twice, drawn by `chance`; always as many."""
        number = len(self.prompts)
        if len(np.unique(self.prompts)) == number and len(np.unique(self.images)) == number:
            return np.arange(number)
        # Shuffled numbers, because the matching prefers the first.
        shuffled = chance.permutation(number)
        prompts, images = (_relabelled(one[shuffled], chance) for one in (self.prompts, self.images))
        width = int(max(prompts.max(), images.max())) + 1
        pairs = csr_matrix((np.ones(number, dtype=bool), (prompts, images)), shape=(width, width))
        image_of = maximum_bipartite_matching(pairs, perm_type="column")
        first = {pair: place for place, pair in zip(shuffled, zip(prompts, images, strict=True), strict=True)}
        return np.array([first[p, image_of[p]] for p in np.flatnonzero(image_of >= 0)], dtype=np.int64)


def steps_per_epoch(count: int, batch_size: int) -> int:
    """Batches in an epoch over `count` rows. The remainder of a full batch is left out: other rows in each epoch."""
    return max(1, count // batch_size)


def batch_rows(draws: Draws, batch_size: int, seed: int, stage: str, step: int) -> np.ndarray:
    """Positions of the rows of batch `step`, counted from the start of the stage; int64."""
    epoch, batch = divmod(step, steps_per_epoch(draws.count, batch_size))
    return epoch_rows(draws, seed, stage, epoch)[batch * batch_size : (batch + 1) * batch_size]


@lru_cache(maxsize=2)
def epoch_rows(draws: Draws, seed: int, stage: str, epoch: int) -> np.ndarray:
    """Positions of the rows of an epoch, in their order; int64 [draws.count]."""
    chance = np.random.default_rng(step_seed(seed, f"{stage}/order", epoch))
    rows = draws.matched(chance)
    rates = draws.rates[rows]
    if (rates < 1).any():
        # A prompt of rate r is due when its phase has gone on by r past one: in a share r of the epochs, evenly.
        phases = _phases(draws, np.random.default_rng(step_seed(seed, f"{stage}/rates", 0)))[draws.prompts[rows]]
        due = np.where(rates < 1, np.mod(phases + epoch * rates, 1) / rates, 0)
        rows = rows[np.argsort(due, kind="stable")[: draws.count]]
    return chance.permutation(rows)


def step_seed(seed: int, stage: str, step: int) -> int:
    """A seed for everything random in one step (dropout, augmentation), in 0..2^63-1."""
    digest = hashlib.blake2b(f"{seed}\0{stage}\0{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _phases(draws: Draws, chance: np.random.Generator) -> np.ndarray:
    """A number in 0..1 for each prompt, evenly spaced among the prompts of a rate."""
    rate_of = np.zeros(int(draws.prompts.max()) + 1)
    np.maximum.at(rate_of, draws.prompts, draws.rates)
    phases = np.zeros(len(rate_of))
    for rate in np.unique(draws.rates):
        members = chance.permutation(np.flatnonzero(rate_of == rate))
        phases[members] = (np.arange(len(members)) + 0.5) / len(members)
    return phases


def _relabelled(numbers: np.ndarray, chance: np.random.Generator) -> np.ndarray:
    """Other numbers 0..K-1 for the same partition, in random order."""
    _, dense = np.unique(numbers, return_inverse=True)
    return chance.permutation(int(dense.max()) + 1)[dense]
