"""The generator's losses against slow, literal float64 transcriptions; stop-gradients by the gradients."""

import math

import pytest
import torch

from diffult_ray.method.diffusion import (
    aid_loss,
    cbdm_regulariser,
    ddpm_loss,
    edm_denoised,
    edm_input,
    edm_loss,
    edm_preconditioning,
    edm_sigmas,
    label_weights,
    make_noise_scheduler,
    predicted_image,
)

T = 1000


def predictions(seed=0, n=4):
    rng = torch.Generator().manual_seed(seed)
    e, other, noise = (torch.randn(n, 2, 3, 3, generator=rng, dtype=torch.float64) for _ in range(3))
    return e, other, noise, torch.tensor([0, 10, 500, 999])[:n]


def literal_cbdm(e, other, t, tau):
    losses = []
    for i in range(len(e)):
        total, count = 0.0, 0
        for c in range(e.shape[1]):
            for h in range(e.shape[2]):
                for w in range(e.shape[3]):
                    square = float(e[i, c, h, w] - other[i, c, h, w]) ** 2
                    total, count = total + square + square / 4, count + 1
        losses.append(tau * int(t[i]) / T * total / count)
    return losses


def test_ddpm_loss_is_the_mean_square_a_sample():
    e, _, noise, _ = predictions()
    literal = [float(((e[i] - noise[i]) ** 2).sum()) / 18 for i in range(4)]
    assert ddpm_loss(e, noise).tolist() == pytest.approx(literal, rel=1e-12)


@pytest.mark.parametrize("tau", [0.0, 1.0, 3.0])
def test_cbdm_regulariser_is_the_formula(tau):
    e, other, _, t = predictions()
    got = cbdm_regulariser(e, other, t, tau=tau, total_timesteps=T)
    assert got.tolist() == pytest.approx(literal_cbdm(e, other, t, tau), rel=1e-12, abs=1e-15)


def test_cbdm_regulariser_pulls_each_prediction_with_its_own_weight():
    e, other, _, t = predictions()
    e.requires_grad_(), other.requires_grad_()
    cbdm_regulariser(e, other, t, tau=2.0, total_timesteps=T).sum().backward()
    weight = (2.0 * t / T).view(-1, 1, 1, 1) / 18
    difference = (e - other).detach()
    torch.testing.assert_close(e.grad, 2 * weight * difference)  # of |e - sg(e')|^2 only
    torch.testing.assert_close(other.grad, -0.5 * weight * difference)  # of 1/4 |sg(e) - e'|^2 only


def test_the_noise_schedule_is_ddpms():
    scheduler = make_noise_scheduler(T)
    betas = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
    torch.testing.assert_close(scheduler.betas.double(), betas, rtol=1e-5, atol=0)
    x, noise = torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), 2.0)
    kept = torch.cumprod(1 - betas, 0)[499]
    noisy = scheduler.add_noise(x, noise, torch.tensor([499]))
    assert float(noisy) == pytest.approx(float(kept.sqrt() + 2 * (1 - kept).sqrt()), rel=1e-4)


# --- labels of the regulariser ----------------------------------------------------------------------

COUNTS = torch.tensor([60, 25, 10, 5])


@pytest.mark.parametrize(("distribution", "expected"), [
    ("frequencies", [0.6, 0.25, 0.1, 0.05]), ("uniform", [0.25] * 4),
    ("balanced", [0.0, 0.65 / 3, 1.1 / 3, 1.25 / 3]),  # up to the level (1 + 0.25 + 0.1 + 0.05) / 3
])
def test_the_label_distributions(distribution, expected):
    weights = label_weights(COUNTS, distribution)
    assert (weights / weights.sum()).tolist() == pytest.approx(expected, abs=1e-6)
    drawn = torch.multinomial(
        weights, 40_000, replacement=True, generator=torch.Generator().manual_seed(0)
    )
    assert (drawn.bincount(minlength=4) / 40_000).tolist() == pytest.approx(expected, abs=0.01)


def entropy(p):
    return float(-(p * p.clamp_min(1e-30).log()).sum())


def test_balanced_labels_make_the_two_together_as_even_as_they_can_be():
    """The mixture is uniform where it can be; else no other p gives it a larger entropy."""
    rng = torch.Generator().manual_seed(0)
    even = label_weights(torch.tensor([40, 30, 20, 10]), "balanced")
    mixed = (even / even.sum() + torch.tensor([0.4, 0.3, 0.2, 0.1])) / 2
    assert mixed.tolist() == pytest.approx([0.25] * 4)
    q = COUNTS / COUNTS.sum()
    p = label_weights(COUNTS, "balanced")
    p = p / p.sum()
    for _ in range(200):
        other = torch.rand(4, generator=rng) ** 3
        assert entropy((q + other / other.sum()) / 2) <= entropy((q + p) / 2) + 1e-6
        near = (p + 0.02 * torch.randn(4, generator=rng)).clamp_min(0)
        assert entropy((q + near / near.sum()) / 2) <= entropy((q + p) / 2) + 1e-6


