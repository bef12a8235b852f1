"""A group norm with the SiLU and the dropout behind it in one pass, in C for a processor: normalised.c.

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

    torch's own but for channels-last images in float32 on a processor, whose channels 16 divides.

    Args:
        x: [n, C, H, W].
        weight: [C], as bias.
        drawn: what the dropout drew for a tensor of x's shape; None for no dropout.

    Returns:
        [n, C, H, W], in the layout of x.
    """
    divides = x.shape[1] % native.LANES == 0 and (drawn is None or x.shape[2:].numel() % native.LANES == 0)
    if not divides or not x.is_contiguous(memory_format=torch.channels_last) or not native.takes(x):
        y = functional.silu(functional.group_norm(x, groups, weight, bias, eps))
        return y if drawn is None else drawn.of(y)
    found = _Activation.apply(x, groups, weight, bias, eps, drawn)
    assert isinstance(found, torch.Tensor)
    return found


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, groups, weight, bias, eps, drawn):
        (n, channels), pixels = x.shape[:2], x.shape[2:].numel()
        y, moments, shape = torch.empty_like(x), torch.empty(2, n, groups), sizes(n, pixels, channels, groups)
        words, scale = None, 1.0
        if drawn is not None:
            words, scale = torch.empty(n, pixels, channels // native.LANES, dtype=torch.int16), drawn.scale
            native.library().kept(at(drawn.bits), at(words), ctypes.c_short(drawn.least), *shape[:3])
        native.library().silu_of_group_norm(
            *map(at, (x, weight, bias, words)), ctypes.c_float(scale), *map(at, (y, *moments)), *shape,
            ctypes.c_float(eps),
        )
        ctx.save_for_backward(x, weight, bias, moments, words)
        ctx.scale = scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, bias, moments, words = ctx.saved_tensors
        grad, for_x, for_others = lasts(grad), torch.empty_like(x), torch.empty(2, *x.shape[:2])
        shape = sizes(len(x), x.shape[2] * x.shape[3], x.shape[1], moments.shape[2])
        native.library().silu_of_group_norm_backward(
            *map(at, (grad, x, weight, bias, words)), ctypes.c_float(ctx.scale),
            *map(at, (*moments, for_x, *for_others)), *shape,
        )
        return for_x, None, *for_others.sum(1), None, None
