"""A batch norm with the sum with a shortcut and the ReLU behind it, in C for a processor: rectified.c.

torch's own are four passes through memory, and six for the gradient; these are two or three each.
"""

from __future__ import annotations

import ctypes

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from diffult_ray.method import native
from diffult_ray.method.native import at, lasts, sizes


def relu_of_batch_norm(
    norm: torch.nn.BatchNorm2d, x: torch.Tensor, aside: torch.Tensor | None = None
) -> torch.Tensor:
    """`functional.relu(norm(x) + aside)`, with the same running moments.

    torch's own but for channels-last images in float32 or bf16 on a processor, whose channels 16 divides, in
    training or without gradients. Of bf16 only the result is rounded, where torch rounds between the three.

    Args:
        x: [n, C, H, W].
        aside: of the same shape; None for nothing.

    Returns:
        [n, C, H, W], in the layout of x.
    """
    if not takes(norm, x, aside):
        y = norm(x)
        return functional.relu(y if aside is None else y + aside)
    if not norm.training:
        return forward(norm, x, aside)
    found = _Activation.apply(x, norm.weight, norm.bias, aside, norm)
    assert isinstance(found, torch.Tensor)
    return found


def takes(norm: torch.nn.BatchNorm2d, x: torch.Tensor, aside: torch.Tensor | None = None) -> bool:
    """Whether `relu_of_batch_norm` of the same is ours."""
    plain = norm.affine and norm.track_running_stats and norm.momentum is not None
    return (
        plain and x.shape[1] % native.LANES == 0 and x.numel() > x.shape[1]
        and norm.weight.dtype == torch.float32
        and (norm.training or not torch.is_grad_enabled())
        and all(
            each.is_contiguous(memory_format=torch.channels_last) and native.takes(each, narrow=True)
            and each.dtype == x.dtype
            for each in (x, aside) if each is not None
        )
    )


def forward(
    norm: torch.nn.BatchNorm2d,
    x: torch.Tensor,
    aside: torch.Tensor | None = None,
    kept: torch.Tensor | None = None,
    moments: torch.Tensor | None = None,
) -> torch.Tensor:
    """`relu_of_batch_norm` of what it takes.

    Args:
        kept: [4, C], to be filled with mean and inverse deviation of x, which are then what norms it, and
            with the scale and the shift that do so.
        moments: of equal parts of the images, [parts, 2, C], as `winograd.convolved` gives them.
    """
    y = torch.empty_like(x)
    _call(norm, x, aside, y, kept, moments)
    return y


def measured(
    norm: torch.nn.BatchNorm2d, x: torch.Tensor, kept: torch.Tensor, moments: torch.Tensor
) -> torch.Tensor:
    """What else `forward` does; `kept`'s scale and shift [2, C], for who makes its result of x himself."""
    _call(norm, x, None, None, kept, moments)
    return kept[2:]


def _call(
    norm: torch.nn.BatchNorm2d,
    x: torch.Tensor,
    aside: torch.Tensor | None,
    y: torch.Tensor | None,
    kept: torch.Tensor | None,
    moments: torch.Tensor | None,
) -> None:
    room = None
    if kept is not None:
        room = torch.empty(2, *x.shape[:2])
        norm.num_batches_tracked += 1
    native.library().relu_of_batch_norm(
        *map(at, (x, norm.weight, norm.bias, aside, y, norm.running_mean, norm.running_var, kept)),
        *map(at, (moments, room)), ctypes.c_float(norm.momentum), ctypes.c_float(norm.eps),
        *sizes(0 if moments is None else len(moments) // len(x)), *_shape(x),
    )


def backward(
    grad: torch.Tensor,
    y: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    kept: torch.Tensor,
    for_x: torch.Tensor,
    for_aside: torch.Tensor | None = None,
) -> torch.Tensor:
    """The gradients [2, C] of weight and bias, from that of y.

    Args:
        y: may be None if there was nothing beside x.
        kept: what `forward` has filled.
        for_x: of x's shape, to be filled with its gradient; may be `grad`.
        for_aside: the same for what was beside x.
    """
    for_others, room = torch.empty(2, x.shape[1]), torch.empty(2, *x.shape[:2])
    native.library().relu_of_batch_norm_backward(
        *map(at, (grad, y, x, weight, kept, for_x, for_aside)),
        *map(at, (for_others[0], for_others[1], room)), *_shape(x),
    )
    return for_others


def _shape(x: torch.Tensor) -> list[ctypes.c_size_t | ctypes.c_int]:
    return [*sizes(len(x), x.shape[2] * x.shape[3], x.shape[1]), native.is_narrow(x)]


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, aside, norm):
        kept = torch.empty(4, x.shape[1])
        y = forward(norm, x, aside, kept)
        ctx.save_for_backward(x, y, weight, kept)
        ctx.beside = aside is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, y, weight, kept = ctx.saved_tensors
        for_x, for_aside = torch.empty_like(x), torch.empty_like(x) if ctx.beside else None
        for_others = backward(lasts(grad), y, x, weight, kept, for_x, for_aside)
        return for_x, for_others[0], for_others[1], for_aside, None
