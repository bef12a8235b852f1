"""3x3 convolutions on a processor with a quarter of the products: Winograd's F(4x4, 3x3).

Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016 (arXiv:1509.09308). oneDNN's
convolutions, which are torch's, multiply directly. A convolution is one pass in C, winograd.c (`native`): a
thread takes few tiles from image to image, as what lies between the transforms and the products would
otherwise go through memory. So is the gradient of kernels of few channels. Without a compiler convolutions
stay torch's. float32 ends some 3e-6 from float64 instead of 3e-7.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from diffult_ray.method import native
from diffult_ray.method.native import at, lasts, sizes

NUMBERS, SIDE = 36, 4  # of a tile; pixels that are its own
FEWEST_CHANNELS, FEWEST_TILES = 64, 16  # below, a direct convolution is as fast: docs/RESULTS.md
AT_ONCE, AT_ONCE_FOR_KERNELS = 32, 128  # tiles, so that what lies between two steps stays in the cache
APART = 2**16  # numbers between two threads' rooms: winograd.c
LEAST_PARTS, MOST_IN_PARTS = 8, 64 * 64  # of sums of kernels' gradients; kernels for which they pay


def takes(conv: torch.nn.Module, fewest: int = FEWEST_CHANNELS) -> bool:
    """Whether a layer is a convolution of the kind, of at least so many channels."""
    return (
        isinstance(conv, torch.nn.Conv2d) and conv.kernel_size == (3, 3) and conv.stride == (1, 1)
        and conv.padding == (1, 1) and conv.dilation == (1, 1) and conv.groups == 1
        and all(n >= fewest and n % native.LANES == 0 for n in (conv.in_channels, conv.out_channels))
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
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    more: torch.Tensor | None = None,
    aside: torch.Tensor | None = None,
    *,
    doubled: bool = False,
) -> torch.Tensor:
    """`functional.conv2d` with a padding of 1, plus two more; torch's own where Winograd's does not pay.

    Args:
        x: [n, C, H, W]; taken as channels-last.
        weight: [K, C, 3, 3]; taken as channels-last.
        bias: [K].
        more: [n, K], which is added to all pixels of an image.
        aside: [n, K, H, W], which is added; or of n / m images, each of which is added to m, in turn.
        doubled: each pixel is taken twice in both directions: nearest-neighbour upsampling.

    Returns:
        [n, K, H, W] or, doubled, [n, K, 2 H, 2 W]; Winograd's in channels-last.
    """
    if not pays(x, weight, doubled=doubled):
        x = functional.interpolate(x, scale_factor=2.0, mode="nearest") if doubled else x
        return direct(x, weight, bias, more, aside)
    aside = None if aside is None else lasts(aside)
    found = _Convolution.apply(lasts(x), lasts(weight), _whole(bias, more), aside, doubled)
    assert isinstance(found, torch.Tensor)
    return found


def direct(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    more: torch.Tensor | None = None,
    aside: torch.Tensor | None = None,
) -> torch.Tensor:
    """`conv2d` by torch's convolution."""
    return plus(functional.conv2d(x, weight, bias, padding=1), more, aside)


def plus(y: torch.Tensor, more: torch.Tensor | None, aside: torch.Tensor | None) -> torch.Tensor:
    """What `conv2d` adds to a convolution y [n, K, H, W]."""
    y = y if more is None else y + more[:, :, None, None]
    return y if aside is None else summed(y, aside)


def summed(x: torch.Tensor, aside: torch.Tensor) -> torch.Tensor:
    """Of x [n or m n, ...] and aside [n, ...], whose rows are added to m of x each, in turn."""
    if len(x) == len(aside):
        return x + aside
    return (x.unflatten(0, (-1, len(aside))) + aside).flatten(0, 1)


def forward(
    conv: torch.nn.Conv2d,
    x: torch.Tensor,
    more: torch.Tensor | None = None,
    aside: torch.Tensor | None = None,
    *,
    doubled: bool = False,
) -> torch.Tensor:
    """`conv2d` in the place of a layer's own `forward`."""
    keeps = hasattr(conv, "kept_numbers") and not torch.is_grad_enabled()
    if not keeps or not pays(x, conv.weight, doubled=doubled):
        return conv2d(x, conv.weight, conv.bias, more, aside, doubled=doubled)
    if conv.kept_numbers is None:
        conv.kept_numbers = kernels(lasts(conv.weight))
    bias, aside = _whole(conv.bias, more), None if aside is None else lasts(aside)
    return convolved(lasts(x), conv.kept_numbers, len(conv.weight), bias, aside, doubled=doubled)


def keep_numbers(conv: torch.nn.Conv2d) -> None:
    """Let `forward` keep what it makes of the weights, which are not to change: four times their memory."""
    conv.kept_numbers = None


def is_winograd(conv: torch.nn.Module) -> bool:
    """Whether it has been put there."""
    return getattr(conv.forward, "__func__", None) is forward


def _whole(bias: torch.Tensor | None, more: torch.Tensor | None) -> torch.Tensor | None:
    """[K] for all images, or [n, K]."""
    return bias if more is None else more if bias is None else bias + more


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, aside, doubled):
        ctx.save_for_backward(x, weight)
        ctx.doubled, ctx.biases = doubled, 0 if bias is None else bias.dim()
        ctx.asides = 0 if aside is None else len(aside)
        return convolved(x, kernels(weight), len(weight), bias, aside, doubled=doubled)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad, for_x, for_bias, for_aside = lasts(grad), None, None, None
        if ctx.needs_input_grad[0]:
            for_x = convolved(grad, kernels(weight, turned=True), weight.shape[1])
            for_x = 4 * functional.avg_pool2d(for_x, 2) if ctx.doubled else for_x
        if ctx.needs_input_grad[2]:
            for_bias = grad.sum((2, 3) if ctx.biases == 2 else (0, 2, 3))
        if ctx.needs_input_grad[3]:
            for_aside = grad if ctx.asides == len(grad) else grad.unflatten(0, (-1, ctx.asides)).sum(0)
        return for_x, kernels_gradient(x, grad, weight, doubled=ctx.doubled), for_bias, for_aside, None


