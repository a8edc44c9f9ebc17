"""The image zoo: every kind of file has one outcome."""

import io
import struct
import zlib

import numpy as np
import PIL
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from img2prompt.data.decoding import MAX_PIXELS, ImageError
from img2prompt.data.fitting import fit
from img2prompt.data.images import decode


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixel(image, place=(0, 0)):
    return tuple(image[:, place[1], place[0]].tolist())


def pixels(image):
    """[H, W, 3] of a decoded tensor."""
    return image.permute(1, 2, 0).numpy()


GRADIENT = Image.fromarray(np.linspace(0, 255, 48 * 32 * 3).reshape(32, 48, 3).astype(np.uint8))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "GIF", "JPEG", "WEBP", "AVIF"])
def test_every_listed_format_is_read(kind):
    image = decode(encoded(GRADIENT, kind))
    assert image.shape == (3, 32, 48) and image.dtype == torch.uint8
    assert np.abs(pixels(image).astype(float) - np.asarray(GRADIENT, float)).mean() < 12


@pytest.mark.parametrize("size", [(65, 1), (1, 65), (2000, 4)])
def test_a_line_of_pixels_does_not_vanish(size):
    square = fit(torch.zeros(3, size[1], size[0], dtype=torch.uint8), 32, "bicubic", "longest")
    assert square.shape == (3, 32, 32) and (square == 0).any() and (square == 255).any()


def test_unreadable_exif_does_not_make_a_sound_image_bad():
    data = encoded(GRADIENT, "PNG", exif=b"Exif\0\0junk")
    assert np.array_equal(pixels(decode(data)), np.asarray(GRADIENT))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparent_pixels_are_white_whatever_lies_under_them(mode):
    black = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    black.putpixel((1, 1), (0, 0, 0, 255))
    kind = "TIFF" if mode == "PA" else "PNG"
    data = encoded(black if mode == "PA" else black.convert(mode), kind)
    image = decode(data)
    assert pixel(image) == (255, 255, 255) and pixel(image, (1, 1)) == (0, 0, 0)


def test_a_transparent_palette_entry_is_white():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 0, 0])
    image.putpixel((1, 0), 1)
    decoded = decode(encoded(image, transparency=0))
    assert pixel(decoded) == (255, 255, 255) and pixel(decoded, (1, 0)) == (200, 0, 0)


def test_sixteen_bit_grey_is_scaled_not_clipped():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    assert pixels(decode(encoded(Image.fromarray(ramp)))).mean() == pytest.approx(127.5, abs=0.6)


def test_float_and_integer_grey_are_scaled():
    ramp = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    assert pixels(decode(encoded(Image.fromarray(ramp), "TIFF"))).mean() == pytest.approx(127.5, abs=0.6)
    wide = np.linspace(0, 65535, 64).astype(np.int32).reshape(8, 8)
    assert pixels(decode(encoded(Image.fromarray(wide), "TIFF"))).mean() == pytest.approx(127.5, abs=0.6)


def test_cmyk_becomes_rgb():
    assert pixel(decode(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF"))) == (255, 0, 0)


def test_exif_rotation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(encoded(GRADIENT, "JPEG", exif=exif)).shape == (3, 48, 32)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame_counts(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert pixel(decode(data)) == (255, 0, 0)


def bomb(side):
    """A PNG of a few bytes that claims to be `side` pixels square."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [int(MAX_PIXELS**0.5) + 2, 12_000, 60_000])
def test_a_bomb_is_refused_before_it_is_decoded(side):
    with pytest.raises(ImageError, match="megapixels"):
        decode(bomb(side))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"<!doctype html><html></html>", "not an image of a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image of a known format"),
        (encoded(GRADIENT)[:200], "damaged"),
        (encoded(GRADIENT, "JPEG")[:300], "damaged"),
    ],
)
def test_what_is_no_image_is_refused_with_the_reason(data, reason):
    with pytest.raises(ImageError, match=reason):
        decode(data)


@given(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"]), st.data())
@settings(max_examples=150, deadline=None)
def test_damaged_bytes_give_an_image_or_our_own_error(kind, data):
    content = bytearray(encoded(GRADIENT, kind))
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert decode(bytes(content)).shape[0] == 3
    except ImageError as error:
        assert str(error)


def test_the_three_ways_to_make_a_square():
    wide = torch.zeros(3, 20, 40, dtype=torch.uint8)
    wide[2], wide[0, :, :4], wide[2, :, :4] = 255, 255, 0
    squash, crop, pad = (fit(wide, 20, "bicubic", mode) for mode in ("squash", "shortest", "longest"))
    assert squash.shape == crop.shape == pad.shape == (3, 20, 20) and squash.dtype == torch.uint8
    assert squash[:, 10, 0].tolist()[0] > 200 and crop[:, 10, 0].tolist() == [0, 0, 255]
    assert pad[:, 0, 10].tolist() == [255, 255, 255] and pad[:, 10, 19].tolist() == [0, 0, 255]


def test_interpolation_is_used():
    image = decode(encoded(GRADIENT))
    assert not torch.equal(fit(image, 17, "bicubic", "squash"), fit(image, 17, "bilinear", "squash"))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@given(st.integers(1, 400), st.integers(1, 400), st.integers(1, 300), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_resizing_is_pillows_to_one_of_255(interpolation, width, height, side, seed):
    # Before version 13 Pillow resized rows first, whatever the size; ours is as version 13.
    assume(int(PIL.__version__.split(".")[0]) >= 13 or height - side <= max(0, 2 * (width - side)))
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    pillow = Image.fromarray(noise).resize((side, side), Image.Resampling[interpolation.upper()])
    ours = fit(torch.from_numpy(noise).permute(2, 0, 1), side, interpolation, "squash")
    difference = np.abs(pixels(ours).astype(int) - np.asarray(pillow, int))
    # Both round between rows and columns: one value in a thousand may fall on the other side twice.
    assert (difference > 1).sum() <= max(2, difference.size / 1000) and difference.max() <= 2


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(("kind", "options"), [("JPEG", {"quality": 95}), ("JPEG", {"progressive": True}), ("PNG", {})])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_the_fast_decoder_gives_pillows_pixels(mode, kind, options, orientation):
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((123, 77), Image.Resampling.BICUBIC).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, kind, exif=exif, **options)
    pillow = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert np.array_equal(pixels(decode(data)), np.asarray(pillow))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_every_truncation_has_pillows_outcome(kind):
    data = encoded(GRADIENT, kind)
    for length in range(1, len(data), 7):
        cut = data[:length]
        try:
            Image.open(io.BytesIO(cut)).load()
        except Exception:
            with pytest.raises(ImageError):
                decode(cut)
        else:
            assert decode(cut).shape == (3, 32, 48)


@pytest.mark.parametrize("size", [(60_000, 1), (1, 60_000)])
def test_a_sliver_is_refused_where_its_middle_would_fill_the_memory(size):
    sliver = decode(encoded(Image.new("RGB", size)))
    with pytest.raises(ImageError, match="too long and thin"):
        fit(sliver, 224, "bicubic", "shortest")
    assert fit(sliver, 224, "bicubic", "longest").shape == (3, 224, 224)
