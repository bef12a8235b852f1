"""The head of a long-tailed set, and a share of it: DiffuLT's p_h (Shao et al., 2024).

The paper trains its generator on the tail and 0, 40, 80 or 100% of the head's images. Which images
those are is not documented; ours are the first of each class in the split's shuffled order, so that
a smaller share is a part of a larger one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from diffult_ray.errors import BadInput
from diffult_ray.method.classification import shot_groups


def head_classes(counts: Sequence[int]) -> list[int]:
    """The many-shot classes (more than 100 training images); without one, the largest third (ours).

    Of equal counts the class with the lower label comes first.

    >>> head_classes([120, 101, 100, 5]), head_classes([9, 8, 7, 6, 5, 4, 3])
    ([0, 1], [0, 1])
    """
    many = [c for c, group in enumerate(shot_groups(list(counts))) if group == "many"]
    order = sorted(range(len(counts)), key=lambda c: (-counts[c], c))
    return many or sorted(order[: len(counts) // 3])


def head_subset(labels: np.ndarray, num_classes: int, share: float) -> np.ndarray:
    """Indices, ascending, of all images but those of head classes beyond a share of each.

    Args:
        labels: [n] training labels; a class's images are taken in this order.
        share: of each head class's images, rounded to whole ones, a half up.

    Raises:
        BadInput: if no image is left, where every class is a head class.
    """
    keep = np.ones(len(labels), dtype=bool)
    counts = np.bincount(labels, minlength=num_classes).tolist()
    for c in head_classes(counts):
        keep[np.flatnonzero(labels == c)[int(share * counts[c] + 0.5) :]] = False
    if not keep.any():
        raise BadInput(
            where="generator.head_share", rule="leaves no image: every class is a head class", value=share,
            advice="raise it",
        )
    return np.flatnonzero(keep)
