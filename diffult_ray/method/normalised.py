"""A group norm, with the SiLU and the dropout behind it in one pass, in C for a processor: normalised.c.

torch's own write what lies between the two, keep it for the gradient, and take more than twice as long.
"""

from __future__ import annotations

import ctypes

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from diffult_ray.method import native
from diffult_ray.method.native import at, lasts, sizes
from diffult_ray.models.dropout import Drawn


def silu_of_group_norm(
    x: torch.Tensor,
    groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    drawn: Drawn | None = None,
) -> torch.Tensor:
    """`functional.silu(functional.group_norm(x, groups, weight, bias, eps))`, then a dropout.

    torch's own but for channels-last images in float32 or bf16 on a processor, whose channels 16 divides.

    Args:
        x: [n, C, H, W].
        weight: [C], as bias.
        drawn: what the dropout drew for a tensor of x's shape; None for no dropout.

    Returns:
        [n, C, H, W], in the layout of x.
    """
    fits = drawn is None or x.shape[2:].numel() % native.LANES == 0
    if not fits or not _takes(x, weight):
        y = functional.silu(functional.group_norm(x, groups, weight, bias, eps))
        return y if drawn is None else drawn.of(y)
    return _applied(x, groups, weight, bias, eps, True, drawn)


def group_norm(
    x: torch.Tensor, groups: int, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    """`functional.group_norm`: torch's own but for what `silu_of_group_norm` takes."""
    if not _takes(x, weight):
        return functional.group_norm(x, groups, weight, bias, eps)
    return _applied(x, groups, weight, bias, eps, False, None)


def _takes(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return (
        x.shape[1] % native.LANES == 0 and weight.dtype == torch.float32
        and x.is_contiguous(memory_format=torch.channels_last) and native.takes(x, narrow=True)
    )


def _applied(*arguments: object) -> torch.Tensor:
    found = _Norm.apply(*arguments)
    assert isinstance(found, torch.Tensor)
    return found


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, groups, weight, bias, eps, silu, drawn):
        (n, channels), pixels = x.shape[:2], x.shape[2:].numel()
        y, moments, shape = torch.empty_like(x), torch.empty(2, n, groups), sizes(n, pixels, channels, groups)
        words, scale = None, 1.0
        if drawn is not None:
            words, scale = torch.empty(n, pixels, channels // native.LANES, dtype=torch.int16), drawn.scale
            native.library().kept(at(drawn.bits), at(words), ctypes.c_short(drawn.least), *shape[:3])
        native.library().group_norm(
            *map(at, (x, weight, bias, words)), ctypes.c_float(scale), *map(at, (y, *moments)), *shape,
            ctypes.c_float(eps), ctypes.c_int(silu), native.is_narrow(x),
        )
        ctx.save_for_backward(x, weight, bias, moments, words)
        ctx.scale, ctx.silu = scale, silu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, bias, moments, words = ctx.saved_tensors
        grad, for_x, for_others = lasts(grad), torch.empty_like(x), torch.empty(2, *x.shape[:2])
        shape = sizes(len(x), x.shape[2] * x.shape[3], x.shape[1], moments.shape[2])
        native.library().group_norm_backward(
            *map(at, (grad, x, weight, bias, words)), ctypes.c_float(ctx.scale),
            *map(at, (*moments, for_x, *for_others)), *shape,
            ctypes.c_int(ctx.silu), native.is_narrow(x),
        )
        return for_x, None, *for_others.sum(1), None, None, None