def test_balanced_labels_of_balanced_batches_are_uniform():
    weights = label_weights(COUNTS, "balanced", sampled=torch.ones(4))
    assert (weights / weights.sum()).tolist() == pytest.approx([0.25] * 4)
    with pytest.raises(ValueError, match="not 'even'"):
        label_weights(COUNTS, "even")


# --- the AID loss -------------------------------------------------------------------------------------


def test_the_predicted_image_is_the_formula():
    e, x, _, t = predictions()
    kept = make_noise_scheduler(T).alphas_cumprod.double()[t]
    got = predicted_image(x, e, kept)
    for i in range(4):
        a = float(kept[i])
        literal = [(float(v) - (1 - a) ** 0.5 * float(w)) / a**0.5
                   for v, w in zip(x[i].flatten(), e[i].flatten(), strict=True)]
        assert got[i].flatten().tolist() == pytest.approx(literal, rel=1e-12)


def test_the_predicted_image_of_the_true_noise_is_the_image():
    x, _, noise, t = predictions()
    scheduler = make_noise_scheduler(T)
    noisy = scheduler.add_noise(x, noise, t)
    found = predicted_image(noisy, noise, scheduler.alphas_cumprod[t])
    torch.testing.assert_close(found, x, rtol=0, atol=1e-3)


@pytest.mark.parametrize(("d", "loss", "slope"), [
    (0.0, 1.5, -1), (0.5, 1.0, -1), (1.6, 0.0, 0), (2.9, 0.0, 0), (3.5, 0.5, 1), (10.0, 7.0, 1),
])
def test_the_aid_loss_is_zero_in_its_band_and_rises_away_from_it(d, loss, slope):
    distance = torch.tensor([d], dtype=torch.float64, requires_grad=True)
    found = aid_loss(distance, torch.tensor([1.5], dtype=torch.float64))
    found.sum().backward()
    assert found.tolist() == [pytest.approx(loss)]
    assert float(distance.grad) == slope


# --- EDM ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("s", [0.5, 1.3])
def test_edms_denoiser_and_loss_are_the_formulas(s):
    x, output, clean, _ = predictions()
    sigma = torch.tensor([0.002, 0.3, 1.7, 80.0], dtype=torch.float64)
    shown, denoised = edm_input(x, sigma, s), edm_denoised(x, output, sigma, s)
    loss, times = edm_loss(denoised, clean, sigma, s), edm_preconditioning(sigma, s).noise
    for i, level in enumerate(sigma.tolist()):
        root, total = math.sqrt(level**2 + s**2), 0.0
        assert float(times[i]) == pytest.approx(math.log(level) / 4, rel=1e-12)
        for c in range(2):
            for h in range(3):
                for w in range(3):
                    v = float(x[i, c, h, w])
                    assert float(shown[i, c, h, w]) == pytest.approx(v / root, rel=1e-12)
                    d = s**2 / root**2 * v + level * s / root * float(output[i, c, h, w])
                    assert float(denoised[i, c, h, w]) == pytest.approx(d, rel=1e-12)
                    total += (d - float(clean[i, c, h, w])) ** 2 / 18
        assert float(loss[i]) == pytest.approx(root**2 / (level * s) ** 2 * total, rel=1e-10)


def test_edms_scalings_give_the_network_unit_variances():
    """Appendix B.6: data of deviation s; c_in x and the target of F have variance one at every sigma."""
    rng = torch.Generator().manual_seed(0)
    clean = 0.5 * torch.randn(50_000, 1, 1, 1, generator=rng, dtype=torch.float64)
    noise = torch.randn(clean.shape, generator=rng, dtype=torch.float64)
    for level in (0.01, 0.3, 5.0):
        sigma = torch.full((50_000,), level, dtype=torch.float64)
        noisy, c = clean + level * noise, edm_preconditioning(sigma)
        target = (clean - c.skip.view(-1, 1, 1, 1) * noisy) / c.out.view(-1, 1, 1, 1)
        assert float(edm_input(noisy, sigma).std()) == pytest.approx(1, abs=0.02)
        assert float(target.std()) == pytest.approx(1, abs=0.02)
        weighted = edm_loss(edm_denoised(noisy, torch.zeros_like(noisy), sigma), clean, sigma)
        torch.testing.assert_close(weighted, target.square().flatten())  # lambda c_out^2 = 1


def test_edms_noise_levels_are_log_normal():
    logs = edm_sigmas(torch.randn(50_000, generator=torch.Generator().manual_seed(0))).log()
    assert float(logs.mean()) == pytest.approx(-1.2, abs=0.02)
    assert float(logs.std()) == pytest.approx(1.2, abs=0.02)
