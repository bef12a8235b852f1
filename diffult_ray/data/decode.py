"""Encoded bytes -> uint8 pixels, with Pillow's JPEG, PNG, WebP and BMP decoders and no other."""

from __future__ import annotations

import io
import struct
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
MAX_PIXELS = 2**26  # 67 million, 200 MB in colour; below Pillow's own limit, and above any camera's 61 MP
GREY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L")
MODES = {1: "L", 3: "RGB"}
_TAIL = 4096  # where a whole JPEG has its end marker, behind which some cameras leave a few bytes


class Undecodable(ValueError):
    """Bytes that are not an image that can be had; the message says why."""


def open_image(data: bytes) -> Image:
    """The image of encoded bytes, its header read and its size checked, not yet decoded.

    Raises:
        Undecodable: for bytes that are no JPEG, PNG, WebP or BMP, or whose header claims too many pixels.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise Undecodable("is not a JPEG, PNG, WebP or BMP image" if data else "is empty") from None
    except Image.DecompressionBombError:
        raise Undecodable(f"is a decompression bomb: more than {MAX_PIXELS} pixels") from None
    except Exception as error:  # a header that a decoder trips over raises many kinds
        raise Undecodable(f"has a broken header: {error}") from None
    if image.width * image.height > MAX_PIXELS:
        raise Undecodable(
            f"is a decompression bomb: {image.width}x{image.height} are more than {MAX_PIXELS} pixels"
        )
    return image


def to_mode(image: Image, channels: int) -> Image:
    """The image decoded, in 8 bits, grey (1) or colour (3).

    Raises:
        Undecodable: if the data are truncated or broken.
    """
    try:
        image.load()
        if image.mode.startswith("I"):
            image = _eight_bits(image)
        return image if image.mode == MODES[channels] else image.convert(MODES[channels])
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error and others
        raise Undecodable(f"is truncated or broken: {error}") from None


def _eight_bits(image: Image) -> Image:
    """16 bits of grey to 8; Pillow's own conversion clips instead."""
    from PIL import Image

    return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))


def fit(image: Image, image_size: int, short_side: int | None = None) -> Image:
    """Short side resized to `short_side` (`image_size` unless given), then a centre crop to `image_size`."""
    from PIL import Image

    short = short_side or image_size
    if min(image.size) != short:
        scale = short / min(image.size)
        size = tuple(max(short, round(side * scale)) for side in image.size)
        image = image.resize(size, Image.Resampling.BILINEAR)
    if image.size == (image_size, image_size):
        return image
    left, top = ((side - image_size) // 2 for side in image.size)
    return image.crop((left, top, left + image_size, top + image_size))


def to_array(image: Image) -> np.ndarray:
    """Pixels [C, H, W] uint8 of a grey or colour image."""
    pixels = np.asarray(image)
    return pixels[None].copy() if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def decode(data: bytes, *, channels: int, image_size: int, short_side: int | None = None) -> np.ndarray:
    """Encoded bytes as [channels, image_size, image_size] uint8.

    Raises:
        Undecodable: with the reason.
    """
    return to_array(decoded(data, channels=channels, image_size=image_size, short_side=short_side))


def decoded(data: bytes, *, channels: int, image_size: int, short_side: int | None = None) -> Image:
    """Encoded bytes as an 8-bit image of `image_size`, grey or colour.

    An image that has the size is not resampled. Alpha is dropped, and the orientation is as stored.

    Raises:
        Undecodable: with the reason.
    """
    return fit(to_mode(open_image(data), channels), image_size, short_side)


def is_grey(data: bytes) -> bool:
    """Whether the image is stored in grey.

    Raises:
        Undecodable: with the reason.
    """
    return open_image(data).mode in GREY_MODES


def verify(data: bytes) -> tuple[int, int]:
    """Width and height of an image whose header, checksums (PNG) and end hold; a doubtful one is decoded.

    Raises:
        Undecodable: with the reason.
    """
    image = open_image(data)
    size, kind = image.size, image.format
    if kind == "PNG":
        try:
            image.verify()
        except Exception as error:
            raise Undecodable(f"is truncated or broken: {error}") from None
    if not _ends_well(kind, data):
        to_mode(open_image(data), 3)
    return size


def _ends_well(kind: str | None, data: bytes) -> bool:
    """Whether the file is as long as it says; False if in doubt."""
    if kind == "PNG":
        return b"IEND" in data[-_TAIL:]
    if kind == "JPEG":
        return b"\xff\xd9" in data[-_TAIL:]
    if kind == "WEBP":
        return len(data) >= struct.unpack("<I", data[4:8])[0] + 8
    return False
