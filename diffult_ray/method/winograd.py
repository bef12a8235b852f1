"""3x3 convolutions on a processor with a quarter of the products: Winograd's F(4x4, 3x3).

Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016 (arXiv:1509.09308). oneDNN's
convolutions, which are torch's, multiply directly. The products are torch's own; the transforms before and
behind them are C, in winograd.c (`native`). Without a compiler convolutions stay torch's. float32 ends some
3e-6 from float64 instead of 3e-7.
"""

from __future__ import annotations

import ctypes

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from diffult_ray.method import native
from diffult_ray.method.native import at, lasts, sizes

NUMBERS, SIDE = 36, 4  # of a tile; pixels that are its own
FEWEST_CHANNELS, FEWEST_TILES = 64, 64  # below, a direct convolution is as fast: docs/RESULTS.md
TILES = 128  # at a time, so that what lies between two steps stays in the cache


def takes(conv: torch.nn.Module) -> bool:
    """Whether a layer is a convolution of the kind, wide enough that it pays."""
    return (
        isinstance(conv, torch.nn.Conv2d) and conv.kernel_size == (3, 3) and conv.stride == (1, 1)
        and conv.padding == (1, 1) and conv.dilation == (1, 1) and conv.groups == 1
        and all(n >= FEWEST_CHANNELS and n % native.LANES == 0 for n in (conv.in_channels, conv.out_channels))
    )


def pays(x: torch.Tensor, weight: torch.Tensor, *, doubled: bool = False) -> bool:
    """Whether `conv2d` of the same is Winograd's.

    It is, if there is a compiler, for float32 without autocast, for heights and widths that 4 divides,
    channels that 16 divides, and enough pixels.
    """
    n, c, height, width = x.shape
    times = 2 if doubled else 1
    divides = not (times * height % SIDE or times * width % SIDE)
    divides = divides and not (c % native.LANES or len(weight) % native.LANES)
    enough = n * height * width * times**2 >= FEWEST_TILES * SIDE**2
    return divides and enough and native.takes(x)


def conv2d(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, doubled: bool = False
) -> torch.Tensor:
    """`functional.conv2d` with a padding of 1; torch's own where Winograd's does not pay.

    Args:
        x: [n, C, H, W]; taken as channels-last.
        weight: [K, C, 3, 3]; taken as channels-last.
        bias: [K].
        doubled: each pixel is taken twice in both directions: nearest-neighbour upsampling.

    Returns:
        [n, K, H, W] or, doubled, [n, K, 2 H, 2 W]; Winograd's in channels-last.
    """
    if not pays(x, weight, doubled=doubled):
        x = functional.interpolate(x, scale_factor=2.0, mode="nearest") if doubled else x
        return functional.conv2d(x, weight, bias, padding=1)
    found = _Convolution.apply(lasts(x), lasts(weight), bias, doubled)
    assert isinstance(found, torch.Tensor)
    return found


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, doubled):
        ctx.save_for_backward(x, weight)
        ctx.doubled, times = doubled, 2 if doubled else 1
        c, (n, channels, height, width), k = native.library(), x.shape, len(weight)
        y = torch.empty(n, k, times * height, times * width, memory_format=torch.channels_last)
        kernels, room = _kernels(weight, turned=True), (_memory(y, channels), _memory(y, k))
        for some in _shares(y):
            v, m = (_products(each, y[some]) for each in room)
            c.tiles(at(x[some]), at(v), doubled, *_sizes(y[some], channels))
            torch.bmm(_factors(v), kernels, out=m)
            c.pixels(at(m), None if bias is None else at(bias), at(y[some]), *_sizes(y[some], k))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        c, (k, channels), grad = native.library(), weight.shape[:2], lasts(grad)
        for_x, for_weight = torch.empty_like(x), torch.empty_like(weight)
        for_kernels = torch.empty(NUMBERS, k, channels)
        kernels, room = _kernels(weight, turned=False), (_memory(grad, channels), _memory(grad, k))
        for some in _shares(grad):
            v, m = (_products(each, grad[some]) for each in room)
            c.tiles(at(x[some]), at(v), ctx.doubled, *_sizes(grad[some], channels))
            c.pixels_adjoint(at(grad[some]), at(m), *_sizes(grad[some], k))
            rows = _factors(m).transpose(1, 2)
            torch.baddbmm(for_kernels, rows, _factors(v), beta=int(some.start > 0), out=for_kernels)
            if ctx.needs_input_grad[0]:
                torch.bmm(_factors(m), kernels, out=v)
                c.tiles_adjoint(at(v), at(for_x[some]), ctx.doubled, *_sizes(grad[some], channels))
        c.kernels_adjoint(at(for_kernels), at(for_weight), *sizes(for_kernels.stride(0), k, channels))
        return for_x, for_weight, grad.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None, None


def _kernels(weight: torch.Tensor, *, turned: bool) -> torch.Tensor:
    """[K, C, 3, 3] as [36, K, C] or, turned, as [36, C, K]: products are faster with rows than with columns.

    Its 36 parts lie no power of two apart, as all would then have the same few places in the caches.
    """
    k, c = weight.shape[:2]
    rows, columns = (c, k) if turned else (k, c)
    u = torch.empty(NUMBERS, rows + 1, columns)[:, :rows]
    fill = native.library().kernels_turned if turned else native.library().kernels
    fill(at(weight), at(u), *sizes(u.stride(0), k, c))
    return u


def _shares(x: torch.Tensor) -> list[slice]:
    """Of images [n, C, H, W], those at a time."""
    at_once = max(1, TILES * SIDE**2 // (x.shape[2] * x.shape[3]))
    return [slice(first, first + at_once) for first in range(0, len(x), at_once)]


def _memory(x: torch.Tensor, channels: int) -> torch.Tensor:
    """For the tiles of images [n, _, H, W] at a time, used for all: [tiles, 36 channels]."""
    at_a_time = x[_shares(x)[0]]
    return torch.empty(at_a_time[:, 0].numel() // SIDE**2, NUMBERS * channels)


def _products(memory: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Of it, what products have of some images [n, C, H, W]: [36, tiles, channels]."""
    tiles = images[:, 0].numel() // SIDE**2
    return memory[:tiles].view(NUMBERS, tiles, -1)


def _factors(products: torch.Tensor) -> torch.Tensor:
    """The same, for what is laid out in it as [tiles, 36, channels]."""
    numbers, tiles, channels = products.shape
    return products.view(tiles, numbers, channels).transpose(0, 1)


def _sizes(images: torch.Tensor, channels: int) -> list[ctypes.c_size_t]:
    n, _, height, width = images.shape
    return sizes(n, height, width, channels)
