"""Bands against a literal float64 transcription: loops over pairs, no matrix products."""

import math

import numpy as np
import pytest
import torch

from diffult_ray.method import bands
from diffult_ray.method.bands import (
    BANDS,
    band,
    class_statistics,
    closeness,
    distances,
    expected_share,
    keep,
    nearest_other,
    nearest_real,
)


def sample(counts, d=5, seed=0, offset=0.0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.full((n,), c) for c, n in enumerate(counts)])
    labels = labels[torch.randperm(len(labels), generator=generator)]
    features = torch.randn(len(labels), d, generator=generator) + labels[:, None] + offset
    return features, labels


def unit(row):
    return row / math.sqrt(sum(x * x for x in row))


def literal_statistics(features, labels, num_classes, normalise):
    rows = features.double().numpy()
    rows = np.stack([unit(r) for r in rows]) if normalise else rows
    centres, diameters = [], []
    for c in range(num_classes):
        own = [r for r, label in zip(rows, labels.tolist(), strict=True) if label == c]
        centres.append(sum(own) / len(own))
        diameters.append(max(math.dist(a, b) for a in own for b in own))
    return np.stack(centres), np.array(diameters)


@pytest.fixture(params=[(2**22, 128), (7, 4)], ids=["one block", "many blocks"])
def block(request, monkeypatch):
    numbers, group = request.param
    monkeypatch.setattr(bands, "_BLOCK_NUMBERS", numbers)
    monkeypatch.setattr(bands, "_GROUP", group)


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_statistics_are_the_literal_ones(block, normalise, offset):
    features, labels = sample([30, 12, 2], offset=offset)
    got = class_statistics(features, labels, 3, normalise=normalise, scope="class")
    centre, diameter = literal_statistics(features, labels, 3, normalise)
    np.testing.assert_allclose(got.centre.numpy(), centre, rtol=1e-12)
    np.testing.assert_allclose(got.scale.numpy(), diameter, rtol=1e-9)
    assert got.normalise is normalise


def test_a_large_offset_of_all_features_changes_no_pair():
    features, labels = sample([50] * 10)
    near = class_statistics(features, labels, 10, normalise=False, scope="class")
    far = class_statistics(features.double() + 1e8, labels, 10, normalise=False, scope="class")
    torch.testing.assert_close(far.scale, near.scale, rtol=1e-7, atol=0)
    index = nearest_real(features + 0.1, labels, features, labels)[0]
    moved = nearest_real(features.double() + 0.1 + 1e8, labels, features.double() + 1e8, labels)[0]
    assert moved.tolist() == index.tolist()


def test_global_scale_is_the_largest_of_the_classes():
    features, labels = sample([30, 12, 2, 1])
    own = class_statistics(features, labels, 4, normalise=False, scope="class").scale
    one = class_statistics(features, labels, 4, normalise=False, scope="global").scale
    assert one.tolist() == [own.max().item()] * 4


def test_a_class_of_one_of_copies_or_of_none_takes_the_median_scale():
    features, labels = sample([20, 10, 5])
    copy = torch.full((2, 5), 0.1)
    features = torch.cat([features, torch.ones(1, 5), copy])
    labels = torch.cat([labels, torch.tensor([3, 4, 4])])
    got = class_statistics(features, labels, 6, normalise=False, scope="class")
    median = np.median(got.scale[:3].numpy())
    np.testing.assert_allclose(got.scale[3:].numpy(), [median] * 3, rtol=1e-15)
    np.testing.assert_allclose(got.centre[3], np.ones(5))
    np.testing.assert_allclose(got.centre[5], features.double().mean(0), rtol=1e-12)


def test_classes_of_two_and_of_one_image_have_bands_and_neighbours():
    real, real_labels = torch.tensor([[0.0], [2.0], [10.0]]), torch.tensor([0, 0, 1])
    fake, labels = torch.tensor([[1.0], [4.0], [5.1], [12.0], [14.5]]), torch.tensor([0, 0, 0, 1, 1])
    known = class_statistics(real, real_labels, 2, normalise=False, scope="class")
    assert known.centre.tolist() == [[1.0], [10.0]] and known.scale.tolist() == [2.0, 2.0]
    to_centre = distances(fake, labels, known, to="centre")
    assert [BANDS[c] for c in band(to_centre)] == ["ID", "AID", "OOD", "ID", "OOD"]
    index, distance = nearest_real(fake, labels, real, real_labels)
    assert index.tolist() == [0, 1, 1, 2, 2]
    closest, ratio = closeness(fake, real, nearest_other(real)[1])
    assert closest.tolist() == [0, 1, 1, 2, 2]
    assert ratio[3].item() == distance[3].item() / 8  # the only image of its class: the others' are 8 away


def test_the_median_of_two_scales_lies_between_them():
    features = torch.tensor([[0.0], [1.0], [0.0], [3.0], [7.0]])
    labels = torch.tensor([0, 0, 1, 1, 2])
    got = class_statistics(features, labels, 3, normalise=False, scope="class")
    assert got.scale.tolist() == [1.0, 3.0, 2.0]


