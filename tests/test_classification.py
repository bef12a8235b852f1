"""Losses, weights, copies and measures against literal float64 loops and torchmetrics."""

import math
from collections import Counter

import pytest
import torch

from diffult_ray.method.classification import (
    accuracies,
    balanced_softmax_loss,
    calibration,
    class_sizes,
    class_weights,
    draw_mixing,
    drw_weights,
    ldam_loss,
    ldam_margins,
    log_prior,
    mixup,
    oversample_indices,
    shot_groups,
)
from diffult_ray.method.objectives import Objective


def weighted_loss(logits, targets, weights, normalise="weight"):
    """The loss of methods without one of their own."""
    return Objective(normalise=normalise).loss(logits, targets, weights, step=0)


def batch(n=40, classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, classes, generator=generator, dtype=torch.float64) * 3
    targets = torch.randint(classes, (n,), generator=generator)
    return logits, targets, torch.rand(n, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("normalise", ["weight", "count"])
def test_loss_and_its_gradient_are_the_literal_ones(normalise):
    logits, targets, weights = batch()
    logits.requires_grad_()
    loss = weighted_loss(logits, targets, weights, normalise=normalise)
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
    torch.testing.assert_close(weighted_loss(logits, targets, weights), expected)


def test_loss_without_any_weight_is_zero_with_zero_gradient():
    logits, targets, _ = batch()
    logits.requires_grad_()
    loss = weighted_loss(logits, targets, torch.zeros(40))
    loss.backward()
    assert loss.item() == 0.0
    assert (logits.grad == 0).all()


def test_loss_of_half_precision_logits_is_float32():
    logits, targets, weights = batch()
    loss = weighted_loss(logits.bfloat16(), targets, weights.float())
    assert loss.dtype == torch.float32
    exact = weighted_loss(logits.bfloat16().double(), targets, weights)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)


# --- the losses of other methods ------------------------------------------------------------------

COUNTS = [500, 120, 30, 7, 2]


def check(losses, logits, expected):
    """Losses [n] and the gradient of their sum are those of a literal function of a row and its target.

    The literal gradient is a central difference in float64.
    """
    gradient = torch.autograd.grad(losses.sum(), logits)[0]
    for i, row in enumerate(logits.tolist()):
        assert losses[i].item() == pytest.approx(expected(i, row), rel=1e-11)
        for c in range(len(row)):
            up, down = ([x + d * (k == c) for k, x in enumerate(row)] for d in (1e-5, -1e-5))
            slope = (expected(i, up) - expected(i, down)) / 2e-5
            assert float(gradient[i, c]) == pytest.approx(slope, rel=1e-6, abs=1e-8)


def test_balanced_softmax_is_the_literal_one():
    logits, targets, _ = batch()
    logits.requires_grad_()

    def literal(i, row):
        y = int(targets[i])
        terms = [n * math.exp(z) for n, z in zip(COUNTS, row, strict=True)]
        return -math.log(terms[y] / sum(terms))

    check(balanced_softmax_loss(logits, targets, log_prior(COUNTS)), logits, literal)


def test_balanced_softmax_of_equal_counts_is_cross_entropy():
    logits, targets, _ = batch()
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(balanced_softmax_loss(logits, targets, log_prior([9] * 5)), expected)


def test_balanced_softmax_learns_nothing_about_a_class_without_images():
    logits, targets, _ = batch()
    logits.requires_grad_()
    losses = balanced_softmax_loss(logits, targets.clamp_max(3), log_prior([9, 9, 9, 9, 0]))
    losses.sum().backward()
    assert losses.isfinite().all() and logits.grad.isfinite().all()
    assert (logits.grad[:, 4] == 0).all()


def test_ldam_is_the_literal_one():
    logits, targets, _ = batch()
    cosines = torch.tanh(logits).requires_grad_()
    margins = [0.5 * (n / 2) ** -0.25 for n in COUNTS]
    assert ldam_margins(COUNTS).tolist() == pytest.approx(margins, rel=1e-12)

    def literal(i, row):
        y = int(targets[i])
        own = math.exp(30 * (row[y] - margins[y]))
        return -math.log(own / (own + sum(math.exp(30 * z) for c, z in enumerate(row) if c != y)))

    check(ldam_loss(30 * cosines, targets, ldam_margins(COUNTS), 30.0), cosines, literal)


def test_ldam_margins_have_their_largest_and_none_for_a_class_without_images():
    margins = ldam_margins([16, 1, 0], 0.4)
    assert margins.tolist() == pytest.approx([0.2, 0.4, 0])
    logits, targets, _ = batch()
    plain = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(ldam_loss(logits, targets, ldam_margins(COUNTS, 0.0), 30.0), plain)


