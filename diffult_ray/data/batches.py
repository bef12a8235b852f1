"""Batches by step: the global batch is a function of seed and step, and each rank takes its share.

So a run's batches do not depend on how many workers share them, and a run that goes on from a
checkpoint sees the batches it would have seen.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch.nn.functional import pad

from diffult_ray.seeds import stream


@lru_cache(maxsize=4)
def _epoch(seed: int, epoch: int, n: int) -> torch.Tensor:
    return torch.randperm(n, generator=generator(seed, "epoch", epoch))


def generator(seed: int, *names: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator for the stream `names` of `seed`."""
    return torch.Generator(device=device).manual_seed(stream(seed, *names))


def batch_indices(*, seed: int, step: int, batch_size: int, n: int) -> torch.Tensor:
    """Indices [batch_size] of global step `step` (from 0): shuffled epochs one after another."""
    first = step * batch_size
    parts, wanted = [], batch_size
    while wanted:
        epoch, offset = divmod(first, n)
        part = _epoch(seed, epoch, n)[offset : offset + wanted]
        parts.append(part)
        wanted -= len(part)
        first += len(part)
    return torch.cat(parts)


def share(n: int, *, rank: int, world: int) -> slice:
    """Which of the n rows of a global batch are rank's: contiguous, sizes differ by one at most."""
    return slice(n * rank // world, n * (rank + 1) // world)


def random_crop(images: torch.Tensor, padding: int, rng: torch.Generator) -> torch.Tensor:
    """Each image [n, C, H, W] shifted by its own offset within zero padding."""
    if padding == 0:
        return images
    n, _, height, width = images.shape
    padded = pad(images, (padding,) * 4)
    offsets = torch.randint(0, 2 * padding + 1, (2, n, 1), generator=rng, device=images.device)
    rows = offsets[0] + torch.arange(height, device=images.device)
    columns = offsets[1] + torch.arange(width, device=images.device)
    which = torch.arange(n, device=images.device)[:, None, None]
    # Advanced indices around a slice put the indexed dimensions first: [n, H, W, C].
    return padded[which, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def random_flip(images: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Each image [n, C, H, W] mirrored left to right with probability one half."""
    mirrored = torch.rand(len(images), generator=rng, device=images.device) < 0.5
    return torch.where(mirrored[:, None, None, None], images.flip(3), images)
