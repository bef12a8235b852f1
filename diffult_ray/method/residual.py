"""A residual block of a ResNet for a processor: the same function but for rounding, in fewer passes.

Two 3x3 convolutions by Winograd's algorithm (`winograd`), and behind the second its batch norm, the sum with
the block's input and the ReLU in one (`rectified`). The first one's norm and ReLU are where its output is
read, and what they make is never written. A convolution sums up what the norm behind it needs to know. One
part of the input's gradient is added to where the other is.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from diffult_ray.method import rectified, winograd
from diffult_ray.method.native import lasts
from diffult_ray.method.rectified import relu_of_batch_norm


def basic_block(block: torch.nn.Module, x: torch.Tensor, aside: torch.Tensor) -> torch.Tensor:
    """A basic block (He et al., 2016, figure 2): `relu(bn2(conv2(relu(bn1(conv1(x))))) + aside)`.

    Args:
        block: has conv1, bn1, conv2 and bn2.
        x: [n, C, H, W].
        aside: [n, K, H', W'], x itself or what a shortcut made of it.

    Returns:
        [n, K, H', W'].
    """
    if aside is x and _takes(block, x):
        weights = (each.weight for each in (block.conv1, block.bn1, block.conv2, block.bn2))
        found = _Block.apply(x, *weights, block.bn1.bias, block.bn2.bias, block.bn1, block.bn2)
        assert isinstance(found, torch.Tensor)
        return found
    y = relu_of_batch_norm(block.bn1, block.conv1(x))
    return relu_of_batch_norm(block.bn2, block.conv2(y), aside)


def _takes(block: torch.nn.Module, x: torch.Tensor) -> bool:
    """Whether all of it can be the one function of x that `_Block` is."""
    return all(
        winograd.is_winograd(conv) and conv.bias is None and winograd.pays(x, conv.weight)
        and norm.training and rectified.takes(norm, x)
        for conv, norm in ((block.conv1, block.bn1), (block.conv2, block.bn2))
    )


class _Block(torch.autograd.Function):
    """Of x; weights w of convolutions, g of norms; biases b of norms, and the norms themselves."""

    @staticmethod
    def forward(ctx, x, w1, g1, w2, g2, b1, b2, norm1, norm2):
        n = len(w1)
        kept1, kept2 = torch.empty(4, n), torch.empty(4, n)
        moments = winograd.room_for_moments(x, n)
        y1 = winograd.convolved(x, winograd.kernels(w1), n, moments=moments)
        scaled = rectified.measured(norm1, y1, kept1, moments)
        y2 = winograd.convolved(y1, winograd.kernels(w2), n, moments=moments, rectified=scaled)
        z2 = rectified.forward(norm2, y2, x, kept2, moments)
        ctx.save_for_backward(x, y1, y2, z2, w1, g1, w2, g2, kept1, kept2)
        return z2

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, y1, y2, z2, w1, g1, w2, g2, kept1, kept2 = ctx.saved_tensors
        n = x.shape[1]
        for_x, for_y = torch.empty_like(x), torch.empty_like(x)
        others2 = rectified.backward(lasts(grad), z2, y2, g2, kept2, for_y, for_x)
        for_w2 = winograd.kernels_gradient(y1, for_y, w2, rectified=kept1[2:])
        for_y = winograd.convolved(for_y, winograd.kernels(w2, turned=True), n)
        others1 = rectified.backward(for_y, None, y1, g1, kept1, for_y)
        for_w1 = winograd.kernels_gradient(x, for_y, w1)
        winograd.convolved(for_y, winograd.kernels(w1, turned=True), n, aside=for_x, onto=True)
        return for_x, for_w1, others1[0], for_w2, others2[0], others1[1], others2[1], None, None
