"""Sampling by diffusers' schedulers with classifier-free guidance; each image has its own noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

SAMPLERS = ("ddim", "dpmsolver++")

Denoiser = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def make_scheduler(sampler: str, *, timesteps: int, steps: int) -> Any:
    """A diffusers scheduler set to `steps` evaluations (NFE; guidance doubles their cost).

    The linear beta schedule 1e-4 .. 0.02 and eps-prediction of DDPM (Ho et al., 2020). DDIM: Song et
    al., 2021, eta 0. DPM-Solver++ (2M): Lu et al., 2022.
    """
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    common = {"num_train_timesteps": timesteps, "beta_start": 1e-4, "beta_end": 0.02}
    if sampler == "ddim":
        scheduler = DDIMScheduler(**common, timestep_spacing="trailing")
    elif sampler == "dpmsolver++":
        # Steps even in log-SNR, as the paper has them. diffusers' default, even in time, leaves the
        # last 1/steps of the way to one step, which takes variance away (tests/test_sampling.py).
        scheduler = DPMSolverMultistepScheduler(**common, use_lu_lambdas=True)
    else:
        raise ValueError(f"sampler is one of {SAMPLERS}, not {sampler!r}")
    scheduler.set_timesteps(steps)
    return scheduler


def initial_noise(seeds: Sequence[int], shape: tuple[int, int, int]) -> torch.Tensor:
    """Standard normal noise [n, C, H, W]; an image's depends on its own seed only."""
    noise = torch.empty(len(seeds), *shape)
    for row, seed in zip(noise, seeds, strict=True):
        row.normal_(generator=torch.Generator().manual_seed(int(seed)))
    return noise


@torch.no_grad()
def sample(
    denoise: Denoiser,
    scheduler: Any,
    noise: torch.Tensor,
    labels: torch.Tensor,
    *,
    guidance: float,
    null_label: int,
) -> torch.Tensor:
    """Images [n, C, H, W] in [-1, 1] from noise of the same shape.

    eps + w (eps - eps_null) with w = `guidance`, both evaluations in one batch (Ho and Salimans,
    2022, in the weighting of the CBDM code). w = 0 needs one evaluation only.

    Args:
        denoise: (images, timesteps [n], labels [n]) -> predicted noise.
        scheduler: of `make_scheduler`; its state is reset, so that it can be used again.
    """
    scheduler.set_timesteps(scheduler.num_inference_steps)
    images = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        time = torch.full((len(images),), int(t), device=images.device)
        if guidance == 0:
            predicted = denoise(images, time, labels)
        else:
            nothing = torch.full_like(labels, null_label)
            both = denoise(images.repeat(2, 1, 1, 1), time.repeat(2), torch.cat([labels, nothing]))
            with_label, without = both.chunk(2)
            predicted = with_label + guidance * (with_label - without)
        images = scheduler.step(predicted, t, images).prev_sample
    return images.clamp(-1, 1)


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """[-1, 1] float to 0..255 uint8."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
