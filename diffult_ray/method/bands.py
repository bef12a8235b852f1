"""Bands: how far a generated image lies from the real images of its class, in units of d_f.

DiffuLT (Shao et al., arXiv 2403.05170), as its readers describe it. In the extractor's feature
space, d_f is the largest distance between two real samples of a class and d the distance of a
generated sample to the class's centre: ID has d <= d_f, AID d_f < d <= 2 d_f, OOD d > 2 d_f.

Open in the sources, so options of ours: d_f per class or global, distance to the centre or to the
nearest real sample, features L2-normalised or not, which bands to keep.

Distances are float64. Pairs are searched by matrix products in blocks of bounded memory; the
distance of the pair that was found is then taken from its difference, so that it is exact, zero
for identical samples, and the same whatever the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

BANDS = ("ID", "AID", "OOD")
_BLOCK_NUMBERS = 2**22  # of a block: 32 MiB in float64
_GROUP = 128  # most columns of a block that are compared one by one
_TIE = 1e-13  # rounding of a float64 dot product, relative to the squared norms


@dataclass(frozen=True)
class ClassStatistics:
    """What a distance in units of d_f needs to know of the real samples.

    Attributes:
        centre: [C, d] float64, mean of the class's features.
        scale: [C] float64 and positive, d_f.
        normalise: whether both were taken over L2-normalised features, as distances then are.
    """

    centre: Tensor
    scale: Tensor
    normalise: bool


def class_statistics(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    normalise: bool,
    scope: Literal["class", "global"],
) -> ClassStatistics:
    """Centre and d_f of each class.

    Ours, where the sources are silent: the global d_f is the largest of the classes' d_f (a
    distance across classes would call nearly everything ID); a class whose d_f is zero (one real
    image, copies of one, or none) takes the median d_f of the others; the centre of a class
    without real images is the mean of all features; a centre of normalised features is their
    plain mean.

    Args:
        features: [n, d] real samples.
        labels: [n] their classes.
        num_classes: C.
        normalise: whether to L2-normalise the features first.
        scope: of d_f.

    Raises:
        ValueError: features that are not finite, labels outside the C classes, or no class with
            two different samples.
    """
    _check(features, labels, num_classes)
    if not bool(torch.isfinite(features).all()):
        raise ValueError("real features are not finite: did the extractor's training diverge?")
    centre = features.new_zeros((num_classes, features.shape[1]), dtype=torch.float64)
    diameter = centre.new_zeros(num_classes)
    for label in range(num_classes):
        points = _points(features[labels == label], normalise)
        if len(points) == 0:
            points = _points(features, normalise)
        else:
            diameter[label] = _diameter(points)
        centre[label] = points.mean(dim=0)
    return ClassStatistics(centre=centre, scale=_scale(diameter, scope), normalise=normalise)


def nearest_real(
    features: Tensor, labels: Tensor, real_features: Tensor, real_labels: Tensor
) -> tuple[Tensor, Tensor]:
    """The nearest real sample of the same class; of all classes where the class has none (ours).

    The first of several equally near ones (copies in the real set) is taken, whatever the batch.

    Args:
        features: [m, d].
        labels: [m].
        real_features: [n, d].
        real_labels: [n].

    Returns:
        [m] int64 index into the real set, and [m] float64 distance in the features' own units.

    Raises:
        ValueError: shapes that do not fit, or no real sample at all.
    """
    _check(features, labels)
    _check(real_features, real_labels)
    if len(real_features) == 0:
        raise ValueError("no real samples to be near to")
    index = torch.zeros(len(features), dtype=torch.int64, device=features.device)
    distance = torch.zeros(len(features), dtype=torch.float64, device=features.device)
    for label in labels.unique():
        asked = (labels == label).nonzero().squeeze(1)
        candidates = (real_labels == label).nonzero().squeeze(1)
        if len(candidates) == 0:
            candidates = torch.arange(len(real_labels), device=real_labels.device)
        nearest, distance[asked] = _nearest(features[asked], real_features[candidates].double())
        index[asked] = candidates[nearest]
    return index, distance


def nearest_other(features: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest other sample of each: [n] int64 index and [n] float64 distance, 0 for a copy.

    Args:
        features: [n, d].

    Raises:
        ValueError: fewer than two samples.
    """
    if len(features) < 2:
        raise ValueError(f"another sample needs two samples or more, got {len(features)}")
    points = features.double()
    points = points - points.mean(dim=0)
    squares = points.square().sum(dim=1)
    index = torch.zeros(len(points), dtype=torch.int64, device=points.device)
    for rows in torch.arange(len(points), device=points.device).split(_block_rows(points)):
        squared = torch.addmm(squares, points[rows], points.T, alpha=-2)
        squared[torch.arange(len(rows), device=points.device), rows] = torch.inf
        index[rows] = squared.argmin(dim=1)
    return index, (points - points[index]).norm(dim=1)


