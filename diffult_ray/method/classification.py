"""The classifier's loss, its baselines' weights and copies, and what is measured of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from diffult_ray.seeds import stream

ShotGroup = Literal["many", "medium", "few"]
SHOT_GROUPS: tuple[ShotGroup, ...] = ("many", "medium", "few")
CALIBRATION_BINS = 15  # Guo et al., arXiv 1706.04599


def weighted_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor,
    *,
    normalise: Literal["weight", "count"] = "weight",
) -> Tensor:
    """sum_i w_i CE_i / sum_i w_i, or / n: DiffuLT's loss with w = 1 for a real image, omega for a
    synthetic one. The sources do not say how it is normalised; the option is ours.

    A batch whose weights are all zero has loss zero.

    Args:
        logits: [n, C]; half precisions are raised to float32.
        targets: [n] classes.
        weights: [n], not negative.
        normalise: by the batch's weight or by its number of images.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    weights = weights.to(logits.dtype)
    total = (weights * F.cross_entropy(logits, targets, reduction="none")).sum()
    if normalise == "count":
        return total / max(1, len(targets))
    return total / weights.sum().clamp_min(torch.finfo(logits.dtype).tiny)


def class_weights(counts: Tensor | list[int]) -> Tensor:
    """[C] float64 weights of baseline `reweight`: inverse frequency, mean 1 over the samples.

    Args:
        counts: [C] training images; a class without any has weight zero.

    Raises:
        ValueError: no images at all.
    """
    numbers = torch.as_tensor(counts, dtype=torch.float64)
    present = numbers > 0
    if not bool(present.any()):
        raise ValueError("class weights need at least one training image")
    weight = numbers.sum() / (present.sum() * numbers.clamp_min(1))
    return torch.where(present, weight, 0.0)


def oversample_indices(
    labels: Tensor, target_per_class: int, seed: int, *, num_classes: int | None = None
) -> Tensor:
    """The count-matched control: copies of real images that fill each class up to N_t.

    A class's images are copied in turn, in an order that seed and class decide, so that no image
    has two copies more than another of its class.

    Args:
        labels: [n] of the real images.
        target_per_class: N_t; a class that has as many or more gets none.
        seed: of the order.
        num_classes: C; by default the largest label and one.

    Returns:
        [k] int64 indices into the real images, class by class: the extra copies only.

    Raises:
        ValueError: a class without images.
    """
    known = labels.cpu().numpy()
    classes = num_classes if num_classes is not None else int(known.max()) + 1
    copies = []
    for label in range(classes):
        members = np.flatnonzero(known == label)
        if len(members) == 0:
            raise ValueError(f"class {label} has no real image to copy")
        order = np.random.default_rng(stream(seed, "oversample", label)).permutation(members)
        copies.append(np.resize(order, max(0, target_per_class - len(members))))
    return torch.from_numpy(np.concatenate(copies)).to(torch.int64)


def shot_groups(counts: Tensor | list[int]) -> list[ShotGroup]:
    """The group of each class by its training images: many > 100, few < 20, medium the rest."""
    numbers = torch.as_tensor(counts).tolist()
    return ["many" if n > 100 else "few" if n < 20 else "medium" for n in numbers]


def accuracies(
    predicted: Tensor, targets: Tensor, *, train_counts: Tensor | list[int]
) -> dict[str, float | None | list[float | None]]:
    """Top-1 accuracies in percent.

    Args:
        predicted: [n] classes.
        targets: [n] classes.
        train_counts: [C] training images, which decide a class's shot group.

    Returns:
        accuracy; balanced_accuracy, the mean of the classes' accuracies; accuracy_many,
        accuracy_medium, accuracy_few, the same over a group's classes (None for an empty group);
        per_class_accuracy, [C] (None for a class without test images).

    Raises:
        ValueError: no test images, or a different number of predictions.
    """
    if len(targets) == 0 or predicted.shape != targets.shape:
        raise ValueError(f"{tuple(predicted.shape)} predictions of {tuple(targets.shape)} targets")
    right = (predicted == targets).double()
    groups = shot_groups(train_counts)
    seen = torch.bincount(targets, minlength=len(groups)).tolist()
    hits = torch.bincount(targets, weights=right, minlength=len(groups)).tolist()
    if len(seen) > len(groups):
        raise ValueError(f"target {len(seen) - 1} with {len(groups)} classes of training counts")
    per_class = [100.0 * h / n if n else None for h, n in zip(hits, seen, strict=True)]
    by_group = {
        f"accuracy_{group}": _mean(a for a, g in zip(per_class, groups, strict=True) if g == group)
        for group in SHOT_GROUPS
    }
    return {
        "accuracy": 100.0 * float(right.mean()),
        "balanced_accuracy": _mean(per_class),
        **by_group,
        "per_class_accuracy": per_class,
    }


def calibration(probabilities: Tensor, targets: Tensor) -> dict[str, float]:
    """Negative log-likelihood and expected calibration error (Guo et al., arXiv 1706.04599).

    Bins are [low, high), the last one closed: confidences of exactly 1 fall in it (torchmetrics
    gives them a sixteenth).

    Args:
        probabilities: [n, C], rows that add up to 1.
        targets: [n] classes.

    Returns:
        nll: mean, in nats; a probability of zero counts as its type's smallest normal number.
        ece: in percent, of the top-1 confidence in 15 bins of equal width.

    Raises:
        ValueError: no images, shapes that do not fit, or rows that are not probabilities.
    """
    if probabilities.ndim != 2 or targets.shape != probabilities.shape[:1] or len(targets) == 0:
        shapes = f"{tuple(probabilities.shape)} and {tuple(targets.shape)}"
        raise ValueError(f"probabilities are [n, C] and targets [n], n > 0, got {shapes}")
    exact = probabilities.double()
    off = (exact.sum(dim=1) - 1).abs().max()
    if not (bool(exact.min() >= 0) and bool(off < 0.02)):  # bfloat16 rows add up to 1 +- 0.01
        raise ValueError("rows of probabilities are not negative and add up to 1: are they logits?")
    likelihood = exact.gather(1, targets[:, None]).clamp_min(torch.finfo(probabilities.dtype).tiny)
    confidence, top = exact.max(dim=1)
    return {
        "nll": float(-likelihood.log().mean()),
        "ece": 100.0 * _calibration_error(confidence, (top == targets).double()),
    }


def _calibration_error(confidence: Tensor, right: Tensor) -> float:
    """sum over bins of |sum of (right - confidence)| / n, which is share times gap of the means."""
    bins = CALIBRATION_BINS
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=confidence.device)
    index = (torch.bucketize(confidence, edges, right=True) - 1).clamp(max=bins - 1)
    gaps = torch.bincount(index, weights=right - confidence, minlength=bins)
    return float(gaps.abs().sum()) / len(confidence)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None
