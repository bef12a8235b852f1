"""The long-tailed profile of the field and its choice of images (LDAM-DRW's public code)."""

import numpy as np


def exponential_counts(max_per_class: int, imbalance_factor: float, num_classes: int) -> list[int]:
    """Images a class: int(n_max * (1 / IF) ** (c / (C - 1))) in label order (Cui et al., 2019).

    >>> exponential_counts(120, 50, 10)
    [120, 77, 50, 32, 21, 13, 8, 5, 3, 2]
    """
    if num_classes == 1:
        return [max_per_class]
    return [
        int(max_per_class * (1.0 / imbalance_factor) ** (c / (num_classes - 1.0)))
        for c in range(num_classes)
    ]


def choose(labels: np.ndarray, counts: list[int], seed: int) -> np.ndarray:
    """Indices of the long-tailed subset, class by class.

    `np.random.seed(seed)` once, then for each class ascending a shuffle of its indices in the
    source's order, of which the first n_c are taken: the field's split for seed 0.

    Args:
        labels: [n] integer labels in the source's order.
        counts: images to take a class.

    Raises:
        ValueError: if a class has fewer images than asked for.
    """
    rng = np.random.RandomState(seed)
    chosen = []
    for c, count in enumerate(counts):
        indices = np.where(labels == c)[0]
        rng.shuffle(indices)
        if len(indices) < count:
            raise ValueError(f"class {c} has {len(indices)} images, {count} asked for")
        chosen.append(indices[:count])
    return np.concatenate(chosen)
