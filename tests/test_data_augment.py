"""Streamed augmentation: by id and epoch, and within what was asked for."""

import random
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from diffult_ray.data.augment import Augmentation, augment, crop_box, evaluate
from diffult_ray.data.decode import Undecodable
from tests.data_files import encoded, picture

DATA = encoded(picture(1, size=(60, 40)))


@pytest.mark.parametrize("channels", [1, 3])
def test_shape_and_kind(channels):
    rule = Augmentation(image_size=16, channels=channels, jitter=0.4)
    found = augment(DATA, rule, seed=0, epoch=0, image_id=3)
    assert found.shape == (channels, 16, 16) and found.dtype == np.uint8


def test_depends_on_seed_epoch_and_id_alone():
    rule = Augmentation(image_size=16, jitter=0.4)
    keys = [(seed, epoch, image) for seed in (0, 1) for epoch in (0, 1) for image in (0, 1)]
    first = {k: augment(DATA, rule, seed=k[0], epoch=k[1], image_id=k[2]).tobytes() for k in keys}
    random.seed(1)
    np.random.seed(1)
    for k in reversed(keys):
        assert augment(DATA, rule, seed=k[0], epoch=k[1], image_id=k[2]).tobytes() == first[k]
    assert len(set(first.values())) == len(keys)


def test_the_whole_image_without_chance():
    rule = Augmentation(image_size=16, scale=(1.0, 1.0), ratio=(1.5, 1.5), flip=False)
    expected = np.asarray(picture(1, size=(60, 40)).resize((16, 16), Image.Resampling.BILINEAR))
    found = augment(DATA, rule, seed=0, epoch=0, image_id=0)
    np.testing.assert_array_equal(found, expected.transpose(2, 0, 1))


def test_flip_mirrors_half():
    rule = Augmentation(image_size=16, scale=(1.0, 1.0), ratio=(1.5, 1.5))
    found = [augment(DATA, rule, seed=0, epoch=0, image_id=i) for i in range(400)]
    kinds = {image.tobytes(): sum(np.array_equal(image, other) for other in found) for image in found}
    assert len(kinds) == 2 and min(kinds.values()) > 150
    one, other = (np.frombuffer(k, np.uint8).reshape(3, 16, 16) for k in kinds)
    assert np.abs(one[..., ::-1].astype(int) - other).max() <= 1


def test_boxes_keep_area_and_ratio():
    rule, rng = Augmentation(image_size=16, scale=(0.2, 0.5)), random.Random(0)
    boxes = np.array([crop_box((600, 400), rule, rng) for _ in range(500)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert boxes.min() >= 0 and boxes[:, 2].max() <= 600 and boxes[:, 3].max() <= 400
    share, ratio = width * height / 240_000, width / height
    assert 0.19 < share.min() < 0.22 and 0.48 < share.max() < 0.51
    assert 0.74 < ratio.min() < 0.78 and 1.28 < ratio.max() < 1.35


@pytest.mark.parametrize(("size", "box"), [((1000, 10), (493, 0, 506, 10)), ((10, 1000), (0, 493, 10, 506))])
def test_a_crop_that_never_fits_is_the_centre(size, box):
    rule = Augmentation(image_size=16, scale=(0.9, 1.0))
    assert crop_box(size, rule, random.Random(0)) == box


def test_jitter_without_colour_keeps_the_mean_near():
    rule = Augmentation(image_size=16, scale=(1, 1), ratio=(1.5, 1.5), flip=False, jitter=0.2)
    plain = augment(DATA, replace(rule, jitter=0.0), seed=0, epoch=0, image_id=0)
    ratios = [augment(DATA, rule, seed=0, epoch=0, image_id=i).mean() / plain.mean() for i in range(200)]
    assert 0.75 < min(ratios) < 0.9 and 1.1 < max(ratios) < 1.25


def test_evaluate_is_the_fields():
    """Short side S * 256 / 224, then a centre crop of S."""
    image = picture(2, size=(96, 64))
    resized = image.resize((48, 32), Image.Resampling.BILINEAR)
    expected = np.asarray(resized.crop((10, 2, 38, 30))).transpose(2, 0, 1)
    np.testing.assert_array_equal(evaluate(encoded(image), channels=3, image_size=28), expected)


def test_broken_bytes():
    rule = Augmentation(image_size=16)
    with pytest.raises(Undecodable, match="is truncated or broken"):
        augment(DATA[:-40], rule, seed=0, epoch=0, image_id=0)
