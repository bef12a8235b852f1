"""scikit-learn's digits: 1,797 real 8x8 grey images in 10 classes, at hand without a download."""

import numpy as np

TEST_PER_CLASS = 50


def load() -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Images [1797, 1, 8, 8] uint8 (the set's 0..16 stretched to 0..255), labels [1797], names."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * (255.0 / 16.0)).astype(np.uint8)
    return images[:, None], digits.target.astype(np.int64), [str(d) for d in range(10)]