def closeness(features: Tensor, real_features: Tensor, spacing: Tensor) -> tuple[Tensor, Tensor]:
    """How near a sample is to a training image, in units of how near training images are to each other.

    A memorisation measure (ours) over all classes together, so that a class of one image has it too.
    With t the training image nearest to a sample x, and t' the training image nearest to t, the ratio
    is d(x, t) / d(t, t'); x counts as memorised where it is below 1: x is nearer to t than any other
    training image is. A copy of t has 0, also where the training set holds t twice.

    A good generator's share is not 0: a fresh sample and its nearest training image are often each
    other's nearest. `expected_share` says how often that is so among the training images.

    Args:
        features: [m, d] samples.
        real_features: [n, d] training images.
        spacing: [n] distance of each training image to the nearest other one.

    Returns:
        [m] int64 index of t, and [m] float64 ratio, infinite beside a training image that has a copy.
    """
    real_labels = torch.zeros(len(real_features), dtype=torch.int64, device=real_features.device)
    labels = torch.zeros(len(features), dtype=torch.int64, device=features.device)
    index, distance = nearest_real(features, labels, real_features, real_labels)
    return index, torch.where(distance == 0, 0.0, distance / spacing[index])


def expected_share(index: Tensor, distance: Tensor) -> float:
    """The memorised share of fresh draws, as the training images have it among themselves.

    Each in turn is left out, and compared with the others as a sample is: it counts where it is the
    nearest of its nearest, or a copy.

    Args:
        index: [n], distance: [n], of `nearest_other`.
    """
    mutual = index[index] == torch.arange(len(index), device=index.device)
    return float((mutual | (distance == 0)).double().mean())


def distances(
    features: Tensor,
    labels: Tensor,
    statistics: ClassStatistics,
    *,
    to: Literal["centre", "nearest"],
    real_features: Tensor | None = None,
    real_labels: Tensor | None = None,
) -> Tensor:
    """Distance of each sample to its class, in units of d_f.

    Args:
        features: [m, d] as the extractor gives them; normalised here if the statistics are.
        labels: [m].
        statistics: of the real samples.
        to: the class's centre, or its nearest real sample (then give the real ones).
        real_features: [n, d], real_labels: [n].

    Returns:
        [m] float64. Store it so: a band's edge does not survive rounding to float32.
    """
    _check(features, labels, len(statistics.scale))
    points = _points(features, statistics.normalise)
    if to == "centre":
        distance = (points - statistics.centre[labels]).norm(dim=1)
    elif real_features is None or real_labels is None:
        raise ValueError("distance to the nearest real sample needs real_features and real_labels")
    else:
        real = _points(real_features, statistics.normalise)
        distance = nearest_real(points, labels, real, real_labels)[1]
    return distance / statistics.scale[labels]


def band(distance: Tensor) -> Tensor:
    """[m] int8, an index into BANDS: 0 ID (d <= 1), 1 AID (1 < d <= 2), 2 OOD (d > 2, or NaN).

    Args:
        distance: [m] in units of d_f.
    """
    return (2 - (distance <= 1).to(torch.int8) - (distance <= 2).to(torch.int8)).to(torch.int8)


