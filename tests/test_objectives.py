"""Each method's objective: what a batch's loss is, by step, over ranks, with synthetic images."""

import math
from types import SimpleNamespace

import pytest
import torch

from diffult_ray.config import METHODS, Experiment
from diffult_ray.method.classification import mixup
from diffult_ray.method.objectives import first_weighted_step, make_objective
from diffult_ray.models import build_classifier
from diffult_ray.pipeline import classifier
from diffult_ray.stages.classifier import total_steps, training_set

CLASSES, REAL = 4, [40, 12, 5, 2]
OMEGA = 0.3


def config(method, **changes):
    """The section of the classifier's stage as a sweep makes it."""
    e = Experiment(select="test", method=method, synthetic=method != "ce", classifier=changes)
    return classifier(e).config


def training(synthetic=True):
    """Labels and weights of real images and of synthetic ones that fill the classes to 40."""
    real = torch.repeat_interleave(torch.arange(CLASSES), torch.tensor(REAL))
    more = torch.repeat_interleave(torch.arange(CLASSES), 40 - torch.tensor(REAL))
    if not synthetic:
        return real, torch.ones(len(real))
    return torch.cat([real, more]), torch.cat([torch.ones(len(real)), torch.full((len(more),), OMEGA)])


def objective(method, synthetic=True, steps=100, **changes):
    labels, weights = training(synthetic)
    return make_objective(config(method, **changes), labels, weights, num_classes=CLASSES, steps=steps)


def batch(n=24, synthetic=True):
    generator = torch.Generator().manual_seed(0)
    labels, weights = training(synthetic)
    index = torch.randint(len(labels), (n,), generator=generator)
    return torch.randn(n, CLASSES, generator=generator), labels[index], weights[index]


def literal(method, logits, labels, weights, step, normalise, synthetic):
    """A batch's loss in float64 loops, without mixup."""
    sizes = [n + (OMEGA * (40 - n) if synthetic else 0) for n in REAL]
    raw = [(1 - 0.9999) / (1 - 0.9999**n) for n in sizes]
    total = weight = 0.0
    for z, y, w in zip(logits.tolist(), labels.tolist(), weights.tolist(), strict=True):
        if method == "balanced_softmax":
            z = [a + math.log(n) for a, n in zip(z, sizes, strict=True)]
        if method == "ldam_drw":
            z[y] -= 30 * 0.5 * (sizes[y] / min(sizes)) ** -0.25
            w *= 1 if step < 80 else raw[y] / sum(raw) * CLASSES
        if method == "reweight":
            w *= sum(sizes) / CLASSES / sizes[y]
        total += w * (math.log(sum(math.exp(a) for a in z)) - z[y])
        weight += w
    return total / (weight if normalise == "weight" else len(labels))


@pytest.mark.parametrize("normalise", ["weight", "count"])
@pytest.mark.parametrize("synthetic", [False, True])
@pytest.mark.parametrize("step", [0, 79, 80, 99])
@pytest.mark.parametrize("method", [m for m in METHODS if m != "mixup"])
def test_a_batchs_loss_is_the_literal_one(method, step, synthetic, normalise):
    logits, labels, weights = batch(synthetic=synthetic)
    made = objective(method, synthetic, normalisation=normalise)
    expected = literal(method, logits, labels, weights, step, made.normalise, synthetic)
    assert float(made.loss(logits, labels, weights, step=step)) == pytest.approx(expected, rel=1e-5)
    assert made.normalise == (normalise if method != "ce" else "weight")
    assert made.mixing(0, step, len(labels)) is None


