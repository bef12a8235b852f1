"""scikit-learn's digits: 1,797 real 8x8 grey images in 10 classes, at hand without a download."""

from __future__ import annotations

from typing import Any

import numpy as np

from diffult_ray.data.source import Faults, Records, Source

TEST_PER_CLASS = 50
FINGERPRINT = "scikit-learn digits"


def load() -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Images [1797, 1, 8, 8] uint8 (the set's 0..16 stretched to 0..255), labels [1797], names."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * (255.0 / 16.0)).astype(np.uint8)
    return images[:, None], digits.target.astype(np.int64), [str(d) for d in range(10)]


def identity(config: Any) -> str:
    """The set never changes."""
    return FINGERPRINT


def open_source(config: Any, faults: Faults) -> Source:
    """All images as one part: test and validation are held out of it."""
    images, labels, names = load()
    return Source(
        name="digits",
        class_names=names,
        parts={"train": Records(labels, pixels=images)},
        fingerprint=FINGERPRINT,
        test_per_class=TEST_PER_CLASS,
    )
