"""FID and IS against torch-fidelity on the same features, and against literal float64 formulas."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from diffult_ray.method import quality
from diffult_ray.method.quality import (
    InceptionScore,
    Moments,
    balanced_counts,
    frechet_distance,
    kid,
    moments_of,
    precision_recall,
)


def features(n, d, seed, shift=0.0, scale=1.0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) * scale + shift


def moments(values, batch=17):
    whole = Moments()
    for start in range(0, len(values), batch):
        whole.update(values[start : start + batch])
    return whole


def torch_fidelity_fid(a, b):
    one, two = (fid_features_to_statistics(torch.from_numpy(x)) for x in (a, b))
    return fid_statistics_to_metric(one, two, verbose=False)["frechet_inception_distance"]


@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_moments_in_batches_are_numpys_of_the_whole(batch):
    values = features(100, 6, seed=0, shift=1e4)  # naive sums of squares would lose eight digits
    got = moments(values, batch)
    assert got.count == 100
    np.testing.assert_allclose(got.mean, values.mean(0), rtol=1e-14)
    np.testing.assert_allclose(got.covariance, np.cov(values, rowvar=False), rtol=1e-9, atol=1e-9)


def test_moments_of_workers_merge_through_their_arrays():
    values = features(90, 4, seed=0)
    parts = [moments(part) for part in (values[:1], values[1:60], values[:0], values[60:])]
    whole = Moments()
    for part in parts:
        whole.merge(Moments.from_arrays(part.to_arrays()))
    assert whole.count == 90
    np.testing.assert_allclose(whole.covariance, np.cov(values, rowvar=False), rtol=1e-11)
    assert [part.count for part in parts] == [1, 59, 0, 30]


def test_states_survive_safetensors_and_parquet(tmp_path):
    import pandas
    from safetensors.numpy import load_file, save_file

    score = InceptionScore(2)
    score.update(features(8, 3, seed=0), range(8))
    for state in (moments(features(9, 4, seed=0)), score):
        arrays = state.to_arrays()
        save_file(arrays, tmp_path / "state.safetensors")
        row = pandas.DataFrame([{name: value.tolist() for name, value in arrays.items()}])
        row.to_parquet(tmp_path / "state.parquet")
        for loaded in (
            load_file(tmp_path / "state.safetensors"),
            pandas.read_parquet(tmp_path / "state.parquet").iloc[0],
        ):
            again = type(state).from_arrays(loaded).to_arrays()
            for name, value in arrays.items():
                np.testing.assert_array_equal(again[name], value)


def test_moments_take_tensors_of_any_precision():
    values = torch.randn(10, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    got = moments(values.requires_grad_())
    expected = np.cov(values.detach().double().numpy(), rowvar=False)
    np.testing.assert_allclose(got.covariance, expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("n", "d", "shift", "scale"), [(500, 8, 0.0, 1.0), (300, 64, 0.3, 1.2), (2000, 16, 5.0, 0.1)]
)
def test_frechet_distance_is_torch_fidelitys(n, d, shift, scale):
    a, b = features(n, d, seed=0), features(n // 2, d, seed=1, shift=shift, scale=scale)
    got = frechet_distance(moments(a), moments(b))
    assert got == pytest.approx(torch_fidelity_fid(a, b), rel=1e-9)


def test_frechet_distance_is_the_formula():
    a, b = features(200, 5, seed=0), features(100, 5, seed=1, shift=1.0)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    shift = a.mean(0) - b.mean(0)
    expected = shift @ shift + np.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real)
    assert frechet_distance(moments(a), moments(b)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("n", "m"), [(2, 2), (10, 10), (64, 64), (10, 500), (500, 10)])
def test_frechet_distance_of_fewer_images_than_dimensions(n, m):
    """The shared trace, straight from centred samples X and Y: the sum of XY's singular values."""
    a, b = features(n, 64, seed=0), features(m, 64, seed=1, shift=0.5)
    centred = [x - x.mean(0) for x in (a, b)]
    shared = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    shared /= np.sqrt((n - 1) * (m - 1))
    spread = sum(np.square(x).sum() / (len(x) - 1) for x in centred)
    expected = np.square(a.mean(0) - b.mean(0)).sum() + spread - 2 * shared
    got = frechet_distance(moments(a), moments(b))
    assert got == pytest.approx(expected, rel=1e-11)
    assert got == pytest.approx(torch_fidelity_fid(a, b), rel=1e-6)


def test_frechet_distance_to_itself_is_nothing_and_it_is_symmetric():
    a, b = moments(features(20, 64, seed=0)), moments(features(20, 64, seed=1, shift=1.0))
    assert 0 <= frechet_distance(a, a) < 1e-10 * np.trace(a.covariance)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-12)


def test_frechet_distance_of_constant_features_is_the_shift():
    a, b = moments(np.zeros((5, 3))), moments(np.ones((4, 3)))
    assert frechet_distance(a, b) == 3.0


@pytest.mark.parametrize("n", [0, 1])
def test_frechet_distance_refuses_fewer_than_two_samples(n):
    with pytest.raises(ValueError, match="two samples or more"):
        frechet_distance(moments(features(n, 3, seed=0)), moments(features(9, 3, seed=0)))


