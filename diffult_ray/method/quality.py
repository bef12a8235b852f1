"""FID and Inception Score, streamed in float64; KID, precision and recall of a bounded sample.

The first two keep sums that workers gather apart and that are merged afterwards, so that no one ever
holds all features. A state goes through a file or a table row as plain arrays. The others compare
images with images, so that they are of a sample, in blocks of bounded memory. Whose features and
logits they are (Inception's or a reference classifier's) is the caller's business.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from torch import Tensor

Array = NDArray[np.float64]
ENOUGH = 2  # samples a dimension under which a FID is too much a matter of their number to be trusted
_BLOCK_NUMBERS = 2**20  # of a block of pairs: 8 MiB, which caches hold
_SHARED_PAIR = 1.8  # cost of a pair that all subsets share, over that of one in a subset of its own


class Moments:
    """Mean and covariance of features that come in batches (Chan, Golub, LeVeque 1983)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Array = np.zeros(0)
        self.scatter: Array = np.zeros((0, 0))  # sum of outer products about the mean

    def update(self, features: Tensor | Array) -> None:
        """Adds a batch of features [n, d].

        Raises:
            ValueError: not [n, d] with the d of earlier batches, or not finite.
        """
        values = _finite(features, "features")
        if len(values) == 0:
            return
        batch = Moments()
        batch.count, batch.mean = len(values), values.mean(axis=0)
        deviations = values - batch.mean
        batch.scatter = deviations.T @ deviations
        self.merge(batch)

    def merge(self, other: Moments) -> None:
        """Adds what another one has gathered. Raises ValueError where the d differ."""
        if other.count == 0:
            return
        if self.count == 0:
            self.count, self.mean, self.scatter = other.count, other.mean, other.scatter
            return
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"features of {len(self.mean)} and of {len(other.mean)} dimensions")
        total, delta = self.count + other.count, other.mean - self.mean
        between = np.outer(delta, delta) * (self.count * other.count / total)
        self.scatter = self.scatter + other.scatter + between
        self.mean = self.mean + delta * (other.count / total)
        self.count = total

    @property
    def covariance(self) -> Array:
        """[d, d], unbiased (divided by n - 1), as np.cov and torch-fidelity have it.

        Raises:
            ValueError: fewer than two samples, or sums that float64 cannot hold.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs two samples or more, got {self.count}")
        if not (np.isfinite(self.scatter).all() and np.isfinite(self.mean).all()):
            raise ValueError(f"the covariance of {self.count} samples is not finite: features too large")
        return self.scatter / (self.count - 1)

    def to_arrays(self) -> dict[str, NDArray]:
        """count [1] int64, mean [d], scatter [d, d]."""
        return {"count": np.array([self.count]), "mean": self.mean, "scatter": self.scatter}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, ArrayLike]) -> Moments:
        """The inverse of `to_arrays`; a scatter that a table row has flattened will do."""
        moments = cls()
        moments.count = int(np.ravel(arrays["count"])[0])
        moments.mean = np.array(arrays["mean"], dtype=np.float64)
        size = len(moments.mean)
        moments.scatter = _flat(arrays["scatter"]).reshape(size, size)
        return moments


def frechet_distance(a: Moments, b: Moments) -> float:
    """FID: |m_a - m_b|^2 + tr(A + B - 2 (AB)^(1/2)) (Heusel et al., arXiv 1706.08500, eq. 6).

    With factors A = F F', B = G G', the trace of (AB)^(1/2) is the sum of F'G's singular values.
    That needs no square root of a product's eigenvalues, whose rounding a singular covariance
    (fewer images than dimensions) magnifies to the square root of the machine's precision, and no
    epsilon on the diagonal.

    The value is biased upwards where samples are few (Chong and Forsyth, arXiv 1911.07023): under
    `ENOUGH` samples a dimension, say so.

    Raises:
        ValueError: fewer than two samples on a side, features of different dimensions, or a
            covariance that is not finite.
    """
    first, second = a.covariance, b.covariance
    if first.shape != second.shape:
        raise ValueError(f"features of {len(first)} and of {len(second)} dimensions")
    shared = np.linalg.svd(_factor(first).T @ _factor(second), compute_uv=False).sum()
    shift = np.square(a.mean - b.mean).sum()
    return max(0.0, float(shift + np.trace(first) + np.trace(second) - 2 * shared))


class InceptionScore:
    """exp(mean KL(p(y|x) || p(y))), mean and deviation over splits (Salimans et al., 1606.03498).

    An image belongs to split `id % splits`, so that the order of arrival does not matter. The ids'
    remainders must not tell the class: ids that run through the classes in turn would leave a
    split with one class only, and a score of 1. Ids that run through the images of a class first,
    then to the next class, are right.
    """

    def __init__(self, splits: int = 10) -> None:
        if splits < 1:
            raise ValueError(f"splits is 1 or more, got {splits}")
        self.count: NDArray[np.int64] = np.zeros(splits, dtype=np.int64)
        self.negative_entropy: Array = np.zeros(splits)  # sum over images of sum_y p log p
        self.probability: Array = np.zeros((splits, 0))  # sum over images of p

    def update(self, logits: Tensor | Array, ids: Tensor | ArrayLike) -> None:
        """Adds a batch: logits [n, C], ids [n] (non-negative integers).

        Raises:
            ValueError: shapes that do not fit, or logits that are not finite.
        """
        logarithms = _log_softmax(_finite(logits, "logits"))
        split = _numpy(ids).astype(np.int64) % len(self.count)
        if split.shape != logarithms.shape[:1]:
            raise ValueError(f"logits {logarithms.shape} and ids {split.shape} are [n, C] and [n]")
        batch = InceptionScore(len(self.count))
        batch.probability = np.zeros((len(self.count), logarithms.shape[1]))
        np.add.at(batch.count, split, 1)
        np.add.at(batch.probability, split, np.exp(logarithms))
        np.add.at(batch.negative_entropy, split, (np.exp(logarithms) * logarithms).sum(axis=1))
        self.merge(batch)

    def merge(self, other: InceptionScore) -> None:
        """Adds what another one has gathered. Raises ValueError where splits or classes differ."""
        if other.probability.shape[1] == 0:
            return
        if self.probability.shape[1] == 0 and len(self.count) == len(other.count):
            self.probability = np.zeros_like(other.probability)
        if self.probability.shape != other.probability.shape:
            shapes = f"{self.probability.shape} and {other.probability.shape}"
            raise ValueError(f"scores of different splits or classes: {shapes}")
        self.count = self.count + other.count
        self.negative_entropy = self.negative_entropy + other.negative_entropy
        self.probability = self.probability + other.probability

    def result(self) -> tuple[float, float]:
        """(mean, deviation) over the splits; the deviation divides by their number, as is usual.

        Raises:
            ValueError: a split without images.
        """
        if (self.count == 0).any():
            got = f"{int(self.count.sum())} images in {len(self.count)} splits"
            raise ValueError(f"an inception score needs an image in every split, got {got}")
        marginal = self.probability / self.count[:, None]
        logarithm = np.log(np.where(marginal > 0, marginal, 1.0))  # 0 log 0 = 0
        information = self.negative_entropy / self.count - (marginal * logarithm).sum(axis=1)
        scores = np.exp(information)
        return float(scores.mean()), float(scores.std())

    def to_arrays(self) -> dict[str, NDArray]:
        """count [S] int64, negative_entropy [S], probability [S, C]."""
        return {
            "count": self.count,
            "negative_entropy": self.negative_entropy,
            "probability": self.probability,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, ArrayLike]) -> InceptionScore:
        """The inverse of `to_arrays`; probabilities that a table row has flattened will do."""
        count = np.array(arrays["count"], dtype=np.int64)
        score = cls(len(count))
        score.count = count
        score.negative_entropy = np.array(arrays["negative_entropy"], dtype=np.float64)
        flat = _flat(arrays["probability"])
        score.probability = flat.reshape(len(count), len(flat) // len(count))
        return score


def moments_of(features: Tensor | Array, rows: int = 4096) -> Moments:
    """The moments of features [n, d] that are all at hand, `rows` at a time in float64."""
    moments = Moments()
    for start in range(0, len(features), rows):
        moments.update(features[start : start + rows])
    return moments


def kid(
    fake: Tensor | Array,
    real: Tensor | Array,
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 2020,
) -> tuple[float, float]:
    """Kernel Inception Distance, mean and deviation over subsets (Binkowski et al., arXiv 1801.01401).

    The unbiased estimate of the squared maximum mean discrepancy (eq. 4) with the kernel
    (x'y / d + 1)^3, over random subsets of both sides, as torch-fidelity draws them for the same
    seed. It may be slightly below zero where the two sides are alike.

    Args:
        fake: [m, d], real: [n, d].
        subsets: how many.
        subset_size: images of each side in a subset; m or n where those are fewer.

    Raises:
        ValueError: fewer than two samples on a side, or features of different dimensions.
    """
    x, y = _two_sides(fake, real)
    size = min(subset_size, len(x), len(y))
    if size < 2 or subsets < 1:
        raise ValueError(f"KID needs two samples a side or more, got {len(x)} and {len(y)}")
    if size == len(x) == len(y):
        subsets = 1  # the others would be the same
    rng = np.random.RandomState(seed)
    chosen = [
        tuple(rng.choice(len(side), size, replace=False) for side in (x, y)) for _ in range(subsets)
    ]
    if _SHARED_PAIR * (len(x) + len(y)) ** 2 < subsets * (2 * size) ** 2:
        of_x, of_y = np.zeros((subsets, len(x))), np.zeros((subsets, len(y)))
        for (from_x, from_y), in_x, in_y in zip(chosen, of_x, of_y, strict=True):
            in_x[from_x] = in_y[from_y] = 1
        found = _discrepancies(x, y, of_x, of_y, size)
    else:
        every = np.ones((1, size))
        found = np.concatenate([_discrepancies(x[i], y[j], every, every, size) for i, j in chosen])
    return float(found.mean()), float(found.std())


def precision_recall(
    fake: Tensor | Array, real: Tensor | Array, *, neighbours: int = 3
) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al., arXiv 1904.06991, eq. 1 and 2).

    Precision is the share of generated samples within the ball of a real one, whose radius is the
    distance to its k-th nearest other real sample; recall the same with the sides exchanged.

    Args:
        fake: [m, d], real: [n, d].
        neighbours: k.

    Raises:
        ValueError: k or fewer samples on a side, or features of different dimensions.
    """
    x, y = _two_sides(fake, real)
    if neighbours < 1 or min(len(x), len(y)) <= neighbours:
        raise ValueError(
            f"precision and recall of {neighbours} neighbours need more samples a side, "
            f"got {len(x)} and {len(y)}"
        )
    centre = y.mean(axis=0)  # |a|^2 + |b|^2 - 2ab cancels where the norms are large
    x, y = x - centre, y - centre
    return _covered(x, y, _radii(y, neighbours)), _covered(y, x, _radii(x, neighbours))


def _discrepancies(x: Array, y: Array, of_x: Array, of_y: Array, size: int) -> Array:
    """[subsets] the estimate of eq. 4 for subsets of `size` samples of each side, by the masks below."""
    within = _kernel_sums_within(x, of_x) + _kernel_sums_within(y, of_y)
    return within / (size * (size - 1)) - 2 * _kernel_sums(x, y, of_x, of_y) / size**2


def _kernel_sums(a: Array, b: Array, of_a: Array, of_b: Array) -> Array:
    """[subsets] the kernel summed over the pairs of each subset; each pair is computed once for all of them.

    Args:
        a: [m, d], b: [n, d].
        of_a: [subsets, m], of_b: [subsets, n], 1 where a sample belongs to a subset, else 0.
    """
    found, step = np.zeros(len(of_a)), max(1, _BLOCK_NUMBERS // max(1, len(b)))
    for start in range(0, len(a), step):
        rows = slice(start, start + step)
        kernel = _cubic(a[rows] @ b.T / a.shape[1])
        found += np.einsum("sn,sn->s", of_a[:, rows] @ kernel, of_b)
    return found


def _kernel_sums_within(a: Array, of_a: Array, rows: int = 512) -> Array:
    """[subsets] the same over the pairs (i, j) and (j, i) of two different samples of one side."""
    found = np.zeros(len(of_a))
    for start in range(0, len(a), rows):
        own, later = slice(start, start + rows), slice(start + rows, None)
        found += _kernel_sums(a[own], a[own], of_a[:, own], of_a[:, own])
        found -= of_a[:, own] @ _cubic(np.square(a[own]).sum(axis=1) / a.shape[1])
        found += 2 * _kernel_sums(a[own], a[later], of_a[:, own], of_a[:, later])
    return found


def _cubic(products: Array) -> Array:
    kernel = products + 1.0
    return kernel * kernel * kernel  # a power would be a logarithm of every pair


def _two_sides(fake: Tensor | Array, real: Tensor | Array) -> tuple[Array, Array]:
    x, y = _finite(fake, "features"), _finite(real, "features")
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"features of {x.shape[1]} and of {y.shape[1]} dimensions")
    return x, y


def _squared_distances(a: Array, b: Array) -> Iterator[tuple[slice, Array]]:
    """(rows, squared distances [k, n]) of a [m, d] to b [n, d], a block of rows at a time."""
    squares, step = np.square(b).sum(axis=1), max(1, _BLOCK_NUMBERS // len(b))
    for start in range(0, len(a), step):
        rows = slice(start, min(start + step, len(a)))
        block = a[rows]
        yield rows, np.square(block).sum(axis=1)[:, None] + squares - 2 * (block @ b.T)


def _radii(points: Array, neighbours: int) -> Array:
    """[n] squared distance of each point to its k-th nearest other point."""
    radii = np.empty(len(points))
    for rows, squared in _squared_distances(points, points):
        squared[np.arange(len(squared)), np.arange(rows.start, rows.stop)] = -np.inf  # itself comes first
        radii[rows] = np.partition(squared, neighbours, axis=1)[:, neighbours]
    return radii


def _covered(points: Array, centres: Array, radii: Array) -> float:
    """Share of points that lie in the ball of at least one centre."""
    blocks = _squared_distances(points, centres)
    return sum(int((squared <= radii).any(axis=1).sum()) for _, squared in blocks) / len(points)


def balanced_counts(total: int, num_classes: int) -> list[int]:
    """Images a class that add up to `total`; where it does not divide, the first have one more."""
    if total < 0 or num_classes < 1:
        raise ValueError(f"cannot share {total} images out over {num_classes} classes")
    share, rest = divmod(total, num_classes)
    return [share + (label < rest) for label in range(num_classes)]


def _factor(covariance: Array) -> Array:
    """F [d, r] with F F' = covariance, of its numerical rank r."""
    values, vectors = np.linalg.eigh(covariance)
    # what is left of a zero eigenvalue, numpy.linalg.matrix_rank's rule
    present = values > values.max() * len(values) * np.finfo(np.float64).eps
    return vectors[:, present] * np.sqrt(values[present])


def _log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def _numpy(values: Tensor | ArrayLike) -> NDArray:
    return values.detach().cpu().numpy() if hasattr(values, "detach") else np.asarray(values)


def _flat(values: ArrayLike) -> Array:
    """One line of numbers; a nested list column comes out of parquet as an array of arrays."""
    rows = np.asarray(values)
    if rows.dtype == object:
        rows = np.concatenate(rows)
    return np.array(rows, dtype=np.float64).ravel()


def _finite(values: Tensor | ArrayLike, name: str) -> Array:
    """[n, d] float64, checked."""
    if hasattr(values, "detach"):
        values = values.detach().double()  # numpy knows no bfloat16
    array = _numpy(values).astype(np.float64, copy=False)
    if array.ndim != 2 or array.shape[1] == 0:
        raise ValueError(f"{name} are [n, d], got {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} are not finite")
    return array
