"""Encoded bytes -> pixels: every allowed format, every way of being broken."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from diffult_ray.data import decode as decoding
from diffult_ray.data.decode import Undecodable, decode, is_grey, verify
from tests.data_files import encoded, picture


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has almost no data: a decompression bomb."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 9)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("kind", "options"), [
    ("PNG", {}), ("BMP", {}), ("WEBP", {"lossless": True}), ("JPEG", {"quality": 95, "subsampling": 0}),
])
def test_formats(kind, options):
    image = picture(1, size=(16, 16))
    found = decode(encoded(image, kind, **options), channels=3, image_size=16)
    assert found.shape == (3, 16, 16) and found.dtype == np.uint8
    difference = np.abs(found.astype(int) - np.asarray(image).transpose(2, 0, 1))
    assert difference.max() <= (12 if kind == "JPEG" else 0)
    assert verify(encoded(image, kind, **options)) == (16, 16)


def test_grey_to_colour_and_back():
    grey, colour = picture(2, size=(8, 8), channels=1), picture(3, size=(8, 8))
    found = decode(encoded(grey), channels=3, image_size=8)
    assert (found == np.asarray(grey)).all()
    found = decode(encoded(colour), channels=1, image_size=8)
    np.testing.assert_array_equal(found[0], np.asarray(colour.convert("L")))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16", "CMYK"])
def test_every_mode_comes_in_8_bits(mode):
    if mode == "I;16":
        image = Image.fromarray(np.full((8, 8), 204 * 256, np.uint16))
    elif mode == "1":
        image = Image.new("1", (8, 8), 1)
    else:
        image = Image.new("L", (8, 8), 204).convert("L" if mode in ("L", "LA") else "RGB").convert(mode)
    kind = "JPEG" if mode == "CMYK" else "PNG"
    found = decode(encoded(image, kind), channels=3, image_size=8)
    assert np.abs(found.astype(int) - (255 if mode == "1" else 204)).max() <= 2
    assert is_grey(encoded(image, kind)) == (mode in ("1", "L", "LA", "I;16"))


def test_short_side_and_centre_crop():
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, 10:30] = 255  # exactly the centre square
    found = decode(encoded(Image.fromarray(pixels)), channels=3, image_size=20)
    assert (found == 255).all()
    half = decode(encoded(Image.fromarray(pixels)), channels=3, image_size=10)
    expected = np.asarray(Image.fromarray(pixels).resize((20, 10), Image.Resampling.BILINEAR))[:, 5:15]
    np.testing.assert_array_equal(half, expected.transpose(2, 0, 1))


@pytest.mark.parametrize("size", [(3, 200), (200, 3), (1, 1), (7, 5)])
def test_any_shape_fits(size):
    found = decode(encoded(picture(4, size=size)), channels=1, image_size=6)
    assert found.shape == (1, 6, 6)


@pytest.mark.parametrize(("data", "reason"), [
    (b"", "is empty"),
    (b"#!/bin/sh\necho no\n", "is not a JPEG, PNG, WebP or BMP image"),
    (png_header(30_000, 30_000), "is a decompression bomb"),
    (png_header(9_000, 9_000), "is a decompression bomb: 9000x9000"),
])
def test_refused(data, reason):
    for function in (verify, is_grey, lambda d: decode(d, channels=3, image_size=8)):
        with pytest.raises(Undecodable, match=reason):
            function(data)


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "PPM", "ICO"])
def test_other_formats_of_pillow_are_refused(kind):
    with pytest.raises(Undecodable, match="is not a JPEG, PNG, WebP or BMP image"):
        decode(encoded(picture(5, size=(16, 16)), kind), channels=3, image_size=8)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_truncated(kind, share):
    data = encoded(picture(6, size=(64, 64)), kind)
    data = data[: int(len(data) * share)]
    with pytest.raises(Undecodable):
        verify(data)
    with pytest.raises(Undecodable):
        decode(data, channels=3, image_size=8)


def test_png_with_a_wrong_checksum():
    data = bytearray(encoded(picture(7, size=(64, 64))))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(Undecodable, match="is truncated or broken"):
        verify(bytes(data))


def test_jpeg_with_bytes_behind_its_end():
    data = encoded(picture(8), "JPEG") + b"\0" * 10_000
    assert verify(data) == (12, 10)  # no end marker near the end, so it was decoded to be sure


def test_limit_is_below_pillows():
    assert decoding.MAX_PIXELS < Image.MAX_IMAGE_PIXELS


def test_sixteen_bits_are_scaled_not_clipped():
    ramp = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1024
    buffer = io.BytesIO()
    Image.fromarray(ramp).save(buffer, format="PNG")
    found = decode(buffer.getvalue(), channels=1, image_size=8)
    np.testing.assert_array_equal(found[0], ramp >> 8)
