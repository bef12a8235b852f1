"""Losses, weights, copies and measures against literal float64 loops and torchmetrics."""

import math
from collections import Counter

import pytest
import torch

from diffult_ray.method.classification import (
    accuracies,
    calibration,
    class_weights,
    oversample_indices,
    shot_groups,
    weighted_cross_entropy,
)


def batch(n=40, classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, classes, generator=generator, dtype=torch.float64) * 3
    targets = torch.randint(classes, (n,), generator=generator)
    return logits, targets, torch.rand(n, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("normalise", ["weight", "count"])
def test_loss_and_its_gradient_are_the_literal_ones(normalise):
    logits, targets, weights = batch()
    logits.requires_grad_()
    loss = weighted_cross_entropy(logits, targets, weights, normalise=normalise)
    loss.backward()
    divisor = sum(weights.tolist()) if normalise == "weight" else len(targets)
    total = 0.0
    for row, target, weight, gradient in zip(
        logits.tolist(), targets.tolist(), weights.tolist(), logits.grad, strict=True
    ):
        partition = sum(math.exp(x) for x in row)
        total += weight * (math.log(partition) - row[target])
        for c, x in enumerate(row):
            expected = weight * (math.exp(x) / partition - (c == target)) / divisor
            assert float(gradient[c]) == pytest.approx(expected, rel=1e-9, abs=1e-15)
    assert loss.item() == pytest.approx(total / divisor, rel=1e-12)


def test_loss_of_omega_zero_is_that_of_the_real_images():
    logits, targets, _ = batch()
    weights = (torch.arange(40) < 25).double()
    expected = torch.nn.functional.cross_entropy(logits[:25], targets[:25])
    torch.testing.assert_close(weighted_cross_entropy(logits, targets, weights), expected)


def test_loss_without_any_weight_is_zero_with_zero_gradient():
    logits, targets, _ = batch()
    logits.requires_grad_()
    loss = weighted_cross_entropy(logits, targets, torch.zeros(40))
    loss.backward()
    assert loss.item() == 0.0
    assert (logits.grad == 0).all()


def test_loss_of_half_precision_logits_is_float32():
    logits, targets, weights = batch()
    loss = weighted_cross_entropy(logits.bfloat16(), targets, weights)
    assert loss.dtype == torch.float32
    exact = weighted_cross_entropy(logits.bfloat16().double(), targets, weights)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)


def test_class_weights_are_inverse_frequencies_of_mean_one():
    counts = [120, 30, 0, 2]
    weights = class_weights(counts)
    assert weights[2] == 0
    products = [w * n for w, n in zip(weights.tolist(), counts, strict=True)]
    assert products[0] == pytest.approx(products[1]) == pytest.approx(products[3])
    assert sum(products) / sum(counts) == pytest.approx(1.0)


def test_class_weights_need_an_image():
    with pytest.raises(ValueError, match="at least one"):
        class_weights([0, 0])


def test_oversampling_fills_every_class_with_even_copies():
    labels = torch.tensor([0] * 12 + [1] * 5 + [2] * 3 + [1])
    extra = oversample_indices(labels, 10, seed=3)
    assert Counter(labels[extra].tolist()) == {1: 4, 2: 7}
    copies = Counter(extra.tolist())
    assert sorted(copies[i] for i in (17, 18, 19)) == [2, 2, 3]
    assert set(copies) <= {12, 13, 14, 15, 16, 20, 17, 18, 19}
    assert max(copies[i] for i in (12, 13, 14, 15, 16, 20)) == 1


def test_oversampling_depends_on_seed_and_class_alone():
    labels = torch.tensor([0] * 50 + [1] * 50)
    first = oversample_indices(labels, 75, seed=0)
    assert first.tolist() == oversample_indices(labels, 75, seed=0).tolist()
    assert first.tolist() != oversample_indices(labels, 75, seed=1).tolist()
    assert first[:25].tolist() == oversample_indices(labels[:50], 75, seed=0).tolist()
    assert (first[25:] - 50).tolist() != first[:25].tolist()


def test_oversampling_with_nothing_to_add():
    extra = oversample_indices(torch.tensor([0, 1]), 1, seed=0)
    assert extra.dtype == torch.int64
    assert len(extra) == 0


@pytest.mark.parametrize(("labels", "classes"), [([0, 2], None), ([0, 1], 3)])
def test_oversampling_refuses_a_class_without_images(labels, classes):
    with pytest.raises(ValueError, match="no real image"):
        oversample_indices(torch.tensor(labels), 4, seed=0, num_classes=classes)


def test_shot_groups_at_their_edges():
    counts = torch.tensor([101, 100, 20, 19, 0])
    assert shot_groups(counts) == ["many", "medium", "medium", "few", "few"]
    assert shot_groups(counts.tolist()) == shot_groups(counts)


