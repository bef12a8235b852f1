"""Sampling by diffusers' schedulers with classifier-free guidance; each image has its own noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch

from diffult_ray.method.diffusion import SIGMA_DATA, edm_denoised, edm_input, edm_preconditioning
from diffult_ray.seeds import stream

SAMPLERS = {  # by objective
    "ddpm": ("ddpm", "ddim", "dpmsolver++", "heun"),
    "edm": ("heun", "dpmsolver++"),
}
SIGMAS = (0.002, 80.0)  # of EDM: the last and the first noise level (Karras et al., 2022, table 1)

Network = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def make_scheduler(sampler: str, *, objective: str = "ddpm", timesteps: int | None = None, steps: int) -> Any:
    """A diffusers scheduler set to `steps` steps.

    A step is one evaluation of the network, or, of `heun`, two in each step but the last; guidance
    doubles their cost. For objective `ddpm` the linear beta schedule 1e-4 .. 0.02 and eps-prediction of
    DDPM (Ho et al., 2020), by one of

    - ddpm: ancestral sampling (ibid., algorithm 2). With as many steps as timesteps the variance is
      beta_t, as in the public CBDM code; with fewer, the posterior's, which is DDIM with eta 1 and
      stands few steps far better (Song et al., 2021, table 1).
    - ddim: Song et al., 2021, eta 0. Predicted images are clipped to [-1, 1] and the noise is derived from
      the clipped ones, as by Nichol and Dhariwal, 2021; without that a clipped step leaves its path.
    - dpmsolver++: DPM-Solver++ (2M), Lu et al., 2022.
    - heun: Karras et al., 2022, algorithm 1 without churn, at noise levels between those of the first and
      the last timestep, spaced as for edm; the network is shown times between the timesteps. Predicted
      images are clipped, as ddim's.

    For objective `edm`, noise levels spaced as in Karras et al., 2022, equation 5 (rho 7), by one of

    - heun: as above, without clipping.
    - dpmsolver++: as above, at these noise levels.

    Args:
        timesteps: T of a ddpm generator.

    Raises:
        ValueError: if the objective is unknown, or is not sampled so; for heun in fewer than 2 steps.
    """
    if sampler not in SAMPLERS.get(objective, ()):
        raise ValueError(f"sampler is one of {SAMPLERS.get(objective)} for {objective}, not {sampler!r}")
    if sampler == "heun" and steps < 2:
        raise ValueError(f"heun takes 2 steps or more, from the first noise level to the last, not {steps}")
    scheduler = _edm_scheduler(sampler) if objective == "edm" else _ddpm_scheduler(sampler, timesteps, steps)
    scheduler.set_timesteps(steps)
    return scheduler


def _ddpm_scheduler(sampler: str, timesteps: int | None, steps: int) -> Any:
    from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler

    common = {"num_train_timesteps": timesteps, "beta_start": 1e-4, "beta_end": 0.02}
    if sampler == "ddpm":
        variance = "fixed_large" if steps == timesteps else "fixed_small"
        return DDPMScheduler(**common, timestep_spacing="trailing", variance_type=variance)
    if sampler == "ddim":
        return DDIMScheduler(**common, timestep_spacing="trailing")
    if sampler == "heun":
        return HeunDiscreteScheduler(**common, use_karras_sigmas=True, clip_sample=True)
    # Steps even in log-SNR, as the paper has them. diffusers' default, even in time, leaves the
    # last 1/steps of the way to one step, which takes variance away (tests/test_sampling.py).
    return DPMSolverMultistepScheduler(**common, use_lu_lambdas=True)


def _edm_scheduler(sampler: str) -> Any:
    from diffusers import EDMDPMSolverMultistepScheduler

    low, high = SIGMAS
    if sampler == "dpmsolver++":
        return EDMDPMSolverMultistepScheduler(sigma_min=low, sigma_max=high, sigma_data=SIGMA_DATA)
    # Two betas with the noise levels of both ends; the scheduler fills in those between by rho 7.
    kept = [1 / (1 + sigma**2) for sigma in SIGMAS]
    return _edm_heun()(
        num_train_timesteps=2, trained_betas=[1 - kept[0], 1 - kept[1] / kept[0]],
        use_karras_sigmas=True, prediction_type="sample",
    )


@lru_cache(maxsize=1)
def _edm_heun() -> type:
    """diffusers' Heun scheduler around an EDM network: it is shown c_in x and c_noise, and returns F."""
    from diffusers import HeunDiscreteScheduler

    class EDMHeun(HeunDiscreteScheduler):
        def set_timesteps(self, *args: Any, **named: Any) -> None:
            super().set_timesteps(*args, **named)
            self.timesteps = edm_preconditioning(self.sigmas[:-1]).noise
            self._step_index = 0  # or it would look itself up by a time, of which most come twice

        def scale_model_input(self, sample: torch.Tensor, timestep: Any = None) -> torch.Tensor:
            return edm_input(sample, self.sigmas[self.step_index])

        def step(self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, **named: Any) -> Any:
            denoised = edm_denoised(sample, model_output, self.sigmas[self.step_index])
            return super().step(denoised, timestep, sample, **named)

    return EDMHeun


