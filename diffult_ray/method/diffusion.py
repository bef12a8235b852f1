"""The DDPM loss and the CBDM regulariser, as pure functions of predictions."""

from __future__ import annotations

from typing import Any

import torch


def ddpm_loss(predicted: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """|| eps - eps_theta(x_t, t, y) ||^2 a sample (Ho et al., 2020, equation 14).

    Args:
        predicted, noise: [n, C, H, W].

    Returns:
        [n], the mean over C, H and W.
    """
    return (predicted - noise).square().flatten(1).mean(1)


def cbdm_regulariser(
    predicted: torch.Tensor,
    other: torch.Tensor,
    timesteps: torch.Tensor,
    *,
    tau: float,
    total_timesteps: int,
) -> torch.Tensor:
    """(tau t / T) (|| e - sg(e') ||^2 + 1/4 || sg(e) - e' ||^2) a sample (Qin et al., 2023).

    Args:
        predicted: e, for the sample's own label, [n, C, H, W].
        other: e', for a label y' drawn from the label distribution, [n, C, H, W].
        timesteps: t, [n].
        tau: weight of the regulariser.
        total_timesteps: T.

    Returns:
        [n], the mean over C, H and W.
    """
    pull = (predicted - other.detach()).square() + 0.25 * (predicted.detach() - other).square()
    weight = tau * timesteps.to(predicted.dtype) / total_timesteps
    return weight * pull.flatten(1).mean(1)


def make_noise_scheduler(timesteps: int) -> Any:
    """DDPM's forward process: T steps, linear beta 1e-4 .. 0.02, eps-prediction (Ho et al., 2020)."""
    from diffusers import DDPMScheduler

    return DDPMScheduler(num_train_timesteps=timesteps, beta_start=1e-4, beta_end=0.02)