def test_shot_groups_of_cifar100_lt_are_the_fields():
    counts = [int(500 * (1 / 100) ** (c / 99)) for c in range(100)]
    assert Counter(shot_groups(counts)) == {"many": 35, "medium": 35, "few": 30}


def test_accuracies_by_hand():
    targets = torch.tensor([0] * 4 + [1] * 2 + [3] * 2 + [4])
    predicted = torch.tensor([0, 0, 0, 1, 1, 1, 3, 2, 0])
    got = accuracies(predicted, targets, train_counts=[200, 150, 30, 15, 3])
    assert got == {
        "accuracy": pytest.approx(100 * 6 / 9),
        "balanced_accuracy": pytest.approx((75 + 100 + 50 + 0) / 4),
        "accuracy_many": pytest.approx((75 + 100) / 2),
        "accuracy_medium": None,  # its one class has no test images
        "accuracy_few": pytest.approx((50 + 0) / 2),
        "per_class_accuracy": [75.0, 100.0, None, 50.0, 0.0],
    }


def test_accuracy_of_no_class_in_a_group_is_none():
    got = accuracies(torch.tensor([0]), torch.tensor([0]), train_counts=[50])
    by_group = [got[f"accuracy_{group}"] for group in ("many", "medium", "few")]
    assert by_group == [None, 100.0, None]


def test_accuracies_are_torchmetrics():
    from torchmetrics.functional.classification import multiclass_accuracy

    logits, targets, _ = batch(200)
    predicted = logits.argmax(1)
    got = accuracies(predicted, targets, train_counts=[9] * 5)
    for key, average in (("accuracy", "micro"), ("balanced_accuracy", "macro")):
        theirs = multiclass_accuracy(predicted, targets, num_classes=5, average=average)
        assert got[key] == pytest.approx(100 * theirs.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("predicted", "targets"), [([], []), ([0, 1], [0]), ([0], [7])], ids=["none", "shape", "class"]
)
def test_accuracies_refuse_bad_input(predicted, targets):
    with pytest.raises(ValueError):
        accuracies(
            torch.tensor(predicted, dtype=torch.int64),
            torch.tensor(targets, dtype=torch.int64),
            train_counts=[1, 1],
        )


def literal_ece(probabilities, targets):
    bins = [[] for _ in range(15)]
    for row, target in zip(probabilities.tolist(), targets.tolist(), strict=True):
        confidence = max(row)
        bins[min(14, int(confidence * 15))].append((confidence, row.index(confidence) == target))
    return sum(
        len(b) / len(targets)
        * abs(sum(right for _, right in b) / len(b) - sum(c for c, _ in b) / len(b))
        for b in bins
        if b
    )


def test_calibration_is_the_literal_one_and_torchmetrics():
    from torchmetrics.functional.classification import multiclass_calibration_error

    logits, targets, _ = batch(300)
    probabilities = logits.softmax(1)
    got = calibration(probabilities, targets)
    assert got["nll"] == pytest.approx(
        torch.nn.functional.cross_entropy(logits, targets).item(), rel=1e-12
    )
    # in float32, whatever it is given
    theirs = multiclass_calibration_error(probabilities, targets, num_classes=5, n_bins=15)
    assert got["ece"] == pytest.approx(100 * literal_ece(probabilities, targets), rel=1e-9)
    assert got["ece"] == pytest.approx(100 * theirs.item(), rel=1e-6)


def test_confidence_of_exactly_one_is_in_the_last_bin():
    probabilities = torch.tensor([[1.0, 0.0], [0.95, 0.05]])
    targets = torch.tensor([1, 0])
    got = calibration(probabilities, targets)
    assert got["ece"] == pytest.approx(100 * literal_ece(probabilities, targets))
    assert got["ece"] == pytest.approx(100 * abs(0.5 - 0.975))
    tiny = torch.finfo(torch.float32).tiny  # not infinity
    assert got["nll"] == pytest.approx(-(math.log(tiny) + math.log(0.95)) / 2)


@pytest.mark.parametrize(
    ("probabilities", "targets"),
    [
        (torch.tensor([[2.0, -1.0]]), torch.tensor([0])),
        (torch.tensor([[0.2, 0.2]]), torch.tensor([0])),
        (torch.tensor([[math.nan, 0.2]]), torch.tensor([0])),
        (torch.ones(0, 2), torch.ones(0).long()),
        (torch.ones(2, 1), torch.tensor([0])),
    ],
    ids=["logits", "sum", "nan", "none", "shape"],
)
def test_calibration_refuses_bad_input(probabilities, targets):
    with pytest.raises(ValueError):
        calibration(probabilities, targets)