def convolved(
    x: torch.Tensor,
    u: torch.Tensor,
    outputs: int,
    bias: torch.Tensor | None = None,
    aside: torch.Tensor | None = None,
    *,
    doubled: bool = False,
    onto: bool = False,
    moments: torch.Tensor | None = None,
    rectified: torch.Tensor | None = None,
) -> torch.Tensor:
    """[n, K, H, W] of x [n, C, H, W] and `kernels`; all are channels-last.

    Args:
        bias: [K] or [n, K].
        aside: as in `conv2d`.
        onto: the result lies where `aside` was.
        moments: `room_for_moments`, to be filled with those of what is returned, without `aside`.
        rectified: a scale and a shift [2, C], for the convolution of `relu(x * scale + shift)`.
    """
    (n, channels, height, width), times = x.shape, 2 if doubled else 1
    y = aside
    if y is None or not onto:
        y = torch.empty(n, outputs, times * height, times * width, memory_format=torch.channels_last)
    threads = torch.get_num_threads()
    room = torch.empty(_rooms(threads, channels, outputs))
    bias = None if bias is None else bias.contiguous()
    bias_apart = outputs if bias is not None and bias.dim() == 2 else 0
    native.library().convolution(
        *map(at, (x, rectified, u)), *sizes(u.stride(0)), at(bias), *sizes(bias_apart),
        at(aside), *sizes(0 if aside is None else len(aside)), *map(at, (y, moments, room)), doubled,
        *sizes(AT_ONCE, threads, n, times * height, times * width, channels, outputs),
    )
    return y


def _rooms(threads: int, channels: int, outputs: int) -> int:
    """The numbers of all threads' rooms, as `step` and `own_part` in winograd.c have them."""
    own = AT_ONCE * (NUMBERS * (channels + outputs) + 2 * native.LANES)
    return threads * own + (threads + 1) * APART


def room_for_moments(images: torch.Tensor, channels: int) -> torch.Tensor:
    """[tiles, 2, channels]: of a tile's own pixels the mean and the sum of squares around it."""
    return torch.empty(_tiles(images), 2, channels)


def kernels(weight: torch.Tensor, *, turned: bool = False) -> torch.Tensor:
    """The numbers [36, K C] of weights [K, C, 3, 3] to convolve with or, turned, for the gradient of x."""
    k, c = weight.shape[:2]
    u = torch.empty(NUMBERS, k * c + native.LANES)  # no power of two apart
    fill = native.library().kernels_turned if turned else native.library().kernels
    fill(at(weight), at(u), *sizes(u.stride(0), k, c))
    return u


def kernels_gradient(
    x: torch.Tensor,
    grad: torch.Tensor,
    weight: torch.Tensor,
    *,
    doubled: bool = False,
    rectified: torch.Tensor | None = None,
) -> torch.Tensor:
    """Of [K, C, 3, 3], from x, or what `convolved` makes of it, and from the gradient of what came of it."""
    k, c = weight.shape[:2]
    by = _gradient_in_parts if k * c <= MOST_IN_PARTS else _gradient_by_torch
    return by(x, rectified, grad, torch.empty_like(weight), doubled)


def _gradient_in_parts(
    x: torch.Tensor, rectified: torch.Tensor | None, grad: torch.Tensor, found: torch.Tensor, doubled: bool
) -> torch.Tensor:
    (k, channels), threads = found.shape[:2], torch.get_num_threads()
    sums = NUMBERS * (k * channels + native.LANES)
    parts = max(LEAST_PARTS, threads)
    room = torch.empty(parts * sums + _rooms(threads, channels, k))
    native.library().kernels_gradient(
        *map(at, (x, rectified, grad, found, room)), doubled,
        *sizes(AT_ONCE, parts, threads, len(x), *grad.shape[2:], channels, k),
    )
    return found


def _gradient_by_torch(
    x: torch.Tensor, rectified: torch.Tensor | None, grad: torch.Tensor, found: torch.Tensor, doubled: bool
) -> torch.Tensor:
    """Of many channels the sums would not stay in a cache, and torch's products are as fast."""
    c, (k, channels) = native.library(), found.shape[:2]
    u = torch.empty(NUMBERS, k, channels)
    at_once = max(1, AT_ONCE_FOR_KERNELS * SIDE**2 // (grad.shape[2] * grad.shape[3]))
    images = [slice(first, first + at_once) for first in range(0, len(grad), at_once)]
    v, m = (torch.empty(_tiles(grad[images[0]]), NUMBERS, n) for n in (channels, k))
    for some in images:
        n, shape = _tiles(grad[some]), grad[some][:, 0].shape
        c.tiles(*map(at, (x[some], rectified, v)), doubled, *sizes(*shape, channels))
        c.pixels_adjoint(at(grad[some]), at(m), *sizes(*shape, k))
        rows, columns = m[:n].permute(1, 2, 0), v[:n].transpose(0, 1)
        torch.baddbmm(u, rows, columns, beta=int(some.start > 0), out=u)
    c.kernels_adjoint(at(u), at(found), *sizes(u.stride(0), k, channels))
    return found


def _tiles(images: torch.Tensor) -> int:
    return images[:, 0].numel() // SIDE**2
