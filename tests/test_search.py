"""Search: exact, whatever the data look like."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from img2prompt import search
from img2prompt.search import close_pairs


def families(seed, count, width, spread):
    chance = torch.Generator().manual_seed(seed)
    centres = torch.randn(max(2, count // 5), width, generator=chance)
    rows = centres[torch.randint(0, len(centres), (count,), generator=chance)]
    return normalize(rows + spread * torch.randn(count, width, generator=chance), dim=1)


def found(embeddings, threshold, others=None):
    return {(i, j): c for one in close_pairs(embeddings, threshold, others) for i, j, c in zip(*one, strict=True)}


@given(
    st.integers(0, 10_000),
    st.integers(2, 300),
    st.sampled_from([3, 24, 384]),
    st.floats(0.0, 1.5),
    st.floats(0.3, 0.99),
)
@settings(deadline=None, max_examples=60)
def test_close_pairs_are_those_of_a_full_product(seed, count, width, spread, threshold):
    embeddings = families(seed, count, width, spread)
    cosines = (embeddings.double() @ embeddings.double().T).numpy()
    with pytest.MonkeyPatch.context() as patch:
        # Small blocks, so that every kind of edge occurs.
        patch.setattr(search, "_BLOCK_ROWS", 32)
        patch.setattr(search, "_BLOCK_COLUMNS", 48)
        pairs = found(embeddings, threshold)
    wanted = {(i, j) for i, j in zip(*np.nonzero(np.tril(cosines >= threshold, -1)), strict=True)}
    for i, j in wanted ^ set(pairs):
        assert abs(cosines[i, j] - threshold) < 1e-6
    assert all(abs(cosines[pair] - cosine) < 1e-6 for pair, cosine in pairs.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_pass_changes_no_result(dtype, monkeypatch):
    embeddings = families(0, 2500, 64, 0.4)
    monkeypatch.setattr(search, "_fast_dtype", lambda device: dtype)
    cosines = embeddings @ embeddings.T
    for threshold in (0.5, 0.9):
        assert len(found(embeddings, threshold)) == int((cosines >= threshold).tril(-1).sum())


def test_equal_and_opposite_rows_and_rows_of_nothing():
    embeddings = torch.tensor([[1.0, 0], [1, 0], [-1, 0], [0, 0], [0, 0]])
    assert set(found(embeddings, 0.9)) == {(1, 0)}
    assert set(found(embeddings[:0], 0.9)) == set(found(embeddings[:1], 0.9)) == set()


def test_close_pairs_between_two_sets():
    rows, others = families(1, 200, 48, 0.5), families(1, 90, 48, 0.7)
    cosines = rows @ others.T
    assert set(found(rows, 0.6, others)) == {tuple(pair) for pair in (cosines >= 0.6).nonzero().tolist()}


def test_blocks_come_in_the_order_of_their_rows_and_then_of_their_columns(monkeypatch):
    # What `survivors` relies on: when a pair (i, j) comes, all pairs of j have come or are in the same block.
    monkeypatch.setattr(search, "_BLOCK_ROWS", 16)
    monkeypatch.setattr(search, "_BLOCK_COLUMNS", 40)
    last, count = (-1, -1), 0
    for i, j, _ in close_pairs(families(2, 300, 24, 0.5), 0.4):
        block = (int(i.min()) // 16, int(j.min()) // 40)
        assert (j < i).all() and block > last and block == (int(i.max()) // 16, int(j.max()) // 40)
        last, count = block, count + 1
    assert count > 20
