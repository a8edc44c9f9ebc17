"""Order: every batch is a pure function of its number, and an epoch holds no prompt and no image twice."""

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from img2prompt.data.order import Draws, batch_rows, epoch_rows, step_seed, steps_per_epoch


def draws_of(prompts, images, rates=None):
    hashes = np.random.default_rng(0).integers(0, 2**63, len(prompts), dtype=np.uint64)
    return Draws(np.asarray(prompts), np.asarray(images), np.ones(len(prompts)) if rates is None else rates, hashes)


def single(count):
    return draws_of(np.arange(count), np.arange(count))


@given(st.integers(1, 300), st.integers(1, 50), st.integers(0, 3))
@settings(deadline=None)
def test_an_epoch_takes_each_row_at_most_once_and_full_batches_only(count, batch_size, epoch):
    steps = steps_per_epoch(count, batch_size)
    batches = [batch_rows(single(count), batch_size, 0, "finetune", epoch * steps + step) for step in range(steps)]
    taken = np.concatenate(batches)
    assert len(set(taken.tolist())) == len(taken) == steps * min(batch_size, count)


def test_order_and_seeds_differ_by_seed_stage_and_epoch():
    def first(seed=0, stage="finetune", step=0):
        return batch_rows(single(100), 100, seed, stage, step).tolist()

    assert first() == first()
    assert len({tuple(order) for order in (first(), first(seed=1), first(stage="probe"), first(step=1))}) == 4
    assert len({step_seed(0, "a", 0), step_seed(1, "a", 0), step_seed(0, "b", 0), step_seed(0, "a", 1)}) == 4


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=60), st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_no_epoch_has_a_prompt_or_an_image_twice_and_all_are_of_one_length(pairs, seed):
    prompts, images = (np.array(one) for one in zip(*pairs, strict=True))
    draws = draws_of(prompts, images)
    for epoch in range(4):
        taken = epoch_rows(draws, seed, "finetune", epoch)
        assert len(taken) == draws.count
        assert len(set(prompts[taken].tolist())) == len(set(images[taken].tolist())) == len(taken)


def test_every_image_of_a_prompt_has_its_epochs():
    draws = draws_of(np.repeat(np.arange(20), 3), np.arange(60))
    assert draws.count == 20
    times = Counter(row for epoch in range(300) for row in epoch_rows(draws, 0, "finetune", epoch).tolist())
    assert set(times) == set(range(60)) and 60 < min(times.values()) and max(times.values()) < 140
    assert epoch_rows(draws, 0, "a", 0).tolist() != epoch_rows(draws, 1, "a", 0).tolist()


def test_every_caption_of_an_image_has_its_epochs():
    draws = draws_of(np.arange(60), np.repeat(np.arange(20), 3))
    times = Counter(row for epoch in range(300) for row in epoch_rows(draws, 0, "finetune", epoch).tolist())
    assert draws.count == 20 and set(times) == set(range(60)) and 60 < min(times.values())


def test_a_quarter_of_the_weight_is_a_quarter_of_the_epochs():
    draws = draws_of(np.arange(400), np.arange(400), np.repeat([1.0, 0.25], 200))
    assert draws.count == 250
    times = np.zeros(400)
    for epoch in range(8):
        times[epoch_rows(draws, 0, "finetune", epoch)] += 1
    assert (times[:200] == 8).all()
    assert times[200:].mean() == 2 and (np.abs(times[200:] - 2) <= 1).all()


def test_a_prompt_of_two_sources_comes_as_often_as_the_one_that_wants_it_most():
    # Fifty prompts of each source, and fifty that both have.
    prompts = np.concatenate([np.arange(100), np.arange(50, 150)])
    draws = draws_of(prompts, np.arange(200), np.repeat([1.0, 0.25], 100))
    times = Counter(prompts[row] for epoch in range(8) for row in epoch_rows(draws, 0, "finetune", epoch))
    assert draws.count == 113 and all(times[prompt] == 8 for prompt in range(100))
    assert 1 <= min(times[prompt] for prompt in range(100, 150)) and max(times[p] for p in range(100, 150)) <= 4


def test_the_image_of_a_prompt_does_not_depend_on_other_prompts():
    prompts = np.repeat(np.arange(30), 4)
    draws = draws_of(prompts, np.arange(120))
    part = Draws(prompts[:40], np.arange(40), np.ones(40), draws.hashes[:40])
    for epoch in range(20):
        whole = {row for row in epoch_rows(draws, 0, "finetune", epoch).tolist() if row < 40}
        assert whole == set(epoch_rows(part, 0, "finetune", epoch).tolist())