def test_moments_refuse_bad_features():
    known = moments(np.ones((3, 2)))
    with pytest.raises(ValueError, match="dimensions"):
        known.update(np.ones((3, 4)))
    with pytest.raises(ValueError, match="not finite"):
        known.update(np.array([[math.nan, 1.0]]))
    with pytest.raises(ValueError, match=r"\[n, d\]"):
        known.update(np.ones(3))
    with pytest.raises(ValueError, match="dimensions"):
        frechet_distance(known, moments(np.ones((3, 4))))
    assert known.count == 3


def score(logits, ids, splits, batch=13):
    whole = InceptionScore(splits)
    for start in range(0, len(logits), batch):
        part = InceptionScore(splits)
        part.update(logits[start : start + batch], ids[start : start + batch])
        whole.merge(InceptionScore.from_arrays(part.to_arrays()))
    return whole.result()


@pytest.mark.parametrize("splits", [1, 2, 10])
def test_inception_score_is_torch_fidelitys(splits):
    """torch-fidelity's splits are contiguous chunks, so its images are put in chunks by id."""
    logits = torch.from_numpy(features(100, 7, seed=0))
    ids = torch.arange(100)
    chunks = torch.cat([logits[ids % splits == s] for s in range(splits)])
    expected = isc_features_to_metric(chunks, splits=splits, shuffle=False)
    mean, deviation = score(logits, ids, splits)
    assert mean == pytest.approx(expected["inception_score_mean"], rel=1e-12)
    assert deviation == pytest.approx(expected["inception_score_std"], rel=1e-9, abs=1e-12)


def test_inception_score_does_not_depend_on_the_order_of_arrival():
    logits, ids = features(60, 5, seed=0), np.arange(60)
    order = np.random.default_rng(0).permutation(60)
    assert score(logits[order], ids[order], 3) == pytest.approx(score(logits, ids, 3), rel=1e-13)


