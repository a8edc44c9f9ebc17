"""Which rows validate: decided from what the rows say, never from where they stand in the table."""

from collections import defaultdict
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from img2prompt.data.duplicates import joined, merged, near
from img2prompt.data.prompts import hash_of, prompt_key, prompt_numbers
from img2prompt.data.sample import Sample, image_digest, image_key

# A group of so few rows may validate in a small data set, if it is at most a quarter of it.
_SMALL_GROUP = 8


@dataclass
class Sides:
    """The split of N rows, and what it took to keep training and validation apart."""

    validates: np.ndarray  # bool [N]
    largest_group: int = 1  # rows
    too_large: int = 0  # rows whose group is too large to validate
    trained_before: int = 0  # rows whose group, or combination, an earlier run trained on
    moved: int = 0  # prompts that validated in the earlier run and train now


@dataclass
class Earlier:
    """What earlier runs split: prompts and combinations that they trained on never validate again."""

    train_prompts: list[str]
    train_embeddings: Float[Tensor, "M D"]
    val_prompts: Collection[str]
    combinations: Collection[tuple[str, ...]] = ()
    train_images: Collection[str] = ()  # digests of their image keys
    threshold: float | None = None  # what is this close to a training prompt that is no longer here trains
    runs: Sequence[str] = ()  # their folders


