"""The generator's losses against slow, literal float64 transcriptions; stop-gradients by the gradients."""

import pytest
import torch

from diffult_ray.method.diffusion import cbdm_regulariser, ddpm_loss, make_noise_scheduler

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
