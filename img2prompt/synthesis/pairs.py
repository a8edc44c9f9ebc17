"""What is to be made: which prompt, which of its replicas, from which seed, in which shard, by which worker."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# The first that is there says which worker this process is, and of how many: torchrun, then SLURM.
_ENVIRONMENTS = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"))


@dataclass(frozen=True, slots=True)
class Pair:
    """One image to be made."""

    prompt: str
    replica: int  # from 0
    seed: int


@dataclass(frozen=True)
class Wanted:
    """All the pairs of a synthesis: `replicas` images of each prompt, side by side, so that more prompts at the end
    change nothing before them. `count` cuts the end off.
    """

    prompts: Sequence[str]
    replicas: int = 1
    base_seed: int = 0
    count: int | None = None

    def __len__(self) -> int:
        most = len(self.prompts) * self.replicas
        return most if self.count is None else min(self.count, most)

    def pairs(self, first: int, last: int) -> list[Pair]:
        """Those of the numbers first to last - 1, as far as there are any."""
        found = []
        for number in range(first, min(last, len(self))):
            prompt, replica = self.prompts[number // self.replicas], number % self.replicas
            found.append(Pair(prompt, replica, seed_of(prompt, replica, self.base_seed)))
        return found


@dataclass(frozen=True)
class Worker:
    """One of several processes, on whatever machines, that share the shards without a word."""

    number: int = 0
    count: int = 1

    def shards(self, count: int) -> range:
        """Its part of `count` shards."""
        return range(self.number, count, self.count)


def seed_of(prompt: str, replica: int, base_seed: int) -> int:
    """The seed of an image, from 0 to 2^63 - 1, by hash: no other prompt, replica or base seed shares it. Noise is
    drawn by its lower half alone, so that of a million pictures some hundred begin from the noise of another prompt's.
    """
    text = f"{base_seed}\0{replica}\0{prompt}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def worker_of(shard: str | None, environment: Mapping[str, str]) -> Worker:
    """The worker that `shard` (i/n, from 0) names, else the environment; ValueError when it is none of n."""
    if shard is not None:
        found = re.fullmatch(r"(\d+)/(\d+)", shard)
        if not found or not int(found[1]) < int(found[2]):
            raise ValueError(f"shard={shard}: must be i/n, worker i of n, from 0/n to n-1/n")
        return Worker(int(found[1]), int(found[2]))
    for number, count in _ENVIRONMENTS:
        if number in environment and count in environment:
            own, all_ = environment[number], environment[count]
            if not (own.isdecimal() and all_.isdecimal() and int(own) < int(all_)):
                raise ValueError(
                    f"{number}={own} and {count}={all_}: no worker i of n, from 0 to n-1; unset them, or give shard=0/1"
                )
            return Worker(int(own), int(all_))
    return Worker()
