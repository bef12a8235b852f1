"""Profiles and the field's indices against a literal transcription of LDAM-DRW's public code."""

import os
from pathlib import Path

import numpy as np
import pytest

from diffult_ray.config import Dataset
from diffult_ray.data import longtail
from diffult_ray.data.longtail import choose, exponential_counts, pareto_counts, profile_counts, step_counts

TOTALS = {  # METHOD: images of the long tail, by imbalance factor
    "cifar100": {10: 19_573, 50: 12_608, 100: 10_847, 200: 9_502},
    "cifar10": {10: 20_431, 50: 13_996, 100: 12_406, 200: 11_203},
}
CASES = [(name, factor) for name, totals in TOTALS.items() for factor in totals]
SHAPES = {"cifar100": (100, 500), "cifar10": (10, 5000)}


def generated_labels(name):
    """50,000 balanced labels in an order of their own, as the official files have."""
    classes, each = SHAPES[name]
    labels = np.repeat(np.arange(classes), each)
    return np.random.default_rng(1).permutation(labels)


def ldam_indices(targets, classes, factor):
    """imbalance_cifar.py: get_img_num_per_cls and gen_imbalanced_data, rand_number 0."""
    np.random.seed(0)
    img_max = len(targets) / classes
    numbers = [int(img_max * ((1 / factor) ** (c / (classes - 1.0)))) for c in range(classes)]
    chosen = []
    for c, number in zip(np.unique(np.array(targets, dtype=np.int64)), numbers, strict=True):
        idx = np.where(targets == c)[0]
        np.random.shuffle(idx)
        chosen.append(idx[:number])
    return np.concatenate(chosen)


@pytest.mark.parametrize(("name", "factor"), CASES)
def test_indices_are_exactly_the_fields(name, factor):
    classes, most = SHAPES[name]
    labels = generated_labels(name)
    found = choose(labels, exponential_counts(most, factor, classes), seed=0)
    np.testing.assert_array_equal(found, ldam_indices(labels, classes, factor))
    assert len(found) == TOTALS[name][factor]


def test_cifar10_counts_at_100():
    assert exponential_counts(5000, 100, 10) == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]


def real_cifar100(tmp_path):
    """A torchvision root with the real files: DIFFULT_CIFAR100, or restored from beside the checkout."""
    if "DIFFULT_CIFAR100" in os.environ:
        return os.environ["DIFFULT_CIFAR100"]
    restore = Path(__file__).resolve().parents[2] / "shared" / "data" / "restore.py"
    if not restore.exists():
        pytest.skip("no real CIFAR-100: set DIFFULT_CIFAR100 to a torchvision root")
    import subprocess
    import sys

    subprocess.run([sys.executable, str(restore), str(tmp_path)], check=True, capture_output=True)
    return str(tmp_path)


def test_real_cifar100(tmp_path):
    from diffult_ray.data.cifar import open_source
    from diffult_ray.data.source import Faults

    root = real_cifar100(tmp_path)
    source = open_source(Dataset(name="cifar100", root=root), Faults())
    labels = source.parts["train"].labels
    assert source.parts["train"].pixels.shape == (50_000, 3, 32, 32)
    assert source.parts["test"].pixels.shape == (10_000, 3, 32, 32)
    assert source.class_names[:2] == ["apple", "aquarium_fish"]
    for factor, total in TOTALS["cifar100"].items():
        found = choose(labels, exponential_counts(500, factor, 100), seed=0)
        np.testing.assert_array_equal(found, ldam_indices(labels, 100, factor))
        assert len(found) == total


def test_step_halves_the_classes():
    assert step_counts(500, 100, 10) == [500] * 5 + [5] * 5
    assert step_counts(500, 100, 5) == [500, 500, 5, 5, 5]


def test_pareto_falls_from_most_to_least():
    counts = pareto_counts(1280, 256, 1000)
    assert (counts[0], counts[-1]) == (1280, 5)
    assert counts == sorted(counts, reverse=True)
    assert sum(counts) < sum(exponential_counts(1280, 256, 1000))
    assert pareto_counts(500, 100, 10)[-1] == 5  # not 4 by rounding


@pytest.mark.parametrize("profile", ["exp", "step", "pareto"])
def test_one_class_keeps_all(profile):
    counts = profile_counts(profile, room=[9], max_per_class=7, imbalance_factor=50)
    assert counts == [7]


def test_natural_takes_what_there_is():
    assert profile_counts("natural", room=[9, 3], max_per_class=None, imbalance_factor=9) == [9, 3]
    assert profile_counts("natural", room=[9, 3], max_per_class=5, imbalance_factor=9) == [5, 3]


@pytest.mark.parametrize(("profile", "most"), [("zipf", 5), ("exp", None)])
def test_unknown_profile(profile, most):
    with pytest.raises(ValueError, match="profile is one of"):
        profile_counts(profile, room=[9, 3], max_per_class=most, imbalance_factor=2)


def test_choose_refuses_more_than_there_is():
    with pytest.raises(ValueError, match="class 1 has 2 images, 3 asked for"):
        choose(np.array([0, 1, 0, 1]), [1, 3], seed=0)


def test_shuffled_ignores_labels_below_zero():
    labels = np.array([1, -1, 0, 1, -1, 0, 1])
    orders = longtail.shuffled(labels, 2, seed=3)
    assert [sorted(o.tolist()) for o in orders] == [[2, 5], [0, 3, 6]]
