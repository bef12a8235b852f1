"""Augmentation that does not leak: the generator is told what was done to an image, and asked for none.

The exact part ("pixel blitting") of EDM's pipe (Karras et al., 2022, appendix F.2): mirroring, turning
upside down, quarter turns and whole-pixel shifts, each with the same probability. The six numbers that
say so are shown to the network as constant planes beside the image's channels, since diffusers' U-Net
takes no vector but the label (ours); images are sampled with all of them zero.
"""

from __future__ import annotations

import torch

CONDITIONS = 6  # mirrored; upside down; turned by 1 or 2, by 2 or 3 quarters; shifted right, shifted down
LARGEST_SHIFT = 8  # a shift is of at most 1 / 8 of the image


def draw_conditions(n: int, size: int, probability: float, rng: torch.Generator) -> torch.Tensor:
    """Conditions [n, 6] for square images of `size` pixels.

    Shifts are in units of the largest one, so that all numbers lie between -1 and 1.
    """
    device = rng.device
    chosen = torch.rand(n, 4, generator=rng, device=device) < probability
    mirrored, flipped = (torch.rand(n, 2, generator=rng, device=device) < 0.5).unbind(1)
    turns = torch.randint(0, 4, (n,), generator=rng, device=device) * chosen[:, 2]
    most = _most(size)
    shift = torch.randint(-most, most + 1, (n, 2), generator=rng, device=device) / most * chosen[:, 3:]
    turned = ((turns == 1) | (turns == 2), (turns == 2) | (turns == 3))
    flags = torch.stack([mirrored & chosen[:, 0], flipped & chosen[:, 1], *turned], 1)
    return torch.cat([flags.float(), shift], 1)


def transformed(images: torch.Tensor, conditions: torch.Tensor) -> torch.Tensor:
    """Square images [n, C, H, W] as their conditions [n, 6] say.

    Mirrored, turned upside down, turned and shifted in this order; what a shift brings in is the
    image's reflection.
    """
    mirrored, flipped, one, two = (flag.bool().view(-1, 1, 1, 1) for flag in conditions[:, :4].unbind(1))
    out = torch.where(mirrored, images.flip(3), images)
    out = torch.where(flipped, out.flip(2), out)
    for quarters, which in ((1, one & ~two), (2, one & two), (3, two & ~one)):
        out = torch.where(which, out.rot90(quarters, (2, 3)), out)
    shift = (conditions[:, 4:] * _most(images.shape[-1])).round().long()
    out = _shifted(out, shift[:, 0], 3)
    return _shifted(out, shift[:, 1], 2)


def with_planes(images: torch.Tensor, conditions: torch.Tensor) -> torch.Tensor:
    """What the network is shown: images [n, C, H, W] and a plane a condition, [n, C + 6, H, W]."""
    planes = conditions.to(images)[:, :, None, None].expand(-1, -1, *images.shape[2:])
    return torch.cat([images, planes], 1)


def _most(size: int) -> int:
    return max(1, size // LARGEST_SHIFT)


def _shifted(images: torch.Tensor, by: torch.Tensor, dim: int) -> torch.Tensor:
    last = images.shape[dim] - 1
    source = (torch.arange(last + 1, device=images.device) - by[:, None]).abs()
    source = last - (last - source).abs()  # [n, size], reflected at both ends
    index = source.view(len(images), 1, *((1, -1) if dim == 3 else (-1, 1))).expand_as(images)
    return images.gather(dim, index)