@pytest.mark.parametrize("scope", ["class", "global"])
def test_statistics_refuse_what_has_no_scale(scope):
    with pytest.raises(ValueError, match="d_f is undefined"):
        class_statistics(torch.eye(3), torch.arange(3), 3, normalise=False, scope=scope)


@pytest.mark.parametrize(
    ("features", "labels", "message"),
    [
        (torch.tensor([[0.0], [math.nan]]), torch.tensor([0, 0]), "not finite"),
        (torch.tensor([[0.0], [1.0]]), torch.tensor([0, 2]), "labels are 0 to 1"),
        (torch.tensor([[0.0], [1.0]]), torch.tensor([-1, 0]), "labels are 0 to 1"),
        (torch.tensor([0.0, 1.0]), torch.tensor([0, 1]), r"\[n, d\]"),
        (torch.tensor([[0.0], [1.0]]), torch.tensor([0]), r"\[n, d\]"),
    ],
)
def test_statistics_refuse_bad_input(features, labels, message):
    with pytest.raises(ValueError, match=message):
        class_statistics(features, labels, 2, normalise=False, scope="class")


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_nearest_real_is_the_literal_one(block, offset):
    real, real_labels = sample([30, 12, 2], offset=offset)
    fake, labels = sample([9, 9, 9], seed=1, offset=offset)
    index, distance = nearest_real(fake, labels, real, real_labels)
    for row, label, i, d in zip(fake.double(), labels, index.tolist(), distance, strict=True):
        own = {
            j: math.dist(row, other.double())
            for j, other in enumerate(real)
            if real_labels[j] == label
        }
        assert i == min(own, key=own.get)
        assert float(d) == pytest.approx(own[i], rel=1e-9)


def test_nearest_real_of_a_class_without_images_is_over_all_classes():
    real, real_labels = torch.tensor([[0.0], [5.0]]), torch.tensor([0, 1])
    index, distance = nearest_real(torch.tensor([[4.0]]), torch.tensor([2]), real, real_labels)
    assert (index.tolist(), distance.tolist()) == ([1], [1.0])


def test_nearest_real_of_a_copy_is_at_zero_and_does_not_depend_on_the_batch(block):
    real, real_labels = sample([40], d=64, offset=300.0)
    real = torch.cat([real, real])  # each of them twice: the first is the one to be named
    real_labels = torch.cat([real_labels, real_labels])
    index, distance = nearest_real(real, real_labels, real, real_labels)
    assert index.tolist() == [*range(40), *range(40)]
    assert distance.tolist() == [0.0] * 80
    near = real + 0.01
    whole = nearest_real(near, real_labels, real, real_labels)
    for i in range(0, 80, 7):
        one = nearest_real(near[i : i + 1], real_labels[i : i + 1], real, real_labels)
        assert (one[0][0], one[1][0]) == (whole[0][i], whole[1][i])


def test_the_last_of_many_real_samples_is_found_and_the_first_of_its_copies(block):
    real = torch.eye(301)
    real[290] = real[7]
    index, distance = nearest_real(real, torch.zeros(301), real, torch.zeros(301))
    assert index.tolist() == [*range(290), 7, *range(291, 301)]
    assert distance.tolist() == [0.0] * 301


def test_features_that_are_not_numbers_are_at_no_distance(block):
    real, real_labels = sample([30])
    index, distance = nearest_real(real * torch.nan, real_labels, real, real_labels)
    assert index.tolist() == [0] * 30 and bool(distance.isnan().all())


def test_nearest_real_needs_real_samples():
    with pytest.raises(ValueError, match="no real samples"):
        nearest_real(torch.ones(1, 2), torch.zeros(1).long(), torch.ones(0, 2), torch.ones(0))


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("to", ["centre", "nearest"])
def test_distances_are_the_literal_ones(normalise, to):
    real, real_labels = sample([30, 12, 2])
    fake, labels = sample([4, 4, 4], seed=1)
    statistics = class_statistics(real, real_labels, 3, normalise=normalise, scope="class")
    got = distances(
        fake, labels, statistics, to=to, real_features=real, real_labels=real_labels
    )
    centre, diameter = literal_statistics(real, real_labels, 3, normalise)
    for row, label, d in zip(fake.double().numpy(), labels.tolist(), got.tolist(), strict=True):
        row = unit(row) if normalise else row
        own = real[real_labels == label].double().numpy()
        own = [unit(r) for r in own] if normalise else own
        goals = [centre[label]] if to == "centre" else own
        assert d == pytest.approx(min(math.dist(row, g) for g in goals) / diameter[label], rel=1e-9)
    assert got.dtype == torch.float64


def test_distances_to_the_nearest_need_the_real_samples():
    statistics = class_statistics(*sample([5]), 1, normalise=False, scope="class")
    with pytest.raises(ValueError, match="real_features"):
        distances(*sample([2]), statistics, to="nearest")


def test_an_empty_batch_has_no_distances():
    statistics = class_statistics(*sample([5]), 1, normalise=False, scope="class")
    assert len(distances(torch.ones(0, 5), torch.ones(0).long(), statistics, to="centre")) == 0


