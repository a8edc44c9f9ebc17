"""Attention whose batches are turned round for a CPU says what it said before."""

import copy

import open_clip
import torch
from torch import nn
from torch.nn.functional import cosine_similarity

from img2prompt.encoders.attention import sequence_first


def tower() -> nn.Module:
    torch.manual_seed(0)
    config = open_clip.get_model_config("ViT-S-32-alt")
    vision = {**config["vision_cfg"], "layers": 2, "width": 64, "head_width": 32, "image_size": 32, "patch_size": 8}
    return open_clip.CLIP(config["embed_dim"], vision, config["text_cfg"]).visual.eval()


def test_a_tower_says_the_same_with_its_attention_turned_round():
    before, images = tower(), torch.randn(3, 3, 32, 32)
    after = copy.deepcopy(before)
    sequence_first(after)
    sequence_first(after)  # a second time changes nothing more
    assert before.state_dict().keys() == after.state_dict().keys()
    with torch.inference_mode():
        expected = before(images)
        assert torch.allclose(after(images), expected, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            assert cosine_similarity(after(images).float(), expected).min() > 0.999


def test_every_product_of_a_turned_attention_is_one_for_all_tokens():
    turned, images = tower(), torch.randn(3, 3, 32, 32)
    sequence_first(turned)
    seen = []
    for attention in (one for one in turned.modules() if isinstance(one, nn.MultiheadAttention)):
        # Before our own hooks' outputs are read: what attention is given lies in one piece, tokens first.
        attention.register_forward_pre_hook(lambda module, given: seen.append(given))
    with torch.inference_mode():
        turned(images)
    assert len(seen) == 2
    for query, key, value in seen:
        assert query is key is value and query.is_contiguous() and query.shape[:2] == (17, 3)