def test_inception_score_of_sure_and_of_undecided_classifiers():
    sure = np.eye(4)[np.arange(40) % 4] * 1e4  # probabilities of exactly one and zero
    assert score(sure, np.arange(40) // 4, 5) == (pytest.approx(4.0), pytest.approx(0.0))
    assert score(np.zeros((40, 4)), np.arange(40), 5) == (pytest.approx(1.0), pytest.approx(0.0))


def test_inception_score_refuses_bad_input():
    known = InceptionScore(4)
    with pytest.raises(ValueError, match="every split"):
        known.result()
    known.update(np.zeros((3, 2)), np.arange(3))
    with pytest.raises(ValueError, match="3 images in 4 splits"):
        known.result()
    with pytest.raises(ValueError, match="not finite"):
        known.update(np.full((1, 2), math.inf), [0])
    with pytest.raises(ValueError, match=r"\[n\]"):
        known.update(np.zeros((2, 2)), [0])
    with pytest.raises(ValueError, match="splits or classes"):
        known.update(np.zeros((1, 3)), [0])
    other = InceptionScore(3)
    other.update(np.zeros((1, 2)), [0])
    with pytest.raises(ValueError, match="splits or classes"):
        known.merge(other)
    with pytest.raises(ValueError, match="splits or classes"):
        InceptionScore(4).merge(other)
    with pytest.raises(ValueError, match="1 or more"):
        InceptionScore(0)


@pytest.mark.parametrize(
    ("total", "expected"), [(0, [0, 0, 0]), (2, [1, 1, 0]), (7, [3, 2, 2]), (9, [3, 3, 3])]
)
def test_balanced_counts(total, expected):
    assert balanced_counts(total, 3) == expected


@pytest.mark.parametrize(("total", "classes"), [(-1, 3), (3, 0)])
def test_balanced_counts_refuse(total, classes):
    with pytest.raises(ValueError):
        balanced_counts(total, classes)


@pytest.mark.parametrize("n", [20, 500, 1003])
def test_the_inception_scores_splits_are_equal_and_blind_to_the_class(n):
    from diffult_ray.method.quality import balanced_counts
    from diffult_ray.stages import pool
    from diffult_ray.stages.quality import SPLITS, _ranks

    rows = pool.requests(balanced_counts(n, 100), seed=0)
    splits = _ranks(rows["seed"].to_numpy()) * SPLITS // n
    sizes = np.bincount(splits, minlength=SPLITS)
    assert sizes.sum() == n and sizes.max() - sizes.min() <= 1
    assert abs(np.corrcoef(splits, rows["label"].to_numpy())[0, 1]) < 3 / math.sqrt(n)


# --- a covariance that cannot be had -----------------------------------------------------------


def test_a_covariance_that_is_not_finite_is_an_error_and_not_nan():
    huge = np.array([[1e200, 0.0], [-1e200, 1.0], [0.0, 2.0]])
    with np.errstate(over="ignore", invalid="ignore"), pytest.raises(ValueError, match="not finite"):
        frechet_distance(moments(huge), moments(features(9, 2, seed=0)))


def test_moments_of_the_whole_are_those_of_its_parts():
    values = features(100, 6, seed=0)
    got = moments_of(torch.from_numpy(values), rows=33)
    np.testing.assert_allclose(got.covariance, np.cov(values, rowvar=False), rtol=1e-11)


# --- KID ---------------------------------------------------------------------------------------


def literal_mmd(x, y):
    """Binkowski et al., eq. 4: sums over pairs, the diagonal left out."""
    def k(a, b):
        return (a @ b / len(a) + 1) ** 3

    m, n = len(x), len(y)
    xx = sum(k(x[i], x[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    yy = sum(k(y[i], y[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    return xx + yy - 2 * sum(k(a, b) for a in x for b in y) / (m * n)


def test_kid_of_one_subset_that_is_the_whole_is_the_formula():
    a, b = features(12, 5, seed=0), features(12, 5, seed=1, shift=0.5)
    mean, deviation = kid(a, b, subsets=1, subset_size=12)
    assert mean == pytest.approx(literal_mmd(a, b), rel=1e-10)
    assert deviation == 0.0


@pytest.mark.parametrize("subsets", [10, 3])  # of which the many share the kernel of all pairs
@pytest.mark.parametrize("seed", [2020, 7])
def test_kid_is_torch_fidelitys(seed, subsets):
    a, b = features(90, 8, seed=0), features(70, 8, seed=1, shift=0.2)
    theirs = kid_features_to_metric(
        torch.from_numpy(a), torch.from_numpy(b), kid_subsets=subsets, kid_subset_size=40, rng_seed=seed,
        kid_kernel="poly", verbose=False,
    )
    mean, deviation = kid(a, b, subsets=subsets, subset_size=40, seed=seed)
    assert mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)
    assert deviation == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-9)


def test_kids_subsets_are_no_larger_than_what_there_is():
    a, b = features(9, 3, seed=0), features(30, 3, seed=1)
    assert kid(a, b, subsets=5, subset_size=1000) == kid(a, b, subsets=5, subset_size=9)


def test_kid_of_samples_of_one_distribution_is_about_nothing():
    both = features(400, 4, seed=0)
    mean, deviation = kid(both[:200], both[200:], subsets=20, subset_size=100)
    assert abs(mean) < 2 * deviation


@pytest.mark.parametrize(("n", "m"), [(1, 9), (9, 1), (0, 9)])
def test_kid_refuses_fewer_than_two_samples(n, m):
    with pytest.raises(ValueError, match="two samples a side"):
        kid(features(n, 3, seed=0), features(m, 3, seed=1))


# --- precision and recall ----------------------------------------------------------------------


def literal_precision(fake, real, k):
    """Each generated sample against each real one's ball, by loops."""
    radii = []
    for i, row in enumerate(real):
        radii.append(sorted(math.dist(row, other) for j, other in enumerate(real) if j != i)[k - 1])
    inside = [any(math.dist(f, r) <= radius for r, radius in zip(real, radii, strict=True)) for f in fake]
    return sum(inside) / len(fake)


@pytest.fixture(params=[2**23, 100], ids=["one block", "many blocks"])
def block(request, monkeypatch):
    monkeypatch.setattr(quality, "_BLOCK_NUMBERS", request.param)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_precision_and_recall_are_the_literal_ones(block, k, offset):
    fake, real = features(25, 4, seed=0) + offset, features(40, 4, seed=1, shift=0.3) + offset
    precision, recall = precision_recall(fake, real, neighbours=k)
    assert precision == literal_precision(fake, real, k)
    assert recall == literal_precision(real, fake, k)
    assert 0 < precision < 1 and 0 < recall < 1


def test_precision_and_recall_are_torch_fidelitys(block):
    fake, real = features(60, 6, seed=0), features(80, 6, seed=1, shift=0.3)
    theirs = prc_features_to_metric(
        torch.from_numpy(fake), torch.from_numpy(real), prc_neighborhood=3, prc_batch_size=32, verbose=False
    )
    assert precision_recall(fake, real) == pytest.approx((theirs["precision"], theirs["recall"]), rel=1e-6)


def test_precision_sees_what_is_false_and_recall_what_is_missing():
    real = features(100, 3, seed=0)
    precision, recall = precision_recall(real[:20] * 1e-3, real)  # all in the middle
    assert precision == 1.0 and recall < 0.2
    assert precision_recall(real + 1e3, real) == (0.0, 0.0)
    assert precision_recall(real, real) == (1.0, 1.0)


@pytest.mark.parametrize(("n", "m"), [(3, 9), (9, 3), (0, 9)])
def test_precision_and_recall_refuse_too_few_samples(n, m):
    with pytest.raises(ValueError, match="more samples a side"):
        precision_recall(features(n, 3, seed=0), features(m, 3, seed=1), neighbours=3)


@pytest.mark.parametrize("measure", [kid, precision_recall])
def test_measures_of_a_sample_refuse_bad_features(measure):
    with pytest.raises(ValueError, match="dimensions"):
        measure(features(9, 3, seed=0), features(9, 4, seed=0))
    with pytest.raises(ValueError, match="not finite"):
        measure(features(9, 3, seed=0), np.full((9, 3), math.nan))