def initial_noise(seeds: Sequence[int], shape: tuple[int, int, int]) -> torch.Tensor:
    """Standard normal noise [n, C, H, W]; an image's depends on its own seed only."""
    noise = torch.empty(len(seeds), *shape)
    for row, seed in zip(noise, seeds, strict=True):
        row.normal_(generator=torch.Generator().manual_seed(int(seed)))
    return noise


@torch.no_grad()
def sample(
    network: Network,
    scheduler: Any,
    noise: torch.Tensor,
    labels: torch.Tensor,
    *,
    guidance: float,
    null_label: int,
    seeds: Sequence[int] | None = None,
) -> torch.Tensor:
    """Images [n, C, H, W] in [-1, 1] from noise of the same shape.

    eps + w (eps - eps_null) with w = `guidance`, both evaluations in one batch (Ho and Salimans,
    2022, in the weighting of the CBDM code). w = 0 needs one evaluation only. EDM's network output is
    extrapolated likewise: its denoiser and eps are affine in it.

    Args:
        network: (what the scheduler shows it of the images, times [n], labels [n]) -> its output: the
            noise, or F of EDM.
        scheduler: of `make_scheduler`; its state is reset, so that it can be used again.
        seeds: one an image; the noise of ancestral steps is drawn from streams of their own.

    Raises:
        ValueError: for ancestral sampling without seeds.
    """
    options = _step_options(scheduler, seeds)
    scheduler.set_timesteps(scheduler.num_inference_steps)
    images = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        shown = scheduler.scale_model_input(images, t)
        time = t.to(images.device, non_blocking=True).expand(len(images))
        if guidance == 0:
            predicted = network(shown, time, labels)
        else:
            nothing = torch.full_like(labels, null_label)
            both = network(shown.repeat(2, 1, 1, 1), time.repeat(2), torch.cat([labels, nothing]))
            with_label, without = both.chunk(2)
            predicted = with_label + guidance * (with_label - without)
        images = scheduler.step(predicted, t, images, **options).prev_sample
    return images.clamp(-1, 1)


def _step_options(scheduler: Any, seeds: Sequence[int] | None) -> dict[str, Any]:
    """What the steps of a scheduler are told beside the image.

    DDIM's: to derive the noise from the clipped image. Ancestral ones: what they draw from, a generator an
    image, whatever its company.
    """
    from diffusers import DDIMScheduler, DDPMScheduler

    if isinstance(scheduler, DDIMScheduler):
        return {"use_clipped_model_output": True}
    if not isinstance(scheduler, DDPMScheduler):
        return {}
    if seeds is None:
        raise ValueError("ancestral sampling draws noise in each step, so it needs the images' seeds")
    return {"generator": [torch.Generator().manual_seed(stream(int(s), "steps")) for s in seeds]}


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """[-1, 1] float to 0..255 uint8."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
