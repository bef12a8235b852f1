"""Samplers on cases with a known answer: a Gaussian and a mixture, whose noise predictions are known."""

import numpy as np
import pytest
import torch

from diffult_ray import config
from diffult_ray.method import sampling
from diffult_ray.method.diffusion import edm_preconditioning
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


def posterior_mean(x, signal, noise, means, weights, deviation):
    """E[x_0 | x = signal x_0 + noise n] where x_0 is a mixture of normals of one deviation, a pixel each."""
    spread = signal**2 * deviation**2 + noise**2
    each = [m + signal * deviation**2 * (x - signal * m) / spread for m in means]
    logits = [np.log(w) - (x - signal * m) ** 2 / (2 * spread) for m, w in zip(means, weights, strict=True)]
    shares = torch.stack(logits).softmax(0)
    return (shares * torch.stack(each)).sum(0)


def ddpm_mixture(means, weights, deviation):
    """E[eps | x_t] of a mixture."""
    kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, T, dtype=torch.float64), 0)
    levels = ((1 - kept) / kept).log().numpy()

    def network(x, t, y):
        level = torch.from_numpy(np.interp(t.double().numpy(), np.arange(T), levels))  # heun asks in between
        a = torch.sigmoid(-level).view(-1, 1, 1, 1)
        found = posterior_mean(x.double(), a.sqrt(), (1 - a).sqrt(), means, weights, deviation)
        return ((x - a.sqrt() * found) / (1 - a).sqrt()).to(x.dtype)

    return network


def edm_mixture(means, weights, deviation):
    """F of a mixture, as a trained network would give it: from c_in x and c_noise alone."""

    def network(shown, time, y):
        sigma = (4 * time.double()).exp().view(-1, 1, 1, 1)
        c = edm_preconditioning(sigma)
        x = shown.double() / c.into
        found = posterior_mean(x, torch.ones_like(sigma), sigma, means, weights, deviation)
        return ((found - c.skip * x) / c.out).to(shown.dtype)

    return network


