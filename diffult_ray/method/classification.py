"""The classifier's losses, what they know of classes, mixup, copies, and what is measured of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from diffult_ray.seeds import stream

ShotGroup = Literal["many", "medium", "few"]
SHOT_GROUPS: tuple[ShotGroup, ...] = ("many", "medium", "few")
Normalisation = Literal["weight", "count"]
DRW_BETA = 0.9999  # of LDAM-DRW's public code
CALIBRATION_BINS = 15  # Guo et al., arXiv 1706.04599


def divisor(weights: Tensor, normalise: Normalisation) -> Tensor:
    """What a batch's sum of weighted losses is divided by: its weight, or its number of images.

    DiffuLT's loss has w = 1 for a real image and omega for a synthetic one; the sources do not say how it
    is normalised, and the option is ours. A batch whose weights are all zero has loss zero.

    Args:
        weights: [n] floats, not negative.

    Returns:
        a number above zero, on the weights' device.
    """
    if normalise == "count":
        return torch.tensor(float(max(1, len(weights))), dtype=weights.dtype, device=weights.device)
    return weights.sum().clamp_min(torch.finfo(weights.dtype).tiny)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """[n] cross-entropies of logits [n, C], of which half precisions are raised to float32."""
    return F.cross_entropy(_at_least_single(logits), targets, reduction="none")


def balanced_softmax_loss(logits: Tensor, targets: Tensor, log_prior: Tensor) -> Tensor:
    """-log( n_y e^{z_y} / sum_c n_c e^{z_c} ): Ren et al., NeurIPS 2020, arXiv 2007.10740.

    The network is trained behind the prior of its training set and used without it, which is right
    for balanced classes.

    Args:
        logits: [n, C].
        targets: [n] classes, each of which has images.
        log_prior: [C] log n_c up to a constant; -inf for a class without images.

    Returns:
        [n] losses, in nats.
    """
    logits = _at_least_single(logits)
    return F.cross_entropy(logits + log_prior.to(logits), targets, reduction="none")


def ldam_loss(logits: Tensor, targets: Tensor, margins: Tensor, scale: float) -> Tensor:
    """-log( e^{z_y - s m_y} / (e^{z_y - s m_y} + sum_{c != y} e^{z_c}) ), z = s cos(w_c, f): Cao et al.,
    NeurIPS 2019, arXiv 1906.07413, with the scale s of its public code.

    Args:
        logits: [n, C] cosines times `scale`, as `NormedLinear` makes them.
        targets: [n] classes.
        margins: [C] m, in cosines.
        scale: s.

    Returns:
        [n] losses, in nats.
    """
    logits = _at_least_single(logits)
    shift = scale * F.one_hot(targets, logits.shape[1]) * margins.to(logits)
    return F.cross_entropy(logits - shift, targets, reduction="none")


def _at_least_single(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


# --- by class: weights, priors, margins ---------------------------------------------------------
#
# All are made from the images of each class that are trained on. A synthetic image counts as much as
# its loss does, omega: then weights balance exactly, and the prior is the one that the weighted loss
# sees. The sources know no synthetic images; that choice is ours.


def class_sizes(labels: Tensor, weights: Tensor, num_classes: int) -> Tensor:
    """[C] float64 on the CPU, whose sums have one order: the weight of each class's images, which is
    their number where none is synthetic.

    Args:
        labels: [n] classes.
        weights: [n], 1 for a real image and omega for a synthetic one.
    """
    return torch.bincount(labels.cpu(), weights=weights.cpu().double(), minlength=num_classes)


def class_weights(counts: Tensor | list[int]) -> Tensor:
    """[C] float64 weights of baseline `reweight`: inverse frequency, mean 1 over the samples.

    Args:
        counts: [C] training images, or their sizes; a class without any has weight zero.

    Raises:
        ValueError: no images at all.
    """
    numbers, present = _sizes(counts)
    weight = numbers[present].sum() / (present.sum() * numbers)
    return torch.where(present, weight, 0.0)


def drw_weights(counts: Tensor | list[int], beta: float = DRW_BETA) -> Tensor:
    """[C] float64: (1 - beta) / (1 - beta^n_c), of mean 1 over the classes that have images.

    The effective number of samples (Cui et al., CVPR 2019, arXiv 1901.05555) as the
    deferred re-weighting of LDAM-DRW (Cao et al., 2019) uses it from 80% of the training on.

    Args:
        counts: [C] training images, or their sizes; a class without any has weight zero.
        beta: 0 weighs all alike, 1 would weigh by inverse frequency.

    Raises:
        ValueError: no images at all, or beta outside [0, 1).
    """
    if not 0 <= beta < 1:
        raise ValueError(f"beta is at least 0 and below 1, not {beta}")
    numbers, present = _sizes(counts)
    weight = (1 - beta) / (1 - beta**numbers)
    weight = torch.where(present, weight, 0.0)
    return weight * present.sum() / weight.sum()


def ldam_margins(counts: Tensor | list[int], max_margin: float = 0.5) -> Tensor:
    """[C] float64 margins, proportional to n_c^(-1/4), the largest of which is `max_margin`.

    Cao et al., 2019, and its public code.

    Args:
        counts: [C] training images, or their sizes; a class without any has margin zero.

    Raises:
        ValueError: no images at all.
    """
    numbers, present = _sizes(counts)
    margin = torch.where(present, numbers**-0.25, 0.0)
    return margin * (max_margin / margin.max())


def log_prior(counts: Tensor | list[int]) -> Tensor:
    """[C] float64: log n_c / n; -inf for a class without images.

    Raises:
        ValueError: no images at all.
    """
    numbers, present = _sizes(counts)
    return torch.where(present, (numbers / numbers[present].sum()).log(), -torch.inf)


def _sizes(counts: Tensor | list[int]) -> tuple[Tensor, Tensor]:
    """[C] float64 sizes with 1 in place of zero, and which are not zero.

    Raises:
        ValueError: if all are zero.
    """
    numbers = torch.as_tensor(counts, dtype=torch.float64)
    present = numbers > 0
    if not bool(present.any()):
        raise ValueError("class weights need at least one training image")
    return torch.where(present, numbers, 1.0), present


# --- mixup --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mixing:
    """How a batch of n images is mixed: image i with image `partner[i]` of the same batch.

    share: of image i, lambda; its partner has 1 - lambda.
    partner: [n] int64 on the CPU, a permutation of the batch.
    """

    share: float
    partner: Tensor


def draw_mixing(alpha: float, n: int, seed: int, step: int) -> Mixing:
    """lambda ~ Beta(alpha, alpha), one a batch as in the public code, and the partners.

    Both are those of the whole batch, from a stream of seed and step: they depend neither on the
    device nor on how many workers share the batch.

    Raises:
        ValueError: if alpha is not above zero.
    """
    if not alpha > 0:
        raise ValueError(f"alpha is above 0, not {alpha}")
    rng = np.random.default_rng(stream(seed, "mixup", step))
    share = float(rng.beta(alpha, alpha))
    return Mixing(share, torch.from_numpy(rng.permutation(n)))


def mixup(x: Tensor, partner: Tensor, share: float) -> Tensor:
    """lambda x + (1 - lambda) x': Zhang et al., ICLR 2018, arXiv 1710.09412.

    Args:
        x: [n, ...] floats.
        partner: of the same shape, what each is mixed with.
        share: lambda in [0, 1].
    """
    return torch.lerp(partner, x, share)


# --- copies -------------------------------------------------------------------------------------


def oversample_indices(
    labels: Tensor,
    target_per_class: int,
    seed: int,
    *,
    num_classes: int | None = None,
    beside: Sequence[int] | None = None,
) -> Tensor:
    """The count-matched control: copies of real images that fill each class up to N_t.

    A class's images are copied in turn, in an order that seed and class decide, so that no image
    has two copies more than another of its class.

    Args:
        labels: [n] of the real images.
        target_per_class: N_t; a class that has as many or more gets none.
        seed: of the order.
        num_classes: C; by default the largest label and one.
        beside: [C] other images of each class, such as synthetic ones, that count towards N_t.

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
        there = len(members) + (beside[label] if beside is not None else 0)
        copies.append(np.resize(order, max(0, target_per_class - there)))
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
