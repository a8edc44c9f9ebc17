"""Prompts that say nearly the same: which of them to keep, and which belong together.

# P = distinct prompts, D = width of an embedding, T = thresholds
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from img2prompt.search import close_pairs

# Pairs that are joined at a time.
_PAIRS_AT_ONCE = 2_000_000


def survivors(embeddings: Float[Tensor, "P D"], thresholds: Sequence[float]) -> Bool[np.ndarray, "T P"]:
    """Which prompts are kept at each threshold, if, in their order, one whose cosine with a kept one reaches the
    threshold is dropped. One search serves all thresholds; memory is O(P + block).
    """
    kept = np.ones((len(thresholds), len(embeddings)), dtype=bool)
    for i, j, cosines in close_pairs(embeddings, min(thresholds)):
        if j.max() < i.min():
            # All these j are decided: theirs were earlier pairs.
            for one, threshold in zip(kept, thresholds, strict=True):
                one[i[(cosines >= threshold) & one[j]]] = False
            continue
        order = np.argsort(i, kind="stable")
        starts = np.flatnonzero(np.diff(i[order], prepend=-1))
        for mine in np.split(order, starts[1:]):
            for one, threshold in zip(kept, thresholds, strict=True):
                if one[j[mine[cosines[mine] >= threshold]]].any():
                    one[i[mine[0]]] = False
    return kept


def joined(embeddings: Float[Tensor, "P D"], threshold: float | None) -> Int[np.ndarray, " P"]:
    """The number of each prompt's group: prompts whose cosine reaches the threshold are in one, and so are all that
    are connected through others. None joins nothing.
    """
    groups = np.arange(len(embeddings))
    if threshold is None:
        return groups
    waiting: list[tuple[np.ndarray, np.ndarray]] = []
    count = 0
    for i, j, _ in close_pairs(embeddings, threshold):
        waiting.append((i, j))
        count += len(i)
        if count >= _PAIRS_AT_ONCE:
            groups, waiting, count = merged(groups, waiting), [], 0
    return merged(groups, waiting)


def merged(groups: Int[np.ndarray, " P"], pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> Int[np.ndarray, " P"]:
    """The groups after those of each pair (i, j) of members have become one."""
    if not pairs:
        return groups
    i = np.concatenate([one for one, _ in pairs])
    j = np.concatenate([other for _, other in pairs])
    graph = coo_matrix((np.ones(len(i), dtype=bool), (groups[i], groups[j])), shape=(len(groups), len(groups)))
    return connected_components(graph, directed=False)[1].astype(np.int64)[groups]


def near(embeddings: Float[Tensor, "P D"], others: Float[Tensor, "M D"], threshold: float) -> Bool[np.ndarray, " P"]:
    """Whether the cosine of each row with any of `others` reaches the threshold."""
    touched = np.zeros(len(embeddings), dtype=bool)
    for i, _, _ in close_pairs(embeddings, threshold, others):
        touched[i] = True
    return touched


def largest_cosine(rows: Float[Tensor, "N D"], others: Float[Tensor, "M D"]) -> tuple[float, int, int]:
    """The largest cosine between a row of the one and a row of the other, and which two these are."""
    best = (-1.0, 0, 0)
    for start in range(0, len(rows), 2048):
        for left in range(0, len(others), 16_384):
            cosines = rows[start : start + 2048] @ others[left : left + 16_384].T
            place = int(cosines.argmax())
            i, j = divmod(place, cosines.shape[1])
            best = max(best, (float(cosines[i, j]), start + i, left + j))
    return best