@pytest.mark.parametrize("normalise", ["weight", "count"])
def test_mixups_loss_has_each_label_at_the_weight_of_its_image(normalise):
    logits, labels, weights = batch()
    made = objective("mixup", normalisation=normalise)
    mixing = made.mixing(0, 3, len(labels))
    divisor = sum(weights.tolist()) if normalise == "weight" else len(labels)
    total = 0.0
    for i, (row, j) in enumerate(zip(logits.tolist(), mixing.partner.tolist(), strict=True)):
        log = math.log(sum(math.exp(z) for z in row))
        total += mixing.share * float(weights[i]) * (log - row[labels[i]])
        total += (1 - mixing.share) * float(weights[j]) * (log - row[labels[j]])
    got = made.loss(logits, labels, weights, step=3, mixing=mixing)
    assert float(got) == pytest.approx(total / divisor, rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_the_parts_of_all_ranks_add_up_to_the_loss_of_one(method):
    logits, labels, weights = batch()
    made = objective(method)
    mixing = made.mixing(0, 90, len(labels))
    whole = made.loss(logits, labels, weights, step=90, mixing=mixing)
    parts = [
        made.loss(logits[rows], labels, weights, step=90, rows=rows, mixing=mixing)
        for rows in (slice(0, 7), slice(7, 16), slice(16, 24))
    ]
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("ce", "diffult")])
def test_synthetic_images_of_weight_zero_are_no_images(method):
    """The classes are as large, the losses as they are, whatever the batch has of synthetic images."""
    labels, weights = training()
    real = make_objective(config(method), *training(False), num_classes=CLASSES, steps=100)
    made = make_objective(config(method), labels, weights * (weights == 1), num_classes=CLASSES, steps=100)
    logits, y, w = batch(synthetic=False)
    for step in (0, 90):
        mixing = made.mixing(0, step, len(y))
        expected = real.loss(logits, y, w, step=step, mixing=mixing)
        assert torch.equal(made.loss(logits, y, w, step=step, mixing=mixing), expected)


def test_reweighting_gives_each_class_the_same_weight_with_synthetic_images_too():
    labels, weights = training()
    found = objective("reweight").weights(labels, weights, 0)
    by_class = torch.bincount(labels, weights=found, minlength=CLASSES)
    torch.testing.assert_close(by_class, by_class.mean().expand(CLASSES))
    assert float(found.sum()) == pytest.approx(float(weights.sum()), rel=1e-5)


@pytest.mark.parametrize(
    ("share", "steps", "first"),
    [(0.8, 200, 160), (0.8, 800, 640), (0.1, 30, 3), (0, 9, 0), (1, 9, 9), (0.5, 5, 3)],
)
def test_the_first_weighted_step_is_the_one_after_its_share(share, steps, first):
    assert first_weighted_step(share, steps) == first


def test_an_extractor_has_no_method_and_is_plain_cross_entropy():
    logits, labels, weights = batch(synthetic=False)
    made = make_objective({"seed": 0}, *training(False), num_classes=CLASSES, steps=10)
    expected = torch.nn.functional.cross_entropy(logits, labels)
    torch.testing.assert_close(made.loss(logits, labels, weights, step=0), expected)


def test_mixing_on_ranks_is_mixing_of_the_batch():
    x = torch.rand(24, 3, 4, 4)
    mixing = objective("mixup").mixing(0, 0, 24)
    whole = mixup(x, x[mixing.partner], mixing.share)
    parts = [mixup(x[r], x[mixing.partner[r]], mixing.share) for r in (slice(0, 12), slice(12, 24))]
    assert torch.equal(torch.cat(parts), whole)


# --- what is trained on ---------------------------------------------------------------------------


@pytest.fixture
def trained_on(monkeypatch):
    """The training set of a method, by class: images whose first pixel says what they are."""
    kinds = {"real": 1, "synthetic": 2}

    def images(kind, labels):
        return torch.full((len(labels), 1, 2, 2), kinds[kind], dtype=torch.uint8)

    real, more = training(False)[0], training()[0][sum(REAL):]
    pool = SimpleNamespace(
        images=images("synthetic", more), labels=more, band=torch.zeros(len(more), dtype=torch.int8),
        distance=torch.linspace(0, 3, len(more)),
    )
    monkeypatch.setattr("diffult_ray.stages.pool.read_pool", lambda folder: pool)
    train = SimpleNamespace(images=images("real", real).numpy(), labels=real.numpy())
    split = SimpleNamespace(train=train, num_classes=CLASSES, streamed=False)

    def make(method, synthetic, **filter):
        e = Experiment(
            select="test", method=method, synthetic=synthetic, filter=filter, generation={"per_class": 40},
            classifier={"synthetic_weight": OMEGA},
        )
        stage = classifier(e)
        inputs = dict.fromkeys(stage.inputs, "")
        payload = {"config": stage.config, "inputs": inputs, "part": None, "packed_pool": ""}
        return training_set(payload, split), pool

    return make


