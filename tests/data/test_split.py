"""The split: nothing that belongs together is on both sides, and nothing moves from training to validation."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from img2prompt.data.kaggle import Kaggle
from img2prompt.data.prompts import prompt_key, prompt_numbers
from img2prompt.data.sample import Sample
from img2prompt.data.split import Earlier, split, trained_on

SOURCE = Kaggle("unused")


def apart(samples):
    """Embeddings of which no two of different prompts are close."""
    return torch.eye(len(samples))[torch.from_numpy(prompt_numbers([sample.prompt for sample in samples]))]


def rows(prompts):
    return [Sample(str(i), prompt, SOURCE, str(i)) for i, prompt in enumerate(prompts)]


@given(st.lists(st.integers(0, 30), min_size=2, max_size=200), st.floats(0.05, 0.9), st.integers(0, 5))
@settings(deadline=None)
def test_prompts_never_cross_the_split(numbers, fraction, seed):
    samples = rows([f"prompt {number}" for number in numbers])
    if len(set(numbers)) == 1:
        with pytest.raises(ValueError, match="cannot be split"):
            split(samples, apart(samples), fraction, seed)
        return
    try:
        held = split(samples, apart(samples), fraction, seed).validates
    except ValueError as error:
        assert "cannot be split" in str(error)
        return
    assert not {s.prompt for s, h in zip(samples, held, strict=True) if h} & {
        s.prompt for s, h in zip(samples, held, strict=True) if not h
    }


def test_captions_of_one_image_never_cross_the_split():
    # Ten images with three captions each; some captions are shared by two images.
    captions = [(image, f"own {image} {i}" if i else f"shared {image // 2}") for image in range(10) for i in range(3)]
    samples = [Sample(f"{image}#{i}", text, SOURCE, str(image)) for i, (image, text) in enumerate(captions)]
    for seed in range(10):
        held = split(samples, apart(samples), 0.3, seed).validates
        sides = {(s.location, bool(h)) for s, h in zip(samples, held, strict=True)}
        assert len({image for image, _ in sides}) == len(sides)
        assert len({(s.prompt, bool(h)) for s, h in zip(samples, held, strict=True)}) == len(
            {s.prompt for s in samples}
        )


def test_the_split_depends_on_prompts_and_seed_and_not_on_the_order_of_rows():
    samples = rows([f"prompt {i}" for i in range(300)])
    held = {s.prompt for s, h in zip(samples, split(samples, apart(samples), 0.2, 0).validates, strict=True) if h}
    turned = samples[::-1]
    assert held == {s.prompt for s, h in zip(turned, split(turned, apart(turned), 0.2, 0).validates, strict=True) if h}
    assert held != {
        s.prompt for s, h in zip(samples, split(samples, apart(samples), 0.2, 1).validates, strict=True) if h
    }
    assert len(held) == 60


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("caf\u00e9", "cafe\u0301"),
        ("café", "cafe"),
        ("cat, dog", "cat , dog"),
        ("a-cat", "a - cat"),
        ("red\u200bcat", "redcat"),
        ("red\0cat", "redcat"),
        ("STRASSE", "straße"),
    ],
)
def test_what_the_text_encoder_cannot_tell_apart_is_one_prompt(one, other):
    assert prompt_key(one) == prompt_key(other)
    assert len({prompt_key(text) for text in ("a cat", "a dog", "acat", "cat a", "a cat!", "7 cats", "猫", "犬")}) == 8


def test_case_and_white_space_do_not_make_another_prompt():
    samples = rows(["A red  Cat", "a red cat", "dog", "bird", "fish"])
    for seed in range(20):
        held = split(samples, apart(samples), 0.3, seed).validates
        assert held[0] == held[1]
    assert (
        prompt_numbers(["A red  Cat", "a red cat", "dog"])[0] == prompt_numbers(["A red  Cat", "a red cat", "dog"])[1]
    )


def test_held_out_combinations_are_never_seen_in_training():
    from img2prompt.synthesis.scenes import combinations, compose_prompts

    prompts = compose_prompts(2000, 0)
    samples = [Sample(str(i), p, SOURCE, str(i), combinations(p)) for i, p in enumerate(prompts)]
    held = split(samples, apart(samples), 0.1, 0).validates
    seen = set().union(*(s.combinations for s, h in zip(samples, held, strict=True) if not h))
    assert 0.08 < held.mean() < 0.2
    assert all(s.combinations - seen for s, h in zip(samples, held, strict=True) if h)


def vectors(seed, count, spread=0.25, families=40):
    """Unit vectors in families: within one their cosines are high, so that thresholds join some of them."""
    chance = np.random.default_rng(seed)
    centres = chance.normal(size=(families, 24))
    found = centres[chance.integers(0, families, count)] + spread * chance.normal(size=(count, 24))
    return normalize(torch.from_numpy(found).float(), dim=1)


@given(st.integers(0, 10_000), st.integers(30, 200), st.floats(0.5, 0.95))
@settings(deadline=None, max_examples=40)
def test_no_pair_across_the_split_reaches_the_threshold(seed, count, threshold):
    samples = rows([f"p{i}" for i in range(count)])
    embeddings = vectors(seed, count)
    try:
        sides = split(samples, embeddings, 0.2, 0, threshold, 0.5)
    except ValueError as error:
        assert "rows can validate" in str(error) or "cannot be split" in str(error)
        return
    held = torch.from_numpy(sides.validates)
    assert float((embeddings[held] @ embeddings[~held].T).max()) < threshold
    turned = split(samples[::-1], embeddings.flip(0), 0.2, 0, threshold, 0.5)
    assert np.array_equal(turned.validates[::-1], sides.validates)


def test_a_group_above_the_largest_fraction_trains_whole():
    embeddings = torch.eye(120)
    embeddings[:30] = embeddings[0]
    samples = rows([f"p{i}" for i in range(120)])
    for seed in range(10):
        sides = split(samples, embeddings, 0.2, seed, 0.7, 0.02)
        assert not sides.validates[:30].any() and sides.validates.sum() == 24
        assert (sides.largest_group, sides.too_large, sides.trained_before) == (30, 30, 0)
    assert any(split(samples, embeddings, 0.2, seed, 0.7, 0.5).validates[:30].all() for seed in range(10))


def test_a_split_that_percolation_empties_is_an_error_that_names_the_threshold():
    embeddings = torch.ones(100, 4) / 2
    with pytest.raises(
        ValueError, match=r"only 0 of 20 rows can validate: 100 are .*data\.group_threshold=0\.7.* 0 were trained"
    ):
        split(rows([f"p{i}" for i in range(100)]), embeddings, 0.2, 0, 0.7, 0.02)


@given(st.integers(0, 10_000), st.integers(0, 120), st.floats(0.6, 0.9))
@settings(deadline=None, max_examples=30)
def test_no_prompt_moves_from_training_to_validation_when_data_grow(seed, more, threshold):
    embeddings = vectors(seed, 120 + more, families=80)
    samples = rows([f"p{i}" for i in range(120 + more)])
    try:
        first = split(samples[:120], embeddings[:120], 0.2, 0, threshold, 0.2)
    except ValueError:
        return
    trained, held = (np.flatnonzero(first.validates == side) for side in (False, True))
    prompts, others = [f"p{i}" for i in trained], embeddings[torch.from_numpy(trained)]
    earlier = Earlier(prompts, others, [f"p{i}" for i in held], threshold=threshold)
    try:
        second = split(samples, embeddings, 0.2, 0, threshold, 0.2, earlier)
    except ValueError as error:
        assert "rows can validate" in str(error)
        return
    assert not second.validates[trained].any()
    assert second.moved == (~second.validates[held]).sum()
    # What was held out and is joined to nothing that trained is still held out.
    validates = torch.from_numpy(second.validates)
    assert float((embeddings[validates] @ embeddings[~validates].T).max()) < threshold


def test_what_an_earlier_run_trained_on_never_validates_though_it_is_not_in_these_data():
    samples = rows([f"p{i}" for i in range(50)])
    near = normalize(torch.eye(50)[:40] + 0.1, dim=1)
    sides = split(samples, torch.eye(50), 0.2, 0, 0.7, 0.5, Earlier(["other"] * 40, near, [], threshold=0.7))
    assert not sides.validates[:40].any() and sides.validates[40:].all()
    without = split(samples, torch.eye(50), 0.2, 0, 0.7, 0.5)
    assert without.validates[:40].any()


def test_combinations_that_an_earlier_run_trained_on_never_validate():
    from img2prompt.synthesis.scenes import combinations, compose_prompts

    samples = [Sample(str(i), p, SOURCE, str(i), combinations(p)) for i, p in enumerate(compose_prompts(1000, 0))]
    first = split(samples, apart(samples), 0.3, 0)
    trained = set().union(*(s.combinations for s, h in zip(samples, first.validates, strict=True) if not h))
    others = [Sample(str(i), p, SOURCE, str(i), combinations(p)) for i, p in enumerate(compose_prompts(1000, 5))]
    earlier = Earlier([], torch.zeros(0, len(others)), [], trained)
    second = split(others, apart(others), 0.1, 3, earlier=earlier)
    assert second.validates.any() and second.trained_before
    assert all(s.combinations - trained for s, h in zip(others, second.validates, strict=True) if h)
    with pytest.raises(ValueError, match="were trained on by an earlier run"):
        split(others, apart(others), 0.9, 3, earlier=earlier)


def test_rows_that_another_run_trained_on_are_found_by_prompt_closeness_and_combination():
    samples = rows(["seen", "Close to it", "joined to that", "free"])
    samples += [
        Sample("4", "a", SOURCE, "4", frozenset({("red", "cat")})),
        Sample("5", "b", SOURCE, "5", frozenset({("red", "cat"), ("blue", "dog")})),
        Sample("6", "as found, cleaned", SOURCE, "6", raw_prompt="as (found:1.2)"),
    ]
    embeddings = torch.eye(8)[:7]
    embeddings[2] = normalize(torch.eye(8)[1] + torch.eye(8)[2], dim=0)
    near_the_second = normalize(torch.eye(8)[1] + 0.3 * torch.eye(8)[7], dim=0)[None].repeat(3, 1)
    earlier = Earlier(["SEEN", "gone", "as (found:1.2)"], near_the_second, [], {("red", "cat")}, threshold=0.7)
    # The third is close to what the other run trained on only by way of the second.
    assert float(near_the_second[0] @ embeddings[2]) < 0.7
    touched = trained_on(samples, embeddings, 0.7, earlier)
    assert touched.tolist() == [True, True, True, False, True, False, True]
    assert trained_on(samples, embeddings, None, Earlier([], torch.zeros(0, 8), [])).tolist() == [False] * 7
