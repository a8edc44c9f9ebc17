"""The closed form of SD-IPC: against a singular value decomposition, the two steps it folds, attention, and edits."""

import pytest
import torch
from torch.nn import functional

from img2prompt.sdipc.editing import blended, edited, ends_of
from img2prompt.sdipc.projector import NORM, Projector, projector_of, pseudo_prompt, truncated_inverse


def maps(text_width=12, image_width=16, joint=10, seed=0):
    drawn = torch.Generator().manual_seed(seed)
    return torch.randn(joint, image_width, generator=drawn), torch.randn(joint, text_width, generator=drawn)


def random(*shape, seed=3):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_inverse_is_that_of_the_singular_values_above_the_floor():
    _, text_map = maps()
    left, values, right = torch.linalg.svd(text_map.double(), full_matrices=False)
    floor = float(values[4:6].mean())
    kept = values > floor
    by_hand = right.T @ torch.diag(torch.where(kept, 1 / values, 0.0)) @ left.T
    inverse = truncated_inverse(text_map.double(), floor)
    assert torch.allclose(inverse, by_hand, atol=1e-10)
    onto = text_map.double() @ inverse
    assert torch.allclose(onto, onto.T, atol=1e-10) and torch.allclose(onto @ onto, onto, atol=1e-10)
    assert float(onto.trace()) == pytest.approx(int(kept.sum())) == 5
    projector = projector_of(maps()[0], text_map, floor=floor)
    assert (projector.rank, projector.full) == (5, 10) and float(projector.floor) == pytest.approx(floor)


def test_the_folded_matrix_is_both_steps_and_gives_the_length_that_is_asked_for():
    image_map, text_map = maps()
    states = random(5, 16)
    folded = projector_of(image_map, text_map, norm=3.5)(states)
    steps = torch.linalg.pinv(text_map, atol=0.3, rtol=0) @ (image_map @ states.T)
    assert torch.allclose(folded, 3.5 * functional.normalize(steps.T, dim=1), atol=1e-5)
    assert torch.allclose(projector_of(image_map, text_map)(states).norm(dim=1), torch.full((5,), NORM))
    # The length of an image's state says nothing.
    assert torch.allclose(projector_of(image_map, text_map)(states * 7), projector_of(image_map, text_map)(states))


def test_at_full_rank_texts_are_taken_to_where_images_are():
    image_map, text_map = maps()
    states = random(5, 16)
    back = projector_of(image_map, text_map, floor=1e-6)(states) @ text_map.T
    assert torch.allclose(functional.cosine_similarity(back, states @ image_map.T), torch.ones(5), atol=1e-5)


def test_an_orthogonal_map_of_texts_ranks_alike_in_both_spaces():
    image_map, _ = maps(joint=12)
    text_map = torch.linalg.qr(random(12, 12, seed=5)).Q
    images, texts = random(6, 16), random(9, 12, seed=6)
    converted = projector_of(image_map, text_map)(images)
    there = functional.normalize(converted, dim=1) @ functional.normalize(texts, dim=1).T
    joint = functional.normalize(images @ image_map.T, dim=1) @ functional.normalize(texts @ text_map.T, dim=1).T
    assert torch.allclose(there, joint, atol=1e-5)


def test_sdipc_recovers_a_known_linear_map():
    # Images whose states are a linear map of the states of their texts: what is found is the state of the text.
    _, text_map = maps(text_width=8, joint=10)
    mixing = random(16, 8, seed=7)
    image_map = text_map @ torch.linalg.pinv(mixing)
    texts = random(20, 8, seed=8)
    found = projector_of(image_map, text_map, floor=1e-6)(texts @ mixing.T)
    assert torch.allclose(functional.cosine_similarity(found, texts), torch.ones(20), atol=1e-4)


def test_the_pseudo_prompt_starts_as_the_null_prompt_does():
    null, converted = random(77, 12), random(3, 12, seed=9)
    prompt = pseudo_prompt(null, converted)
    assert prompt.shape == (3, 77, 12)
    assert torch.equal(prompt[:, 0], null[:1].expand(3, -1))
    assert torch.equal(prompt[:, 1:], converted[:, None].expand(-1, 76, -1))


def test_attention_reads_the_image_once_with_the_weight_of_76():
    null, converted = random(77, 12), random(1, 12, seed=9)
    queries, keys, values = random(4, 8, seed=10), random(8, 12, seed=11), random(8, 12, seed=12)
    whole = pseudo_prompt(null, converted)[0]
    logits = queries @ (whole @ keys.T).T
    long = logits.softmax(dim=1) @ (whole @ values.T)
    both = whole[:2]
    short = queries @ (both @ keys.T).T + torch.tensor([0.0, 76.0]).clamp(1).log()
    assert torch.allclose(long, short.softmax(dim=1) @ (both @ values.T), atol=1e-5)


def test_an_edit_keeps_the_words_and_puts_the_image_from_each_end_on():
    text, converted = random(3, 77, 12), random(3, 12, seed=9)
    tokens = torch.full((3, 77), 9)
    ends = [4, 1, 76]
    for row, end in enumerate(ends):
        tokens[row, :end] = 5
    assert ends_of(tokens, 9).tolist() == ends
    for alpha in (0.0, 0.9):
        both = edited(text, ends_of(tokens, 9), converted, alpha)
        for row, end in enumerate(ends):
            assert torch.equal(both[row, :end], text[row, :end])
            assert torch.allclose(both[row, end:], converted[row] + alpha * text[row, end:])
    with pytest.raises(ValueError, match="a text has no end token"):
        ends_of(tokens, 8)


def test_images_blend_by_their_directions():
    two = torch.tensor([[3.0, 0.0], [0.0, 3.0]])
    assert torch.allclose(blended(two), torch.tensor([[1.0, 1.0]]) * 3 / 2**0.5)
    assert torch.equal(blended(two), blended(two.flip(0)))
    with pytest.raises(ValueError, match="the images cancel each other out"):
        blended(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))


def test_what_cannot_be_inverted_is_told():
    image_map, text_map = maps()
    with pytest.raises(ValueError, match="floor=100: no singular value of CLIP's map of texts is above it; lower it"):
        projector_of(image_map, text_map, floor=100)
    with pytest.raises(ValueError, match="norm must be above 0, got 0"):
        projector_of(image_map, text_map, norm=0)


def test_a_projector_is_saved_as_what_it_is():
    projector = projector_of(*maps(), norm=3.0, floor=0.5)
    again = Projector(torch.zeros_like(projector.matrix), 1.0, 0.0, 1, 1)
    again.load_state_dict(projector.state_dict())
    assert torch.equal(again(random(4, 16)), projector(random(4, 16))) and float(again.floor) == 0.5
