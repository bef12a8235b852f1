"""Augmentation of streamed images, one at a time on a processor, by a draw of its own.

The draw depends on seed, epoch and the image's id, so an image looks the same in an epoch whichever
worker decodes it, and in whatever order.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from diffult_ray.data.decode import decode, open_image, to_array, to_mode
from diffult_ray.seeds import stream

if TYPE_CHECKING:
    from PIL.Image import Image

Box = tuple[float, float, float, float]
ATTEMPTS = 10  # of a crop that fits, as torchvision's RandomResizedCrop
EVALUATION_MARGIN = 256 / 224  # short side before the centre crop, over the crop: the field's on ImageNet


@dataclass(frozen=True)
class Augmentation:
    """What is done to a training image: RandomResizedCrop, flip, colour jitter.

    Args:
        scale: range of the crop's share of the image's area.
        ratio: range of the crop's width over its height, log-uniform.
        jitter: largest relative change of brightness, contrast and saturation; 0 for none.
    """

    image_size: int
    channels: int = 3
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True
    jitter: float = 0.0


def augment(data: bytes, rule: Augmentation, *, seed: int, epoch: int, image_id: int | str) -> np.ndarray:
    """Encoded bytes as an augmented training image [C, S, S] uint8.

    Raises:
        Undecodable: with the reason.
    """
    return to_array(augmented(data, rule, seed=seed, epoch=epoch, image_id=image_id))


def augmented(data: bytes, rule: Augmentation, *, seed: int, epoch: int, image_id: int | str) -> Image:
    """Encoded bytes as an augmented training image of side S.

    Raises:
        Undecodable: with the reason.
    """
    rng = random.Random(stream(seed, "augment", epoch, image_id))
    image = to_mode(open_image(data), rule.channels)
    image = resized_crop(image, crop_box(image.size, rule, rng), rule.image_size)
    if rule.flip and rng.random() < 0.5:
        image = _mirrored(image)
    return jittered(image, rule.jitter, rng) if rule.jitter else image


def evaluate(data: bytes, *, channels: int, image_size: int) -> np.ndarray:
    """Encoded bytes as an evaluation image [C, S, S] uint8: short side S * 256 / 224, then a centre crop.

    Raises:
        Undecodable: with the reason.
    """
    short = round(image_size * EVALUATION_MARGIN)
    return decode(data, channels=channels, image_size=image_size, short_side=short)


def crop_box(size: tuple[int, int], rule: Augmentation, rng: random.Random) -> Box:
    """Left, top, right and bottom of a crop of random area and ratio inside an image of `size`.

    If none of ten draws fits, the largest centre crop whose ratio is in range (Szegedy et al., 2015).
    """
    width, height = size
    low, high = (math.log(r) for r in rule.ratio)
    for _ in range(ATTEMPTS):
        area = width * height * rng.uniform(*rule.scale)
        ratio = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.randint(0, width - w), rng.randint(0, height - h)
            return left, top, left + w, top + h
    return _centre_box(width, height, rule.ratio)


def _centre_box(width: int, height: int, ratio: tuple[float, float]) -> Box:
    w = max(1, min(width, round(height * ratio[1])))
    h = max(1, min(height, round(width / ratio[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def resized_crop(image: Image, box: Box, image_size: int) -> Image:
    """The box of an image at `image_size`, cropped and resampled (antialiased) in one."""
    from PIL import Image

    return image.resize((image_size, image_size), Image.Resampling.BILINEAR, box=box)


def _mirrored(image: Image) -> Image:
    from PIL import Image

    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def jittered(image: Image, strength: float, rng: random.Random) -> Image:
    """Brightness, contrast and (in colour) saturation, each by a factor in 1 +- strength, in random order."""
    from PIL import ImageEnhance

    changes = [ImageEnhance.Brightness, ImageEnhance.Contrast]
    changes += [ImageEnhance.Color] if image.mode == "RGB" else []
    rng.shuffle(changes)
    for change in changes:
        image = change(image).enhance(rng.uniform(max(0.0, 1 - strength), 1 + strength))
    return image