def draw(scheduler, n=250, guidance=0.0, denoise=None):
    """n images of 32 pixels, each a draw of its own."""
    noise = torch.randn(n, 1, 4, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(n, dtype=torch.int64)
    return sample(
        denoise or exact_denoiser(), scheduler, noise, labels, guidance=guidance, null_label=1,
        seeds=range(n),
    )


GAUSSIAN = [  # objective, sampler, steps, tolerance
    ("ddpm", "ddim", 100, 0.015), ("ddpm", "ddim", 1000, 0.01),
    ("ddpm", "dpmsolver++", 12, 0.02), ("ddpm", "dpmsolver++", 30, 0.012),
    ("ddpm", "heun", 18, 0.02), ("ddpm", "heun", 40, 0.01),
    ("edm", "heun", 18, 0.02), ("edm", "heun", 40, 0.01),
    ("edm", "dpmsolver++", 18, 0.02), ("edm", "dpmsolver++", 40, 0.01),
]


@pytest.mark.parametrize(("objective", "sampler", "steps", "within"), GAUSSIAN)
def test_samples_have_the_gaussians_mean_and_deviation(objective, sampler, steps, within):
    exact = {"ddpm": ddpm_mixture, "edm": edm_mixture}[objective]([MEAN], [1.0], DEVIATION)
    scheduler = make_scheduler(sampler, objective=objective, timesteps=T, steps=steps)
    got = draw(scheduler, denoise=exact)
    assert float(got.mean()) == pytest.approx(MEAN, abs=within)
    assert float(got.std()) == pytest.approx(DEVIATION, abs=within)


def ancestral_deviation(steps):
    """Of ancestral sampling of the Gaussian: each step is linear, x <- A x + B + sqrt(v) n."""
    kept = np.cumprod(1 - np.linspace(1e-4, 0.02, T))
    times = [T * (steps - i) // steps - 1 for i in range(steps)]
    variance = 1.0
    for t, following in zip(times, [*times[1:], None], strict=True):
        now, then = kept[t], 1.0 if following is None else kept[following]
        beta = 1 - now / then
        slope = np.sqrt(now) * DEVIATION**2 / (now * DEVIATION**2 + 1 - now)  # of E[x_0 | x_t] in x_t
        gain = np.sqrt(then) * beta / (1 - now) * slope + np.sqrt(now / then) * (1 - then) / (1 - now)
        added = beta if steps == T else beta * (1 - then) / (1 - now)  # DDPM, equations 6 and 7
        variance = gain**2 * variance + (added if following is not None else 0)
    return np.sqrt(variance)


@pytest.mark.parametrize("steps", [20, 100, 1000])
def test_ancestral_samples_have_the_deviation_of_their_steps(steps):
    """Few steps take deviation away, which is the sampler's and no fault of its code."""
    exact = ddpm_mixture([MEAN], [1.0], DEVIATION)
    got = draw(make_scheduler("ddpm", timesteps=T, steps=steps), denoise=exact)
    assert float(got.mean()) == pytest.approx(MEAN, abs=0.01)
    assert float(got.std()) == pytest.approx(ancestral_deviation(steps), abs=0.005)
    assert steps < T or ancestral_deviation(T) == pytest.approx(DEVIATION, abs=0.001)


MIXTURE = [0.5, -0.3], [0.25, 0.75], 0.1  # means, weights, deviation


@pytest.mark.parametrize(("objective", "sampler", "steps"), [
    ("ddpm", "ddim", 100), ("ddpm", "dpmsolver++", 30), ("ddpm", "heun", 30), ("ddpm", "ddpm", 1000),
    ("edm", "heun", 30), ("edm", "dpmsolver++", 40),
])
def test_samples_have_the_mixtures_parts(objective, sampler, steps):
    exact = {"ddpm": ddpm_mixture, "edm": edm_mixture}[objective](*MIXTURE)
    scheduler = make_scheduler(sampler, objective=objective, timesteps=T, steps=steps)
    got = draw(scheduler, denoise=exact)
    (right, left), weights, deviation = MIXTURE
    upper = got > (right + left) / 2
    assert float(upper.float().mean()) == pytest.approx(weights[0], abs=0.03)
    for part, mean in ((got[upper], right), (got[~upper], left)):
        assert float(part.mean()) == pytest.approx(mean, abs=0.015)
        assert float(part.std()) == pytest.approx(deviation, abs=0.015)


@pytest.mark.parametrize("objective", ["ddpm", "edm"])
def test_the_networks_see_the_noise_levels_of_their_papers(objective):
    if objective == "edm":
        i = torch.arange(18, dtype=torch.float64)  # equation 5 of Karras et al.
        levels = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
        heun = make_scheduler("heun", objective="edm", steps=18)
        assert len(heun.timesteps) == 2 * 18 - 1
        twice = torch.cat([levels[:1], levels[1:].repeat_interleave(2)]).float()
        torch.testing.assert_close((4 * heun.timesteps).exp(), twice, rtol=0.01, atol=0)
        solver = make_scheduler("dpmsolver++", objective="edm", steps=18)
        torch.testing.assert_close((4 * solver.timesteps).exp(), levels.float(), rtol=1e-4, atol=0)
    else:
        assert make_scheduler("ddpm", timesteps=T, steps=T).timesteps.tolist() == list(range(999, -1, -1))
        few = make_scheduler("ddpm", timesteps=T, steps=4)
        assert few.timesteps.tolist() == [999, 749, 499, 249]


def test_heun_is_the_papers_second_order_step():
    """Algorithm 1 of Karras et al. with S_churn 0, written out, on a network that is not linear."""
    levels = (4 * make_scheduler("heun", objective="edm", steps=5).timesteps.double()).exp()
    levels = torch.cat([levels[:1], levels[1::2], torch.zeros(1)]).tolist()

    def network(shown, time, y):
        return torch.sin(shown) + time.view(-1, 1, 1, 1)

    def slope(x, sigma):
        c = edm_preconditioning(torch.tensor(sigma, dtype=torch.float64))
        return (x - (c.skip * x + c.out * (torch.sin(c.into * x) + c.noise))) / sigma

    noise = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    x = noise.double() * levels[0]
    for sigma, following in zip(levels[:-1], levels[1:], strict=True):
        first = slope(x, sigma)
        euler = x + (following - sigma) * first
        x = euler if following == 0 else x + (following - sigma) * (first + slope(euler, following)) / 2
    scheduler = make_scheduler("heun", objective="edm", steps=5)
    got = sample(network, scheduler, noise, torch.zeros(3).long(), guidance=0, null_label=1)
    torch.testing.assert_close(got.double(), x.clamp(-1, 1), rtol=1e-3, atol=1e-4)
    assert bool((x.abs() < 1).any())


@pytest.mark.parametrize(("objective", "sampler"), [
    (objective, sampler) for objective, samplers in sampling.SAMPLERS.items() for sampler in samplers
])
def test_an_image_is_the_same_in_any_company(objective, sampler):
    exact = {"ddpm": ddpm_mixture, "edm": edm_mixture}[objective](*MIXTURE)

    def images(seeds):
        scheduler = make_scheduler(sampler, objective=objective, timesteps=T, steps=6)
        noise = initial_noise(seeds, (1, 4, 4))
        labels = torch.zeros(len(seeds), dtype=torch.int64)
        return sample(exact, scheduler, noise, labels, guidance=0, null_label=1, seeds=seeds)

    together, alone = images([5, 6, 7]), images([6])
    torch.testing.assert_close(together[1:2], alone, rtol=0, atol=1e-6)
    assert not torch.allclose(together[0], together[1])


def test_ancestral_steps_draw_noise_of_their_own_and_need_seeds():
    noise = initial_noise([1, 1], (1, 4, 4))
    labels = torch.zeros(2, dtype=torch.int64)
    scheduler = make_scheduler("ddpm", timesteps=T, steps=6)
    got = sample(exact_denoiser(), scheduler, noise, labels, guidance=0, null_label=1, seeds=[1, 2])
    assert not torch.allclose(got[0], got[1])
    with pytest.raises(ValueError, match="needs the images' seeds"):
        sample(exact_denoiser(), scheduler, noise, labels, guidance=0, null_label=1)


def test_edms_guidance_extrapolates_the_denoiser():
    """Of a class at 0.2 and a null class at 0, each a point: the guided images are a point at 0.2 (1 + w)."""
    point = {0: edm_mixture([0.2], [1.0], 0.0), 1: edm_mixture([0.0], [1.0], 0.0)}

    def network(shown, time, y):
        parts = {label: each(shown, time, y) for label, each in point.items()}
        return torch.where(y.view(-1, 1, 1, 1) == 0, parts[0], parts[1])

    for sampler in sampling.SAMPLERS["edm"]:
        scheduler = make_scheduler(sampler, objective="edm", steps=12)
        got = draw(scheduler, n=8, guidance=1.5, denoise=network)
        torch.testing.assert_close(got, torch.full_like(got, 0.5), rtol=0, atol=2e-3)


def test_ddim_derives_the_noise_from_the_clipped_image():
    """A network that aims beyond white: each step stays on the way from the noise to white itself."""
    scheduler = make_scheduler("ddim", timesteps=T, steps=10)
    noises = []

    def aims_at(x, t, white):
        signal = scheduler.alphas_cumprod[int(t[0])]
        return (x - signal.sqrt() * white) / (1 - signal).sqrt()

    def network(x, t, y):
        noises.append(aims_at(x, t, 1.0))
        return aims_at(x, t, 2.0)

    assert draw(scheduler, n=2, denoise=network).eq(1).all()
    for noise in noises[2:]:
        torch.testing.assert_close(noise, noises[1], rtol=0, atol=1e-3)


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


@pytest.mark.parametrize(("objective", "sampler"), [
    ("ddpm", "dpmsolver++"), ("ddpm", "ddpm"), ("ddpm", "heun"), ("edm", "heun"), ("edm", "dpmsolver++"),
])
def test_a_scheduler_can_be_used_again(objective, sampler):
    exact = {"ddpm": ddpm_mixture, "edm": edm_mixture}[objective](*MIXTURE)
    scheduler = make_scheduler(sampler, objective=objective, timesteps=T, steps=5)
    assert torch.equal(draw(scheduler, n=8, denoise=exact), draw(scheduler, n=8, denoise=exact))


def test_an_images_noise_is_its_own():
    together = initial_noise([5, 6, 7], (1, 4, 4))
    assert torch.equal(together[1:2], initial_noise([6], (1, 4, 4)))
    assert not torch.equal(together[0], together[1])


def test_an_unknown_sampler_is_named():
    with pytest.raises(ValueError, match="sampler is one of .*'euler'"):
        make_scheduler("euler", timesteps=T, steps=5)
    with pytest.raises(ValueError, match="sampler is one of .*heun.* for edm, not 'ddim'"):
        make_scheduler("ddim", objective="edm", steps=5)


@pytest.mark.parametrize("objective", ["ddpm", "edm"])
def test_heun_takes_two_steps_or_more(objective):
    assert len(make_scheduler("heun", objective=objective, timesteps=T, steps=2).timesteps) == 3
    with pytest.raises(ValueError, match="heun takes 2 steps or more.*, not 1"):
        make_scheduler("heun", objective=objective, timesteps=T, steps=1)


def test_the_configuration_allows_the_samplers_that_there_are():
    assert config.SAMPLERS == sampling.SAMPLERS


def test_uint8_covers_the_range():
    got = to_uint8(torch.tensor([-1.0, -0.999, 0.0, 1.0, 1.5]))
    assert got.tolist() == [0, 0, 128, 255, 255]
    assert got.numpy().dtype == np.uint8
