"""Long-tailed profiles, and the field's choice of images (LDAM-DRW's public code)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

PROFILES = ("exp", "step", "pareto", "natural")
PARETO_POWER = 6.0  # of ImageNet-LT (Liu et al., 2019)


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


def step_counts(max_per_class: int, imbalance_factor: float, num_classes: int) -> list[int]:
    """n_max for the first half of the classes, int(n_max / IF) for the rest (Buda et al., 2018).

    >>> step_counts(500, 100, 5)
    [500, 500, 5, 5, 5]
    """
    head = num_classes // 2 if num_classes > 1 else 1
    return [max_per_class] * head + [int(max_per_class * (1.0 / imbalance_factor))] * (num_classes - head)


def pareto_counts(max_per_class: int, imbalance_factor: float, num_classes: int) -> list[int]:
    """Images a class on a truncated Pareto curve of power 6, from n_max down to n_max / IF.

    n_c = int(n_max * (1 + (IF^(1/6) - 1) c / (C - 1))^-6). ImageNet-LT drew its counts from a Pareto
    distribution of this power; the deterministic curve between two ends is ours.

    >>> pareto_counts(1280, 256, 5)
    [1280, 185, 43, 13, 5]
    """
    if num_classes == 1:
        return [max_per_class]
    reach = imbalance_factor ** (1 / PARETO_POWER) - 1
    curve = [(1 + reach * c / (num_classes - 1)) ** -PARETO_POWER for c in range(num_classes)]
    return [int(max_per_class * share + 1e-9) for share in curve]


def natural_counts(room: Sequence[int], max_per_class: int | None) -> list[int]:
    """All images of a class, or `max_per_class` of them."""
    return [int(n) if max_per_class is None else min(int(n), max_per_class) for n in room]


def profile_counts(
    profile: str, *, room: Sequence[int], max_per_class: int | None, imbalance_factor: float
) -> list[int]:
    """Training images a class by profile; may exceed `room`, the images that there are.

    Raises:
        ValueError: for an unknown profile, or one without its `max_per_class`.
    """
    if profile == "natural":
        return natural_counts(room, max_per_class)
    curves = {"exp": exponential_counts, "step": step_counts, "pareto": pareto_counts}
    if profile not in curves or max_per_class is None:
        raise ValueError(f"profile is one of {PROFILES} with max_per_class, not {profile!r}")
    return curves[profile](max_per_class, imbalance_factor, len(room))


def choose(labels: np.ndarray, counts: Sequence[int], seed: int) -> np.ndarray:
    """Indices of the long-tailed subset, class by class.

    `np.random.seed(seed)` once, then for each class ascending a shuffle of its indices in the
    source's order, of which the first n_c are taken: the field's split for seed 0.

    Args:
        labels: [n] integer labels in the source's order.
        counts: images to take a class.

    Raises:
        ValueError: if a class has fewer images than asked for.
    """
    orders = shuffled(labels, len(counts), seed)
    for c, (order, count) in enumerate(zip(orders, counts, strict=True)):
        if len(order) < count:
            raise ValueError(f"class {c} has {len(order)} images, {count} asked for")
    return np.concatenate([order[:count] for order, count in zip(orders, counts, strict=True)])


def shuffled(labels: np.ndarray, classes: int, seed: int) -> list[np.ndarray]:
    """Each class's indices in the order in which `choose` takes them."""
    rng = np.random.RandomState(seed)
    grouped = np.split(np.argsort(labels, kind="stable"), np.searchsorted(np.sort(labels), range(classes)))
    orders = grouped[1:]  # the first are labels below 0
    for order in orders:
        rng.shuffle(order)
    return orders