def keep(
    distance: Tensor,
    band: Tensor,
    *,
    threshold: float | None = None,
    bands: tuple[str, ...] | None = None,
    agrees: Tensor | None = None,
) -> Tensor:
    """The filter: [m] bool, by threshold or by bands. The paper drops OOD: threshold 2.

    The second filter, by the extractor's agreement with the label, is ours.

    Args:
        distance: [m] in units of d_f.
        band: [m] codes.
        threshold: keep distance <= threshold; infinity keeps all.
        bands: names out of BANDS; keep these.
        agrees: [m] bool, whether the extractor predicts the label; keep these only, if given.

    Raises:
        ValueError: both or neither given, an unknown band, or an `agrees` of another length.
    """
    if (threshold is None) == (bands is None):
        raise ValueError("exactly one of threshold and bands")
    if agrees is not None and agrees.shape != distance.shape:
        raise ValueError(f"agrees is [m], got {tuple(agrees.shape)} for {len(distance)} distances")
    if threshold is not None:
        kept = distance <= threshold
    else:
        codes = [BANDS.index(name) for name in bands or ()]
        kept = torch.isin(band, torch.tensor(codes, dtype=band.dtype, device=band.device))
    return kept if agrees is None else kept & agrees


def _check(features: Tensor, labels: Tensor, num_classes: int | None = None) -> None:
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        shapes = f"{tuple(features.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"features are [n, d] and labels [n], got {shapes}")
    if num_classes is None or len(labels) == 0:
        return
    if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        raise ValueError(f"labels are 0 to {num_classes - 1}, got {labels.min()} to {labels.max()}")


def _points(features: Tensor, normalise: bool) -> Tensor:
    points = features.double()
    return F.normalize(points, dim=1) if normalise else points


def _scale(diameter: Tensor, scope: Literal["class", "global"]) -> Tensor:
    known = diameter[diameter > 0]
    if len(known) == 0:
        raise ValueError("d_f is undefined: no class has two different real samples")
    if scope == "global":
        return known.max().expand_as(diameter).clone()
    return torch.where(diameter > 0, diameter, known.quantile(0.5))


def _block_rows(points: Tensor) -> int:
    return max(1, _BLOCK_NUMBERS // max(points.shape))


def _diameter(points: Tensor) -> Tensor:
    """Largest distance between two rows of points [n, d]."""
    points = points - points.mean(dim=0)  # |a|^2 + |b|^2 - 2ab cancels where the norms are large
    squares = points.square().sum(dim=1)
    largest = points.new_zeros(())
    for rows in torch.arange(len(points), device=points.device).split(_block_rows(points)):
        squared = torch.addmm(squares, points[rows], points.T, alpha=-2).add_(squares[rows, None])
        row, column = divmod(int(squared.argmax()), len(points))
        largest = torch.maximum(largest, (points[rows[row]] - points[column]).norm())
    return largest


def _nearest(points: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Index and distance of the nearest of real [n, d], float64, for each of points [m, d].

    A block of products is read once, for the least of each group of columns: the nearest is looked for in
    the first group that may have it.
    """
    groups = -(-len(real) // _GROUP)
    width = -(-len(real) // groups)
    centre = real.mean(dim=0)
    real = real - centre
    squares = real.square().sum(dim=1, keepdim=True)
    # With (-2 point, 1) the product is |real|^2 - 2 real point; |point|^2 changes no minimum.
    table = real.new_zeros(groups * width, real.shape[1] + 1)
    table[:, -1] = torch.inf  # of the rows that fill the last group
    table[: len(real)] = torch.cat([real, squares], dim=1)
    blocks = points.split(_block_rows(table))
    room = table.new_empty(len(blocks[0]), len(table))
    found = []
    for part in blocks:
        block = part.double() - centre
        asked = torch.cat([-2 * block, block.new_ones(len(block), 1)], dim=1)
        squared = torch.matmul(asked, table.T, out=room[: len(block)]).view(-1, groups, width)
        least = squared.amin(dim=2)
        rounding = _TIE * (block.square().sum(dim=1, keepdim=True) + squares.max())
        edge = least.amin(dim=1, keepdim=True) + rounding
        group = (least <= edge).byte().argmax(dim=1)
        one_each = torch.arange(len(block), device=block.device)
        nearest = group * width + (squared[one_each, group] <= edge).byte().argmax(dim=1)
        found.append((nearest, (block - real[nearest]).norm(dim=1)))
    indices, distances = zip(*found, strict=True)
    return torch.cat(indices), torch.cat(distances)
