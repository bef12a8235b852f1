"""The generator's losses as pure functions: DDPM, CBDM, AID, and EDM with its preconditioning."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch

SIGMA_DATA = 0.5  # of EDM: the standard deviation of images in [-1, 1] (Karras et al., 2022, table 1)
LOG_SIGMA = (-1.2, 1.2)  # mean and deviation of ln(sigma) in training (ibid.)


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


def label_weights(
    counts: torch.Tensor,
    distribution: Literal["frequencies", "uniform", "balanced"],
    *,
    sampled: torch.Tensor | None = None,
) -> torch.Tensor:
    """Weights [C], not normalised, by which CBDM draws y'.

    - frequencies: the training counts, as the released code has them.
    - uniform: every class alike, as in that code's fine-tuning mode.
    - balanced (ours): the distribution p that makes the labels of y and y' together as even as they
      can be. With q the distribution of y, p_c = max(0, level - q_c), the level such that p sums to
      one: the classes that y has least are filled up to it, as water would fill them. The mixture
      (p + q) / 2 then has the largest entropy that any p can give it, and is uniform wherever no
      class has more than 2 / C of the batch.

    Args:
        counts: [C] training images a class.
        distribution: one of the three.
        sampled: [C], what y is drawn in proportion to; the counts unless given.

    Raises:
        ValueError: for another distribution.
    """
    if distribution == "frequencies":
        return counts.float()
    if distribution == "uniform":
        return torch.ones_like(counts, dtype=torch.float)
    if distribution != "balanced":
        raise ValueError(f"distribution is frequencies, uniform or balanced, not {distribution!r}")
    drawn = (counts if sampled is None else sampled).double()
    q = drawn / drawn.sum()
    least = q.sort().values
    # The level if the k smallest are filled; right for the last k whose class still lies below it.
    levels = (1 + least.cumsum(0)) / torch.arange(1, len(q) + 1, device=q.device)
    level = levels[(least < levels).nonzero()[-1]]
    return (level - q).clamp_min(0).float()


# --- the AID loss ---------------------------------------------------------------------------------


def predicted_image(noisy: torch.Tensor, predicted: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """x0_hat = (x_t - sqrt(1 - a) e) / sqrt(a) (Ho et al., 2020, equation 15).

    Args:
        noisy: x_t, [n, C, H, W].
        predicted: e, of the same shape.
        kept: a = alpha-bar_t, [n].

    Returns:
        [n, C, H, W], not clamped.
    """
    a = _beside(kept, noisy)
    return (noisy - (1 - a).sqrt() * predicted) / a.sqrt()


def aid_loss(distance: torch.Tensor, diameter: torch.Tensor) -> torch.Tensor:
    """max(0, d_f - d) + max(0, d - 2 d_f) a sample: zero in the AID band, and rising away from it.

    Ours: DiffuLT (Shao et al., 2024) says that samples in ID and OOD are penalised, and no formula.

    Args:
        distance: d [n], of the predicted image to its class's centre in the extractor's features.
        diameter: d_f [n] of its class, in the same units.

    Returns:
        [n], in the units of the features.
    """
    return (diameter - distance).clamp_min(0) + (distance - 2 * diameter).clamp_min(0)


# --- EDM (Karras et al., 2022) --------------------------------------------------------------------


class Preconditioning(NamedTuple):
    """c_skip, c_out, c_in and c_noise, each of the shape of sigma."""

    skip: torch.Tensor
    out: torch.Tensor
    into: torch.Tensor
    noise: torch.Tensor


def edm_preconditioning(sigma: torch.Tensor, sigma_data: float = SIGMA_DATA) -> Preconditioning:
    """The network's scalings at noise level sigma (Karras et al., 2022, table 1, last column).

    c_skip = s^2 / (sigma^2 + s^2), c_out = sigma s / sqrt(sigma^2 + s^2), c_in = 1 / sqrt(sigma^2 + s^2)
    and c_noise = ln(sigma) / 4, with s = sigma_data.
    """
    total = sigma.square() + sigma_data**2
    return Preconditioning(
        skip=sigma_data**2 / total,
        out=sigma * sigma_data / total.sqrt(),
        into=1 / total.sqrt(),
        noise=sigma.log() / 4,
    )


def edm_input(noisy: torch.Tensor, sigma: torch.Tensor, sigma_data: float = SIGMA_DATA) -> torch.Tensor:
    """c_in x: what the network is shown of x [n, C, H, W] at sigma [n]."""
    return _beside(edm_preconditioning(sigma, sigma_data).into, noisy) * noisy


def edm_denoised(
    noisy: torch.Tensor, output: torch.Tensor, sigma: torch.Tensor, sigma_data: float = SIGMA_DATA
) -> torch.Tensor:
    """D(x; sigma) = c_skip x + c_out F (Karras et al., 2022, equation 7).

    Args:
        noisy: x = y + sigma n, [n, C, H, W].
        output: F, the network's output for `edm_input` and c_noise, of the same shape.
        sigma: [n].
    """
    c = edm_preconditioning(sigma, sigma_data)
    return _beside(c.skip, noisy) * noisy + _beside(c.out, noisy) * output


def edm_loss(
    denoised: torch.Tensor, clean: torch.Tensor, sigma: torch.Tensor, sigma_data: float = SIGMA_DATA
) -> torch.Tensor:
    """(sigma^2 + s^2) / (sigma s)^2 || D(y + sigma n; sigma) - y ||^2 a sample (ibid., equation 8, table 1).

    Args:
        denoised, clean: D and y, [n, C, H, W].
        sigma: [n].

    Returns:
        [n], the mean over C, H and W.
    """
    weight = (sigma.square() + sigma_data**2) / (sigma * sigma_data).square()
    return weight * (denoised - clean).square().flatten(1).mean(1)


def edm_sigmas(normal: torch.Tensor) -> torch.Tensor:
    """Training's noise levels, ln(sigma) ~ N(-1.2, 1.2^2), from standard normal numbers (ibid., table 1)."""
    mean, deviation = LOG_SIGMA
    return (mean + deviation * normal).exp()


def _beside(values: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """[n] or a scalar, shaped to multiply images [n, C, H, W]."""
    return values.to(images).reshape(-1, *[1] * (images.ndim - 1))


def make_noise_scheduler(timesteps: int) -> Any:
    """DDPM's forward process: T steps, linear beta 1e-4 .. 0.02, eps-prediction (Ho et al., 2020)."""
    from diffusers import DDPMScheduler

    return DDPMScheduler(num_train_timesteps=timesteps, beta_start=1e-4, beta_end=0.02)
