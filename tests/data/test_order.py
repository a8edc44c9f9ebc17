"""Order: every batch is a pure function of its number, and an epoch holds no prompt and no image twice."""

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from img2prompt.data.order import Draws, batch_rows, epoch_rows, step_seed, steps_per_epoch


def single(count):
    return Draws(np.arange(count), np.arange(count), np.ones(count))


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
    draws = Draws(prompts, images, np.ones(len(pairs)))
    for epoch in range(4):
        taken = epoch_rows(draws, seed, "finetune", epoch)
        assert len(taken) == draws.count
        assert len(set(prompts[taken].tolist())) == len(set(images[taken].tolist())) == len(taken)


def test_every_image_of_a_prompt_has_its_epochs():
    draws = Draws(np.repeat(np.arange(20), 3), np.arange(60), np.ones(60))
    assert draws.count == 20
    times = Counter(row for epoch in range(300) for row in epoch_rows(draws, 0, "finetune", epoch).tolist())
    assert set(times) == set(range(60)) and 60 < min(times.values()) and max(times.values()) < 140
    assert epoch_rows(draws, 0, "a", 0).tolist() != epoch_rows(draws, 1, "a", 0).tolist()


def test_every_caption_of_an_image_has_its_epochs():
    draws = Draws(np.arange(60), np.repeat(np.arange(20), 3), np.ones(60))
    times = Counter(row for epoch in range(300) for row in epoch_rows(draws, 0, "finetune", epoch).tolist())
    assert draws.count == 20 and set(times) == set(range(60)) and 60 < min(times.values())


def test_a_quarter_of_the_weight_is_a_quarter_of_the_epochs():
    draws = Draws(np.arange(400), np.arange(400), np.repeat([1.0, 0.25], 200))
    assert draws.count == 250
    times = np.zeros(400)
    for epoch in range(8):
        times[epoch_rows(draws, 0, "finetune", epoch)] += 1
    assert (times[:200] == 8).all()
    assert times[200:].mean() == 2 and (np.abs(times[200:] - 2) <= 1).all()
