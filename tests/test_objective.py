"""What a generator learns from a batch: draws that no rank changes, and losses put together literally."""

import pytest
import torch
from torch import nn

from diffult_ray.config import Generator
from diffult_ray.method.bands import ClassStatistics
from diffult_ray.method.objective import Guide, Objective

COUNTS = torch.tensor([50, 30, 15, 5])
NULL = 4


def objective(guide=None, **values) -> Objective:
    return Objective(dict(Generator(**values)), COUNTS, guide)


def batch(n=8, seed=0):
    rng = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 1, 4, 4, generator=rng) * 2 - 1
    return x, torch.randint(0, 4, (n,), generator=rng)


def drawn(made: Objective, n=8, seed=0):
    x, classes = batch(n)
    return x, made.draw(classes, x.shape[1:], *(torch.Generator().manual_seed(seed + i) for i in range(2)))


class Network(nn.Module):
    """A function of images, times and labels with weights of its own, in float64."""

    def __init__(self):
        super().__init__()
        rng = torch.Generator().manual_seed(3)
        self.label = nn.Parameter(torch.randn(5, generator=rng, dtype=torch.float64))
        self.scale = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self, images, times, labels):
        self.asked = labels
        each = len(labels) // len(images)
        shift = self.label[labels] + times.double().sin().repeat(each)
        return self.scale * images.double().repeat(each, 1, 1, 1) + shift.view(-1, 1, 1, 1)


class Planes(Network):
    """Takes conditions too: its output is of the image's channels."""

    def forward(self, images, times, labels):
        return super().forward(images[:, :1] + images[:, 1:].sum(1, keepdim=True), times, labels)


def guide(scale=1.0):
    """Features: the image's mean and deviation; the centres lie at 0, 1, 2, 3."""
    centre = torch.arange(4.0).double()[:, None].expand(4, 2).clone()

    def features(images):
        return torch.stack([images.mean((1, 2, 3)), images.square().mean((1, 2, 3))], 1)

    return Guide(features, ClassStatistics(centre, torch.full((4,), scale).double(), normalise=False))


# --- draws --------------------------------------------------------------------------------------------


def test_a_dropped_batch_has_no_label_and_no_regulariser():
    made = objective(regulariser="cbdm", label_drop=0.5)
    draws = [drawn(made, seed=10 * i)[1] for i in range(60)]
    whole = [d for d in draws if bool(d.dropped.all())]
    assert 0.3 < len(whole) / 60 < 0.7
    assert all(d.others is None and bool((d.labels == NULL).all()) for d in whole)
    assert all(torch.equal(d.labels, d.classes) for d in draws if not bool(d.dropped.any()))
    assert all(bool(d.dropped.all()) or not bool(d.dropped.any()) for d in draws)


def test_each_sample_drops_its_own_label():
    made = objective(regulariser="cbdm", label_drop=0.25, label_drop_scope="sample")
    _, found = drawn(made, n=4000)
    assert float(found.dropped.float().mean()) == pytest.approx(0.25, abs=0.03)
    assert bool((found.labels[found.dropped] == NULL).all())
    assert torch.equal(found.labels[~found.dropped], found.classes[~found.dropped])


def test_a_sample_without_a_label_has_no_regulariser_and_its_neighbours_have():
    network = Network()
    plain = objective(label_drop=0.5, label_drop_scope="sample")
    pulled = objective(regulariser="cbdm", tau=2.0, label_drop=0.5, label_drop_scope="sample")
    x, found = drawn(pulled)
    assert 0 < int(found.dropped.sum()) < 8
    with torch.no_grad():
        more = pulled.losses(network, x, found) - plain.losses(network, x, drawn(plain)[1])
    assert bool((more[found.dropped] == 0).all()) and bool((more[~found.dropped] >= 0).all())
    assert float(more.sum()) > 0


def test_the_labels_of_the_regulariser_follow_their_distribution():
    for distribution, expected in (("frequencies", [0.5, 0.3, 0.15, 0.05]), ("uniform", [0.25] * 4),
                                   ("balanced", [0.0, 0.2, 0.35, 0.45])):
        made = objective(regulariser="cbdm", label_drop=0, label_distribution=distribution)
        others = drawn(made, n=20_000)[1].others
        assert (others.bincount(minlength=4) / 20_000).tolist() == pytest.approx(expected, abs=0.015)


@pytest.mark.parametrize("values", [
    {}, {"regulariser": "cbdm", "label_drop_scope": "sample", "label_drop": 0.3}, {"objective": "edm"},
    {"aid_weight": 0.5, "label_drop_scope": "sample", "label_drop": 0.3},
    {"regulariser": "cbdm", "augment": 0.5},
])
def test_the_ranks_losses_are_the_rows_of_the_batchs(values):
    made = objective(guide(), **values)
    x, whole = drawn(made)
    network = Network() if not made.config["augment"] else Planes()
    together = made.losses(network, x, whole)
    for rows in (slice(0, 3), slice(3, 8)):
        torch.testing.assert_close(made.losses(network, x[rows], whole.only(rows)), together[rows])


# --- losses -------------------------------------------------------------------------------------------