def test_bands_close_at_their_upper_edge():
    edges = [0.0, 1.0, 1.0 + 1e-9, 2.0, 2.0 + 1e-9, math.inf, math.nan]
    distance = torch.tensor(edges, dtype=torch.float64)
    codes = band(distance)
    assert codes.dtype == torch.int8
    assert [BANDS[c] for c in codes] == ["ID", "ID", "AID", "AID", "OOD", "OOD", "OOD"]


def test_keep_by_threshold_or_by_bands():
    distance = torch.tensor([0.5, 1.5, 2.0, 2.5], dtype=torch.float64)
    codes = band(distance)
    assert keep(distance, codes, threshold=2.0).tolist() == [True, True, True, False]
    assert keep(distance, codes, threshold=math.inf).all()
    assert keep(distance, codes, bands=("ID", "OOD")).tolist() == [True, False, False, True]
    paper = keep(distance, codes, bands=("ID", "AID"))
    assert paper.tolist() == keep(distance, codes, threshold=2.0).tolist()


def test_the_extractors_agreement_is_a_second_filter_on_either_rule():
    distance = torch.tensor([0.5, 1.5, 2.0, 2.5], dtype=torch.float64)
    codes, agrees = band(distance), torch.tensor([True, False, True, True])
    assert keep(distance, codes, threshold=2.0, agrees=agrees).tolist() == [True, False, True, False]
    assert keep(distance, codes, bands=("AID", "OOD"), agrees=agrees).tolist() == [False, False, True, True]
    with pytest.raises(ValueError, match="agrees"):
        keep(distance, codes, threshold=2.0, agrees=agrees[:3])


@pytest.mark.parametrize("rule", [{}, {"threshold": 1.0, "bands": ("ID",)}, {"bands": ("id",)}])
def test_keep_refuses_no_rule_two_rules_and_unknown_bands(rule):
    distance = torch.ones(1)
    with pytest.raises(ValueError):
        keep(distance, band(distance), **rule)


# --- memorisation -----------------------------------------------------------------------------


def literal_nearest(rows, i):
    return min(math.dist(rows[i], other) for j, other in enumerate(rows) if j != i)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_the_nearest_other_sample_is_the_literal_one(block, offset):
    features, _ = sample([20, 5, 1], offset=offset)
    index, distance = nearest_other(features)
    rows = features.double().numpy()
    for i in range(len(rows)):
        assert int(index[i]) != i
        assert float(distance[i]) == pytest.approx(literal_nearest(rows, i), rel=1e-9)
        assert math.dist(rows[i], rows[index[i]]) == pytest.approx(float(distance[i]), rel=1e-9)


def test_closeness_is_the_literal_one_and_knows_no_class(block):
    real, _ = sample([30, 12, 1])
    fake, _ = sample([9, 9, 9], seed=1)
    index, ratio = closeness(fake, real, nearest_other(real)[1])
    rows = real.double().numpy()
    for x, i, got in zip(fake.double().numpy(), index.tolist(), ratio.tolist(), strict=True):
        near = [math.dist(x, t) for t in rows]
        assert i == int(np.argmin(near))
        assert got == pytest.approx(near[i] / literal_nearest(rows, i), rel=1e-9)
    assert 0 < float((ratio < 1).double().mean()) < 1


def test_a_copy_is_memorised_also_of_an_image_that_the_training_set_holds_twice():
    real = torch.tensor([[0.0], [4.0], [10.0], [10.0]])
    fake = torch.tensor([[0.0], [10.0], [10.5], [3.0], [1.5]])
    index, ratio = closeness(fake, real, nearest_other(real)[1])
    assert index.tolist() == [0, 2, 2, 1, 0]
    assert ratio.tolist() == [0.0, 0.0, math.inf, 0.25, 0.375]


def literal_share(rows):
    """Each row left out and taken for a sample: is it nearer to its nearest than any other row?"""
    count = 0
    for i, x in enumerate(rows):
        others = [j for j in range(len(rows)) if j != i]
        t = min(others, key=lambda j: math.dist(x, rows[j]))
        spacing = min((math.dist(rows[t], rows[j]) for j in others if j != t), default=math.inf)
        count += math.dist(x, rows[t]) < spacing or math.dist(x, rows[t]) == 0
    return count / len(rows)


@pytest.mark.parametrize("copies", [0, 3])
def test_the_expected_share_leaves_each_training_image_out(copies):
    features, _ = sample([25, 10])
    features = torch.cat([features, features[:1].expand(copies, -1)])
    got = expected_share(*nearest_other(features))
    assert got == pytest.approx(literal_share(features.double().numpy()))


def test_draws_of_the_same_distribution_have_about_the_expected_share():
    both = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0))
    real, fresh = both[:2000], both[2000:]
    index, distance = nearest_other(real)
    share = float((closeness(fresh, real, distance)[1] < 1).double().mean())
    assert share == pytest.approx(expected_share(index, distance), abs=0.05)
    assert 0.4 < share < 0.7
    assert float((closeness(real, real, distance)[1] < 1).double().mean()) == 1.0


def test_another_sample_needs_two():
    with pytest.raises(ValueError, match="two samples"):
        nearest_other(torch.ones(1, 2))
