"""From a source's records to what a split holds: pixels in memory, or checked references."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from diffult_ray.data.decode import Undecodable, decode, is_grey, verify
from diffult_ray.data.encoded import Encoded, NoImage, iter_bytes
from diffult_ray.data.source import Faults, Records, Source
from diffult_ray.errors import BadInput

MEMORY_BYTES = 2 * 2**30  # decoded images of up to 2 GiB are held in memory where `loading` is auto
GREY_SAMPLE = 100  # images that are looked at to tell a grey set from one in colour
_RESIZE_AT_ONCE = 4096


def is_streamed(source: Source, *, loading: str, channels: int, image_size: int) -> bool:
    """Whether a split keeps references: by `loading`, else by the bytes of all decoded images."""
    if not source.streamable or loading != "auto":
        return source.streamable and loading == "stream"
    images = sum(len(records) for records in source.parts.values())
    return images * channels * image_size**2 > MEMORY_BYTES


def channels_of(source: Source, wanted: int | None) -> int:
    """The channels asked for; else those stored, 3 unless every image of a sample is grey."""
    train = source.parts["train"]
    if wanted is not None:
        return wanted
    if train.pixels is not None:
        return train.pixels.shape[1]
    found: list[bool] = []
    # What cannot be read is told of when all images are read.
    _each(source, _sample(train, GREY_SAMPLE), lambda _, data: found.append(is_grey(data)), Faults())
    return 1 if found and all(found) else 3


def _sample(records: Records, most: int) -> Records:
    """Up to `most` records, evenly spaced."""
    return records.take(np.unique(np.linspace(0, len(records) - 1, min(most, len(records))).astype(int)))


# --- pixels at hand -----------------------------------------------------------------------------


def converted(images: np.ndarray, *, channels: int, image_size: int | None) -> np.ndarray:
    """Pixels [n, C, H, W] uint8 resized and in the channels asked for."""
    return _in_channels(_resized(images, image_size), channels)


def _in_channels(images: np.ndarray, channels: int) -> np.ndarray:
    if images.shape[1] == channels:
        return images
    if channels == 3:
        return np.repeat(images, 3, axis=1)
    red, green, blue = (images[:, c].astype(np.uint32) for c in range(3))
    grey = (19595 * red + 38470 * green + 7471 * blue + 2**15) >> 16  # Pillow's ITU-R 601-2 luma
    return grey.astype(np.uint8)[:, None]


def _resized(images: np.ndarray, size: int | None) -> np.ndarray:
    if size is None or images.shape[-1] == size:
        return images
    parts = [images[i : i + _RESIZE_AT_ONCE] for i in range(0, len(images), _RESIZE_AT_ONCE)]
    return np.concatenate([_resize(part, size) for part in parts])


def _resize(images: np.ndarray, size: int) -> np.ndarray:
    import torch
    from torch.nn.functional import interpolate

    tensor = torch.from_numpy(images).float()
    resized = interpolate(tensor, size=(size, size), mode="bilinear", antialias=True)
    return resized.round().clamp(0, 255).to(torch.uint8).numpy()


# --- references ---------------------------------------------------------------------------------


def decoded(source: Source, faults: Faults, *, channels: int, image_size: int) -> Source:
    """The source with the pixels of every image that can be decoded, the others in `faults`."""

    def read(records: Records) -> Records:
        images = np.empty((len(records), channels, image_size, image_size), np.uint8)

        def one(index: int, data: bytes) -> None:
            images[index] = decode(data, channels=channels, image_size=image_size)

        good = _each(source, records, one, faults)
        whole = Records(records.labels, images, records.paths, records.rows)
        return whole if good.all() else whole.take(np.flatnonzero(good))

    return source.with_parts({part: read(records) for part, records in source.parts.items()})


def checked(source: Source, faults: Faults) -> Source:
    """The source without the images whose header does not hold, which are in `faults`."""

    def read(records: Records) -> Records:
        good = _each(source, records, lambda _, data: verify(data), faults)
        return records if good.all() else records.take(np.flatnonzero(good))

    return source.with_parts({part: read(records) for part, records in source.parts.items()})


def sizes(source: Source, most: int = 1000) -> Mapping[tuple[int, int], int]:
    """(width, height) -> training images, of up to `most` of them, evenly spaced, that can be read."""
    train, found = source.parts["train"], {}
    if train.paths is None:
        return {(train.pixels.shape[3], train.pixels.shape[2]): len(train)}

    def one(_: int, data: bytes) -> None:
        size = verify(data)
        found[size] = found.get(size, 0) + 1

    _each(source, _sample(train, most), one, Faults(), threads=1)
    return found


def _each(
    source: Source,
    records: Records,
    function: Callable[[int, bytes], Any],
    faults: Faults,
    threads: int | None = None,
) -> np.ndarray:
    """Call function(index, bytes) on every image in a pool of threads.

    Returns:
        [n] bool, false where an image could not be read or the function refused it; those are faults.
    """
    reasons: dict[int, str] = {}

    def one(index: int, data: Encoded) -> None:
        try:
            if isinstance(data, Exception):
                raise data
            function(index, data)
        except (OSError, ValueError) as error:
            reasons[index] = _reason(error)

    batches = iter_bytes(source.root or "", records.paths, records.rows, column=source.column)
    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        for index, contents in batches:
            list(pool.map(one, index.tolist(), contents))
    for index in sorted(reasons):
        faults.add(_name(source, records, index), reasons[index])
    good = np.ones(len(records), bool)
    good[list(reasons)] = False
    return good


def _reason(error: Exception) -> str:
    if isinstance(error, Undecodable):
        return str(error)
    if isinstance(error, NoImage):
        return "has no image"
    return f"cannot be read: {getattr(error, 'strerror', None) or error}"


def _name(source: Source, records: Records, index: int) -> str:
    row = records.rows[index]
    return records.paths[index] if row < 0 else f"{records.paths[index] or source.root} row {row}"


def check_size(source: Source, image_size: int | None) -> int:
    """The side of a split's square images.

    Raises:
        BadInput: if references have no `image_size`.
    """
    if image_size is not None:
        return image_size
    pixels = source.parts["train"].pixels
    if pixels is None:
        raise BadInput(
            where="dataset.image_size", rule=f"is needed for {source.name}, whose images may have any size",
            advice="set it",
        )
    return pixels.shape[-1]
