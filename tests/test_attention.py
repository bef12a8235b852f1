"""Attention in two linear maps: the values and gradients of diffusers' own, and where it stays that."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch.utils.flop_counter import FlopCounterMode

from diffult_ray.method.attention import fold_attention


def attention(heads: int = 1, **changed) -> torch.nn.Sequential:
    """As diffusers' U-Net has it, its weights large enough that rows of softmax differ; in float64."""
    torch.manual_seed(0)
    settings = {"norm_num_groups": 8, "residual_connection": True, "bias": True, "upcast_softmax": True}
    layer = Attention(32, heads=heads, dim_head=32 // heads, **{**settings, **changed}).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return torch.nn.Sequential(layer)


def results(model: torch.nn.Module, layout: torch.memory_format) -> list[torch.Tensor]:
    """Output, and the gradients of x and of all parameters."""
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(3, 32, 4, 6, dtype=torch.float64, generator=rng).contiguous(memory_format=layout)
    y = model(x.requires_grad_())
    assert y.is_contiguous(memory_format=layout)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_values_and_gradients_are_those_of_diffusers(layout):
    usual = attention()
    folded = copy.deepcopy(usual)
    fold_attention(folded)
    for a, b in zip(results(folded, layout), results(copy.deepcopy(usual), torch.channels_last), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_a_keys_bias_has_a_gradient_of_nothing():
    """Not none: DDP waits for one."""
    model = attention()
    fold_attention(model)
    results(model, torch.channels_last)
    assert torch.equal(model[0].to_k.bias.grad, torch.zeros(32, dtype=torch.float64))


def test_half_of_the_products_of_positions_and_weights():
    def products(model: torch.nn.Module) -> int:
        with FlopCounterMode(display=False) as counted, torch.no_grad():
            model(torch.randn(2, 32, 16, 16, dtype=torch.float64))
        counts = counted.get_flop_counts()["Global"]
        return sum(counts.get(by, 0) for by in (torch.ops.aten.addmm, torch.ops.aten.mm)) // 2

    usual, folded = attention(), attention()
    fold_attention(folded)
    one, of_weights = 2 * 16 * 16 * 32 * 32, 32 * 32 * 32
    assert (products(usual), products(folded)) == (4 * one, 2 * one + 2 * of_weights)


MORE = [{"heads": 2}, {"dropout": 0.1}, {"residual_connection": False}, {"bias": False}]


@pytest.mark.parametrize("changed", MORE)
def test_what_has_more_in_it_stays_diffusers_own(changed):
    model = attention(**changed)
    own = model[0].forward
    fold_attention(model)
    assert model[0].forward == own