def test_deferred_weights_are_the_literal_ones():
    beta = 0.9999
    raw = [(1 - beta) / (1 - beta**n) for n in COUNTS]
    expected = [w / sum(raw) * len(raw) for w in raw]
    assert drw_weights(COUNTS).tolist() == pytest.approx(expected, rel=1e-12)
    assert drw_weights(COUNTS, beta=0).tolist() == pytest.approx([1.0] * 5)
    with_none = drw_weights([*COUNTS, 0])
    assert with_none.tolist() == pytest.approx([*expected, 0], rel=1e-12)


@pytest.mark.parametrize("beta", [-0.1, 1.0, math.nan])
def test_deferred_weights_refuse_a_beta(beta):
    with pytest.raises(ValueError, match="beta"):
        drw_weights(COUNTS, beta)


@pytest.mark.parametrize("function", [class_weights, drw_weights, ldam_margins, log_prior])
def test_what_goes_by_class_needs_an_image(function):
    with pytest.raises(ValueError, match="at least one"):
        function([0, 0])


@pytest.mark.parametrize("loss", [
    lambda z, y: balanced_softmax_loss(z, y, log_prior(COUNTS)),
    lambda z, y: ldam_loss(z, y, ldam_margins(COUNTS), 30.0),
], ids=["balanced_softmax", "ldam"])
def test_losses_of_half_precision_logits_are_float32(loss):
    logits, targets, _ = batch()
    got = loss(logits.bfloat16(), targets)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, loss(logits.bfloat16().double(), targets).float())


def test_a_synthetic_image_counts_by_its_weight():
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 3])
    weights = torch.tensor([1, 1, 1, 1, 0.5, 0.5, 1])
    assert class_sizes(labels, weights, 5).tolist() == [3, 2, 0, 1, 0]


# --- mixup ----------------------------------------------------------------------------------------


def test_mixup_is_the_literal_one():
    x, y = torch.rand(2, 6, 1, 2, 2, dtype=torch.float64)
    mixed = mixup(x, y, 0.3)
    for a, b, got in zip(x.flatten().tolist(), y.flatten().tolist(), mixed.flatten().tolist(), strict=True):
        assert got == pytest.approx(0.3 * a + 0.7 * b, rel=1e-12)
    assert torch.equal(mixup(x, y, 1.0), x) and torch.equal(mixup(x, y, 0.0), y)


def test_partners_are_a_permutation_that_seed_and_step_alone_decide():
    one, again = (draw_mixing(1.0, 50, seed=3, step=7) for _ in range(2))
    assert one.share == again.share and torch.equal(one.partner, again.partner)
    assert sorted(one.partner.tolist()) == list(range(50)) and one.partner.tolist() != list(range(50))
    others = [draw_mixing(1.0, 50, seed=3, step=8), draw_mixing(1.0, 50, seed=4, step=7)]
    assert len({one.share, *(o.share for o in others)}) == 3


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_shares_have_the_mean_and_variance_of_their_beta_distribution(alpha):
    shares = torch.tensor([draw_mixing(alpha, 2, seed=0, step=s).share for s in range(4000)])
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(float(shares.mean()) - 0.5) < 5 * math.sqrt(variance / 4000)
    assert float(shares.var()) == pytest.approx(variance, rel=0.1)


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.nan])
def test_mixing_refuses_an_alpha(alpha):
    with pytest.raises(ValueError, match="alpha"):
        draw_mixing(alpha, 4, seed=0, step=0)


# --- weights and copies ---------------------------------------------------------------------------


def test_class_weights_are_inverse_frequencies_of_mean_one():
    counts = [120, 30, 0, 2]
    weights = class_weights(counts)
    assert weights[2] == 0
    products = [w * n for w, n in zip(weights.tolist(), counts, strict=True)]
    assert products[0] == pytest.approx(products[1]) == pytest.approx(products[3])
    assert sum(products) / sum(counts) == pytest.approx(1.0)


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


def test_oversampling_fills_what_other_images_leave():
    labels = torch.tensor([0] * 12 + [1] * 5 + [2] * 3)
    extra = oversample_indices(labels, 10, seed=3, beside=[0, 2, 9])
    assert Counter(labels[extra].tolist()) == {1: 3}
    whole = oversample_indices(labels, 10, seed=3)
    assert extra.tolist() == whole[:3].tolist()  # the first of the same copies


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