def split(
    samples: Sequence[Sample],
    embeddings: Float[Tensor, "N D"],
    fraction: float,
    seed: int,
    threshold: float | None = None,
    max_group_fraction: float = 1.0,
    earlier: Earlier | None = None,
) -> Sides:
    """About `fraction` of the rows validate, the same for the same seed.

    Rows are in one group, and so on one side, when they share a prompt or an image, or when the cosine of their
    prompts reaches `threshold`, directly or through others. A group above `max_group_fraction` of the rows trains, and
    so does one that touches what `earlier` trained on. Where samples say what they combine, whole combinations are held
    out instead, and every row that names one of them validates. ValueError when a side would be empty, or when
    validation would not reach half its size.
    """
    check_split(fraction, threshold, max_group_fraction)
    prompts = prompt_numbers([sample.prompt for sample in samples])
    groups = _groups(samples, prompts, embeddings, threshold)
    keys = [prompt_key(sample.prompt) for sample in samples]
    members: dict[Hashable, list[int]] = defaultdict(list)
    part: Hashable
    for row, (sample, name) in enumerate(zip(samples, _names(groups, keys), strict=True)):
        for part in sample.combinations or (name,):
            members[part].append(row)
    free = np.array([not sample.combinations for sample in samples])
    trained = _trained_on(samples, keys, groups, embeddings, free, earlier)
    held = {prompt_key(prompt) for prompt in earlier.val_prompts} if earlier else set()
    wanted = max(1, round(fraction * len(samples)))
    most = max(max_group_fraction * len(samples), min(_SMALL_GROUP, len(samples) // 4))
    sides = Sides(np.zeros(len(samples), dtype=bool), max(len(rows) for rows in members.values()))
    eligible: list[tuple[bool, bytes, list[int]]] = []
    before: set[int] = set()
    for part, rows in members.items():
        whole = not samples[rows[0]].combinations
        if whole and len(rows) > most:
            sides.too_large += len(rows)
        elif trained[rows].any() or (earlier and part in earlier.combinations):
            before.update(rows)
        else:
            # What validated before comes first, then chance decides.
            eligible.append((not any(keys[row] in held for row in rows), hash_of(part, seed), rows))
    # A row of two combinations is in two parts.
    sides.trained_before = len(before)
    count = 0
    for is_new, _, rows in sorted(eligible):
        if is_new and count >= wanted:
            break
        count += int((~sides.validates[rows]).sum())
        sides.validates[rows] = True
    sides.moved = len(
        {key for key, validates in zip(keys, sides.validates, strict=True) if key in held and not validates}
    )
    if count == len(samples) or (count == 0 and not sides.too_large + sides.trained_before):
        raise ValueError(
            f"{len(samples)} images of {len(members)} distinct prompts or combinations cannot be split: training and "
            "validation need one each"
        )
    if count < wanted / 2:
        raise ValueError(
            f"only {count} of {wanted} rows can validate: {sides.too_large} are in groups too large for it (prompts "
            f"are joined at data.group_threshold={threshold}, and the largest group has {sides.largest_group} of "
            f"{len(samples)} rows), {sides.trained_before} were trained on by an earlier run; raise "
            "data.group_threshold (null joins equal prompts only) or data.max_group_fraction, or add data"
            + (", or draw another split (data.keep_split=null)" if sides.trained_before else "")
        )
    return sides


def trained_on(
    samples: Sequence[Sample], embeddings: Float[Tensor, "N D"], threshold: float | None, earlier: Earlier
) -> np.ndarray:
    """Which rows, bool [N], a split would not let validate after `earlier`: it trained on their prompt or image, on one
    that is joined to theirs at `threshold`, or on everything that they combine.
    """
    prompts = prompt_numbers([sample.prompt for sample in samples])
    keys = [prompt_key(sample.prompt) for sample in samples]
    free = np.array([not sample.combinations for sample in samples])
    known = set(earlier.combinations)
    combined = np.array([bool(sample.combinations) and sample.combinations <= known for sample in samples])
    groups = _groups(samples, prompts, embeddings, threshold)
    return combined | _trained_on(samples, keys, groups, embeddings, free, earlier)


def check_split(fraction: float, threshold: float | None, max_group_fraction: float) -> None:
    """ValueError for what is no fraction or no threshold."""
    if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction < 1:
        raise ValueError(f"data.val must be a fraction between 0 and 1, got {fraction}")
    if threshold is not None and not 0 < threshold <= 1:
        raise ValueError(f"data.group_threshold must be above 0 and at most 1, or null, got {threshold}")
    if not 0 < max_group_fraction <= 1:
        raise ValueError(f"data.max_group_fraction must be above 0 and at most 1, got {max_group_fraction}")


def _groups(samples: Sequence[Sample], prompts: np.ndarray, embeddings: Tensor, threshold: float | None) -> np.ndarray:
    """For each row the number of its group."""
    distinct, first = np.unique(prompts, return_index=True)
    groups = np.arange(len(distinct))
    # What is composed of few words is all alike; there combinations are held out.
    free = np.flatnonzero([not samples[row].combinations for row in first])
    groups[free] = free[joined(embeddings[torch.from_numpy(first[free])], threshold)]
    images: dict[str, int] = {}
    pairs = [
        (number, images.setdefault(image_key(sample), number))
        for number, sample in zip(prompts.tolist(), samples, strict=True)
    ]
    return merged(groups, [(np.array([i for i, _ in pairs]), np.array([j for _, j in pairs]))])[prompts]


def _names(groups: np.ndarray, keys: Sequence[str]) -> list[str]:
    """A group is called after one of its prompts, whatever the order of its rows."""
    names: dict[int, str] = {}
    for group, key in zip(groups.tolist(), keys, strict=True):
        names[group] = min(key, names.get(group, key))
    return [names[group] for group in groups.tolist()]


def _trained_on(
    samples: Sequence[Sample],
    keys: Sequence[str],
    groups: np.ndarray,
    embeddings: Tensor,
    free: np.ndarray,
    earlier: Earlier | None,
) -> np.ndarray:
    """The rows, bool [N], of groups that touch what an earlier run trained on."""
    if earlier is None:
        return np.zeros(len(keys), dtype=bool)
    trained = {prompt_key(prompt) for prompt in earlier.train_prompts}
    images = set(earlier.train_images)
    touched = {
        int(group)
        for group, key, sample in zip(groups, keys, samples, strict=True)
        if key in trained or prompt_key(sample.raw_prompt) in trained or image_digest(sample) in images
    }
    present = set(keys)
    # What is still here has been joined already. Searched again, a cosine in the last digit could say otherwise.
    gone = [i for i, prompt in enumerate(earlier.train_prompts) if prompt_key(prompt) not in present]
    if earlier.threshold is not None and gone:
        rows = np.flatnonzero(free)
        close = near(
            embeddings[torch.from_numpy(rows)], earlier.train_embeddings[gone].to(embeddings), earlier.threshold
        )
        touched |= set(groups[rows[close]].tolist())
    return np.isin(groups, list(touched))
