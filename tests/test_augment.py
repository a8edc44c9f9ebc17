"""Augmentation: each part against what it is called after."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as transforms

from img2prompt.data.prompts import may_be_mirrored
from img2prompt.data.sample import Batch
from img2prompt.training.augment import Augment, _jittered, jpeg_noise, mixed


def test_augmentation_is_off_by_default_and_the_flip_mirrors():
    images = torch.randint(0, 256, (3, 3, 9, 9), dtype=torch.uint8)
    assert Augment()(images, torch.ones(3, dtype=torch.bool)) is images
    mirrorable = torch.tensor([True, False, True])
    flipped = Augment(flip=1.0)(images, mirrorable)
    assert torch.allclose(flipped[mirrorable], images[mirrorable].flip(-1).float(), atol=1e-3)
    assert torch.allclose(flipped[1], images[1].float(), atol=1e-3)


@pytest.mark.parametrize(
    ("prompt", "mirrors"),
    [
        ("a cat to the LEFT of a dog", False),
        ("the leftmost house", False),
        ("right-handed archer", False),
        ("a bright copyright sign, upright", True),
        ("a cat", True),
    ],
)
def test_prompts_that_speak_of_sides_are_never_mirrored(prompt, mirrors):
    assert may_be_mirrored(prompt) == mirrors


@pytest.mark.parametrize("quality", [10, 30, 75, 95])
def test_jpeg_noise_is_what_jpeg_leaves(quality):
    # Smooth with edges, as pictures are; its size is no multiple of eight. Grey, because libjpeg has another table for
    # colours.
    smooth = torch.nn.functional.interpolate(torch.rand(1, 1, 7, 9), (51, 70), mode="bicubic").clamp(0, 1) * 255
    image = smooth[0, 0].round().to(torch.uint8)
    image[10:20, 30:60] = 250
    file = io.BytesIO()
    Image.fromarray(image.numpy()).save(file, "JPEG", quality=quality)
    jpeg = torch.from_numpy(np.array(Image.open(file))).float()
    ours = jpeg_noise(image.float().expand(1, 3, -1, -1), torch.tensor([float(quality)]))[0]
    inside = (slice(0, 48), slice(0, 64))  # libjpeg fills up the last blocks in its own way
    assert (ours[0][inside] - jpeg[inside]).abs().mean() < 0.6
    assert (ours[0][inside] - image.float()[inside]).abs().mean() > 2 * (ours[0][inside] - jpeg[inside]).abs().mean()


def test_jitter_is_that_of_the_published_transforms():
    images = torch.randint(0, 256, (2, 3, 16, 16)).float()
    brightness, contrast, saturation = 0.3, -0.2, 0.5
    amount = torch.tensor([[brightness] * 2, [contrast] * 2, [saturation] * 2, [0.0] * 2])
    expected = transforms.adjust_brightness(images / 255, 1 + brightness)
    expected = transforms.adjust_contrast(expected, 1 + contrast)
    expected = transforms.adjust_saturation(expected, 1 + saturation)
    assert torch.allclose(_jittered(images, amount) / 255, expected, atol=3e-3)


def test_a_half_turn_of_hue_makes_the_opposite_colour():
    red = torch.tensor([200.0, 60.0, 60.0]).view(1, 3, 1, 1)
    turned = _jittered(red, torch.tensor([[0.0], [0.0], [0.0], [2.0]])).flatten()
    assert turned[0] < turned[1] and turned[0] < turned[2]


def test_each_image_has_its_own_chance_and_one_option_does_not_move_another():
    images = torch.randint(0, 256, (64, 3, 16, 16), dtype=torch.uint8)
    yes = torch.ones(64, dtype=torch.bool)

    def views(**options):
        torch.manual_seed(0)
        return Augment(**options)(images, yes).float()

    for options in ({"flip": 0.5}, {"jpeg": 0.5}, {"erase": 0.5}):
        changed = (views(**options) - images.float()).abs().amax((1, 2, 3)) > 1
        assert 12 < changed.sum() < 52
        assert torch.equal(views(**options), views(**options))
    # The same images are mirrored whether or not something else is done to them.
    both, alone = views(flip=0.5, erase=0.5), views(flip=0.5)
    same = (both - alone).abs().amax((1, 2, 3)) == 0
    assert 12 < same.sum() < 52
    holes = (views(erase=1.0) != images.float()).any(1).float().mean((1, 2))
    assert holes.min() > 0.005 and holes.max() < 0.45


@pytest.mark.parametrize("options", [{"jpeg": 1.5}, {"jitter": -1}, {"erase": 2}, {"jpeg_quality": 0}, {"flip": 2}])
def test_augmentations_out_of_range_are_named(options):
    with pytest.raises(ValueError, match=f"augment.{next(iter(options))} must be between"):
        Augment(**options)


def test_crops_stay_inside_and_keep_at_least_the_area_they_must():
    # Pixels that are their own coordinates: the range that comes out is the crop.
    line = torch.arange(64).float() * 4
    images = torch.stack([line.expand(64, 64), line[:, None].expand(64, 64), torch.zeros(64, 64)])
    torch.manual_seed(0)
    views = Augment(min_area=0.25)(images.to(torch.uint8).expand(200, -1, -1, -1), torch.ones(200, dtype=torch.bool))
    assert views.min() >= 0 and views.max() <= 252
    span = (views.flatten(2).amax(-1) - views.flatten(2).amin(-1))[:, :2] / 252
    area = span.prod(dim=1)
    assert area.min() > 0.25 * 0.85 and area.max() > 0.8 and area.std() > 0.1
    with pytest.raises(ValueError, match="min_area"):
        Augment(min_area=0.0)


def test_autocast_changes_no_view():
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    augment = Augment(min_area=0.5, flip=0.5, jitter=0.3, jpeg=0.5, erase=0.5)

    def views():
        torch.manual_seed(0)
        return augment(images, torch.ones(8, dtype=torch.bool))

    plain = views()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(views(), plain)


def test_mixup_blends_items_and_targets_by_the_same_shares():
    torch.manual_seed(0)
    items, targets = torch.eye(16), torch.nn.functional.normalize(torch.randn(16, 5), dim=-1)
    labels = (torch.rand(16, 7) < 0.3).float()
    batch = Batch({}, torch.arange(16), targets, [""] * 16, torch.ones(16, dtype=torch.bool), labels)
    blended, whole = mixed(items, batch, 0.4)
    # One-hot items tell who was blended with whom, and how much of each.
    assert torch.allclose(blended.sum(1), torch.ones(16)) and (blended >= 0).all()
    assert ((blended > 0) & (blended < 1)).any()
    assert torch.allclose(whole.targets, torch.nn.functional.normalize(blended @ targets, dim=-1), atol=1e-6)
    assert torch.allclose(whole.labels, blended @ labels, atol=1e-6)
    shares = torch.stack([mixed(items, batch, 0.4)[0].diagonal() for _ in range(400)]).flatten()
    # Of Beta(0.4, 0.4), and sometimes the same item twice: mean a half, variance 1 / (4 (2 * 0.4 + 1)).
    alone = shares[shares < 1]
    assert alone.mean().item() == pytest.approx(0.5, abs=0.03)
    assert alone.var().item() == pytest.approx(1 / (4 * 1.8), abs=0.02)


def test_mixup_of_pixels_keeps_their_range():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    batch = Batch({}, torch.arange(4), torch.eye(4), [""] * 4, torch.ones(4, dtype=torch.bool))
    blended, _ = mixed(images, batch, 1.0)
    assert blended.dtype == torch.float32 and blended.shape == images.shape
    assert blended.min() >= images.min() and blended.max() <= images.max()