@pytest.mark.parametrize("method", [m for m in METHODS if m != "ce"])
def test_every_method_trains_on_the_kept_images_beside_the_real_ones(trained_on, method):
    data, pool = trained_on(method, True, threshold=2)
    kept = pool.distance <= 2
    synthetic = data.images[:, 0, 0, 0] == 2
    assert (data.generated, data.kept) == (len(kept), int(kept.sum())) and 0 < data.kept < data.generated
    assert torch.equal(data.labels[synthetic], pool.labels[kept])
    assert torch.equal(data.weights, torch.where(synthetic, OMEGA, 1.0))
    copies = int((~synthetic).sum()) - sum(REAL)
    assert copies == (len(kept) - data.kept if method == "oversample" else 0)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "diffult"])
def test_every_method_trains_on_the_real_images_alone(trained_on, method):
    data, _ = trained_on(method, False)
    assert (data.generated, data.kept) == (0, 0) and bool((data.weights == 1).all())
    filled = method == "oversample"
    assert torch.bincount(data.labels).tolist() == ([40] * CLASSES if filled else REAL)
    assert bool((data.images == 1).all())


def test_copies_fill_what_the_filter_leaves(trained_on):
    data, _ = trained_on("oversample", True, threshold=1.0)
    assert torch.bincount(data.labels).tolist() == [40] * CLASSES
    everything, pool = trained_on("oversample", True, threshold="inf")
    assert len(everything.labels) == sum(REAL) + len(pool.labels)


# --- equal steps, equal epochs --------------------------------------------------------------------


def test_epochs_go_over_all_that_is_trained_on_and_steps_are_steps():
    alone, more = len(training(False)[0]), len(training()[0])
    assert (alone, more) == (59, 160)
    by_epochs, by_steps = config("reweight", epochs=10, batch_size=16), config("reweight", steps=10)
    assert [total_steps(by_epochs, n) for n in (alone, more)] == [40, 100]
    assert [total_steps(by_steps, n) for n in (alone, more)] == [10, 10]


# --- the normed head ------------------------------------------------------------------------------

NETWORK = {"architecture": "cnn", "num_classes": 5, "channels": 1, "image_size": 8}


def test_a_normed_head_gives_cosines_times_its_scale():
    model = build_classifier(**NETWORK, scale=30.0).double()
    features, logits = torch.randn(7, 32).double(), []
    for f in features.tolist():
        for w in model.head.weight.tolist():
            dot = sum(a * b for a, b in zip(f, w, strict=True))
            logits.append(30 * dot / math.hypot(*f) / math.hypot(*w))
    assert model.head(features).flatten().tolist() == pytest.approx(logits, rel=1e-9)
    assert model.head.weight.norm(dim=1).tolist() == pytest.approx([1.0] * 5, rel=1e-6)
    assert set(model.state_dict()) - set(build_classifier(**NETWORK).state_dict()) == set()


def test_a_normed_heads_logits_are_float32_under_autocast():
    model = build_classifier(**NETWORK, scale=30.0)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(torch.randn(4, 1, 8, 8))
    assert logits.dtype == torch.float32 and bool((logits.abs() <= 30.001).all())


def test_a_normed_head_changes_no_weight_of_the_backbone():
    models = []
    for scale in (None, 30.0):
        torch.manual_seed(0)
        models.append(build_classifier(**NETWORK, scale=scale).backbone.state_dict())
    assert all(torch.equal(tensor, models[1][name]) for name, tensor in models[0].items())
