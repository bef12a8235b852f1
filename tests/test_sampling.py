"""Samplers on a case with a known answer: a Gaussian, whose noise prediction is linear."""

import numpy as np
import pytest
import torch

from diffult_ray.method.sampling import initial_noise, make_scheduler, sample, to_uint8

T = 1000
MEAN, DEVIATION = 0.3, 0.2


def exact_denoiser(mean=MEAN, deviation=DEVIATION):
    """E[eps | x_t] where x_0 is normal: with a = alpha-bar, sqrt(1-a) (x_t - sqrt(a) m) / (a s^2 + 1 - a)."""
    kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, T, dtype=torch.float64), 0)

    def denoise(x, t, y):
        a = kept[t].view(-1, 1, 1, 1).to(x.dtype)
        return (1 - a).sqrt() * (x - a.sqrt() * mean) / (a * deviation**2 + 1 - a)

    return denoise


def draw(scheduler, n=4000, guidance=0.0, denoise=None):
    noise = torch.randn(n, 1, 1, 2, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(n, dtype=torch.int64)
    return sample(
        denoise or exact_denoiser(), scheduler, noise, labels, guidance=guidance, null_label=1
    )


@pytest.mark.parametrize(("sampler", "steps", "within"), [
    ("ddim", 100, 0.015), ("ddim", 1000, 0.01), ("dpmsolver++", 12, 0.02), ("dpmsolver++", 30, 0.012),
])
def test_samples_have_the_gaussians_mean_and_deviation(sampler, steps, within):
    got = draw(make_scheduler(sampler, timesteps=T, steps=steps))
    assert float(got.mean()) == pytest.approx(MEAN, abs=within)
    assert float(got.std()) == pytest.approx(DEVIATION, abs=within)


def test_guidance_is_the_extrapolation_from_the_null_class():
    asked = []

    def denoise(x, t, y):
        asked.append(y.clone())
        return torch.where(y.view(-1, 1, 1, 1) == 1, 0.1, 0.3) * torch.ones_like(x)

    guided = draw(make_scheduler("ddim", timesteps=T, steps=2), n=3, guidance=1.5, denoise=denoise)
    assert asked[0].tolist() == [0, 0, 0, 1, 1, 1]  # both evaluations in one batch
    constant = draw(
        make_scheduler("ddim", timesteps=T, steps=2), n=3,
        denoise=lambda x, t, y: torch.full_like(x, 0.3 + 1.5 * (0.3 - 0.1)),
    )
    torch.testing.assert_close(guided, constant)


def test_a_scheduler_can_be_used_again():
    scheduler = make_scheduler("dpmsolver++", timesteps=T, steps=5)
    assert torch.equal(draw(scheduler, n=8), draw(scheduler, n=8))


def test_an_images_noise_is_its_own():
    together = initial_noise([5, 6, 7], (1, 4, 4))
    assert torch.equal(together[1:2], initial_noise([6], (1, 4, 4)))
    assert not torch.equal(together[0], together[1])


def test_an_unknown_sampler_is_named():
    with pytest.raises(ValueError, match="sampler is one of .*'euler'"):
        make_scheduler("euler", timesteps=T, steps=5)


def test_uint8_covers_the_range():
    got = to_uint8(torch.tensor([-1.0, -0.999, 0.0, 1.0, 1.5]))
    assert got.tolist() == [0, 0, 128, 255, 255]
    assert got.numpy().dtype == np.uint8