def test_cbdms_predictions_are_of_the_two_labels_in_one_pass_and_gradients_stop_between_them():
    """With a weight a label, the gradients of y and y' are those of the formula with its constants."""
    made = objective(regulariser="cbdm", tau=2.0, label_drop=0)
    x, classes = batch()
    classes = torch.zeros_like(classes)  # y is 0 throughout, and y' mostly another
    found = made.draw(classes, x.shape[1:], *(torch.Generator().manual_seed(i) for i in (4, 5)))
    network = Network()
    made.losses(network, x, found).sum().backward()
    assert torch.equal(network.asked, torch.cat([found.labels, found.others]))
    expected = torch.zeros(5, dtype=torch.float64)
    with torch.no_grad():
        noisy = made.noising.add_noise(x, found.noise, found.levels)
        for i in range(8):
            e = network(noisy[i : i + 1], found.levels[i : i + 1], found.labels[i : i + 1])
            other = network(noisy[i : i + 1], found.levels[i : i + 1], found.others[i : i + 1])
            weight = 2.0 * int(found.levels[i]) / 1000
            expected[0] += 2 * float((e - found.noise[i]).mean()) + 2 * weight * float((e - other).mean())
            expected[found.others[i]] += -0.5 * weight * float((e - other).mean())
    torch.testing.assert_close(network.label.grad, expected, rtol=1e-5, atol=1e-7)


def test_edm_is_shown_its_scaled_input_and_the_logarithm_of_its_noise():
    made, shown = objective(objective="edm"), []

    def network(images, times, labels):
        shown.append((images, times))
        return torch.zeros_like(images)

    x, found = drawn(made)
    losses = made.losses(network, x, found)
    (images, times), = shown
    for i in range(8):
        sigma = float(found.levels[i])
        noisy = x[i] + sigma * found.noise[i]
        torch.testing.assert_close(images[i], noisy / (sigma**2 + 0.25) ** 0.5)
        assert float(times[i]) == pytest.approx(torch.tensor(sigma).log().item() / 4, rel=1e-5, abs=1e-6)
        error = (0.25 / (sigma**2 + 0.25) * noisy - x[i]).square().mean()
        weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
        assert float(losses[i]) == pytest.approx(weight * float(error), rel=1e-4)


@pytest.mark.parametrize("kind", ["ddpm", "edm"])
def test_the_aid_loss_is_weighed_by_lambda_and_the_share_of_signal(kind):
    values = {"objective": kind, "label_drop": 0.5, "label_drop_scope": "sample"}
    plain, guided = objective(**values), objective(guide(0.4), aid_weight=3.0, **values)
    x, found = drawn(guided)
    with torch.no_grad():
        extra = guided.losses(Network(), x, found) - plain.losses(Network(), x, found)
    network = Network()
    for i in range(8):
        if bool(found.dropped[i]):
            assert float(extra[i]) == 0
            continue
        y, noise, level = found.labels[i : i + 1], found.noise[i : i + 1], found.levels[i : i + 1]
        with torch.no_grad():
            if kind == "ddpm":
                a = float(torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000).double(), 0)[level])
                noisy = a**0.5 * x[i : i + 1] + (1 - a) ** 0.5 * noise
                image = (noisy - (1 - a) ** 0.5 * network(noisy, level, y)) / a**0.5
            else:
                sigma = float(level)
                noisy, a, total = x[i : i + 1] + sigma * noise, 1 / (1 + sigma**2), sigma**2 + 0.25
                output = network(noisy / total**0.5, level.log() / 4, y)
                image = 0.25 / total * noisy + sigma * 0.5 / total**0.5 * output
        image = image.clamp(-1, 1)
        mean, square = float(image.mean()), float(image.square().mean())
        d = ((mean - int(y)) ** 2 + (square - int(y)) ** 2) ** 0.5
        literal = 3.0 * a * (max(0, 0.4 - d) + max(0, d - 0.8))
        assert float(extra[i]) == pytest.approx(literal, rel=1e-4, abs=1e-7)
    assert float(extra.sum()) > 0


def test_the_aid_loss_moves_the_generator_and_not_the_extractor():
    extractor = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).requires_grad_(False)
    statistics = ClassStatistics(torch.zeros(4, 2).double(), torch.full((4,), 1e-3).double(), normalise=False)
    made = objective(Guide(extractor, statistics), aid_weight=1.0, label_drop=0)
    x, found = drawn(made)
    output = torch.zeros_like(x, requires_grad=True)
    noisy = made.noising.add_noise(x, found.noise, found.levels)
    kept = made.noising.alphas_cumprod[found.levels]
    image = (noisy - (1 - kept).sqrt().view(-1, 1, 1, 1) * output) / kept.sqrt().view(-1, 1, 1, 1)
    made.guide.loss(image, found.classes).sum().backward()
    inside = image.detach().abs() < 1
    assert bool((output.grad[~inside] == 0).all()) and bool((output.grad[inside] != 0).any())
    assert all(p.grad is None for p in extractor.parameters())


def test_a_normalised_guide_measures_normalised_features():
    statistics = ClassStatistics(torch.tensor([[1.0, 0.0]]).double(), torch.ones(1).double(), normalise=True)
    images = torch.full((1, 1, 2, 2), 0.5)
    made = Guide(lambda x: x.flatten(1)[:, :2] * torch.tensor([0.0, 7.0]), statistics)  # normalised: (0, 1)
    assert float(made.loss(images, torch.tensor([0]))) == pytest.approx(0.0)  # d = sqrt(2), in the AID band
    near = Guide(lambda x: x.flatten(1)[:, :2] * torch.tensor([7.0, 0.0]), statistics)
    assert float(near.loss(images, torch.tensor([0]))) == pytest.approx(1.0)  # d = 0


def test_what_cannot_be_learnt_is_refused():
    with pytest.raises(ValueError, match="no extractor to guide"):
        objective(aid_weight=1.0)
    with pytest.raises(ValueError, match="cbdm is a regulariser of ddpm"):
        Objective(dict(Generator()) | {"objective": "edm", "regulariser": "cbdm"}, COUNTS)
