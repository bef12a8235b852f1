"""Convolutions by Winograd's algorithm: values and gradients, and where they stay torch's own."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from diffult_ray.allotment import Allotment
from diffult_ray.method import blocks, device, native, winograd
from diffult_ray.models import build_unet

CPU = torch.device("cpu")
compiles = pytest.mark.skipif(native.compiler() is None, reason="no C compiler is at hand")


def given(n: int, c: int, k: int, height: int, width: int, layout=torch.channels_last) -> list[torch.Tensor]:
    """Images, weights and a bias."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(n, c, height, width, generator=rng).contiguous(memory_format=layout)
    weight = (torch.randn(k, c, 3, 3, generator=rng) / (9 * c) ** 0.5).contiguous(memory_format=layout)
    return [x.requires_grad_(), weight.requires_grad_(), torch.randn(k, generator=rng).requires_grad_()]


def results(y: torch.Tensor, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    """The output, and the gradients of its weighted sum."""
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return [y.detach(), *torch.autograd.grad((weights * y).sum(), leaves)]


def exact(leaves: list[torch.Tensor], doubled: bool) -> list[torch.Tensor]:
    """The same of torch's own convolution in float64."""
    leaves = [each.detach().double().requires_grad_() for each in leaves]
    seen = functional.interpolate(leaves[0], scale_factor=2.0, mode="nearest") if doubled else leaves[0]
    return results(functional.conv2d(seen, *leaves[1:], padding=1), leaves)


def near(ours: list[torch.Tensor], usual: list[torch.Tensor], most: float = 1e-5) -> bool:
    return all((a - b).norm() <= most * b.norm() for a, b in zip(ours, usual, strict=True))


# One image; tiles in a corner only; sides that differ; more images than go at a time, by one; one block of
# channels, and several.
SHAPES = [
    (1, 16, 16, 32, 32), (64, 32, 16, 4, 4), (9, 16, 32, 8, 24), (3, 64, 48, 32, 32), (9, 128, 64, 16, 16),
]


@compiles
@pytest.mark.parametrize("doubled", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_those_of_a_convolution(shape, doubled):
    x, weight, bias = given(*shape)
    assert winograd.pays(x, weight, doubled=doubled)
    y = winograd.conv2d(x, weight, bias, doubled=doubled)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert near(results(y, [x, weight, bias]), exact([x, weight, bias], doubled))


@compiles
@pytest.mark.parametrize("doubled", [False, True])
@pytest.mark.parametrize("each", [1, 3])  # images beside one that is added to them
@pytest.mark.parametrize("has_bias", [False, True])
def test_what_is_added_to_a_convolution(doubled, each, has_bias):
    x, weight, bias = given(9, 16, 32, 16, 8)
    rng, side = torch.Generator().manual_seed(1), 2 if doubled else 1
    more = torch.randn(9, 32, generator=rng).requires_grad_()
    aside = torch.randn(9 // each, 32, 16 * side, 8 * side, generator=rng).requires_grad_()
    leaves = [x, weight, more, aside, *[bias] * has_bias]

    def by(x, weight, more, aside, bias=None):
        return winograd.conv2d(x, weight, bias, more, aside, doubled=doubled)

    ours = results(by(*leaves), leaves)
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    assert not winograd.pays(*doubles[:2])
    usual = results(by(*doubles), doubles)  # torch's own
    plain = functional.conv2d(
        x.repeat_interleave(2, 2).repeat_interleave(2, 3) if doubled else x, weight, padding=1
    ).double() + doubles[2][:, :, None, None] + doubles[3].repeat(each, 1, 1, 1)
    assert near([usual[0]], [plain + (bias[:, None, None] if has_bias else 0)])
    assert near(ours, usual)


@compiles
def test_it_takes_any_layout_and_parts_of_weights_and_no_bias():
    x, whole, _ = given(4, 32, 64, 16, 16, torch.contiguous_format)
    parts = x[:, 16:], whole[:, 16:]
    y = winograd.conv2d(*parts)
    usual = functional.conv2d(*parts, padding=1)
    assert near(results(y, [x, whole]), results(usual, [x, whole]))


@compiles
def test_only_the_gradients_that_are_asked_for():
    x, weight, bias = given(4, 16, 16, 16, 16)
    whole = results(winograd.conv2d(x, weight, bias), [x, weight, bias])
    alone = results(winograd.conv2d(x.detach(), weight, bias.detach()), [weight])
    assert torch.equal(alone[1], whole[2])
    with torch.no_grad():
        assert not winograd.conv2d(x, weight, bias).requires_grad


@compiles
def test_the_same_bits_each_time():
    found = []
    for _ in range(2):
        leaves = given(5, 128, 64, 32, 32)
        found.append(results(winograd.conv2d(*leaves), leaves))
    assert all(torch.equal(*each) for each in zip(*found, strict=True))


@compiles
@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_bits_in_other_company(threads):
    """Of an image, wherever it lies among as many: also where the last share has fewer."""
    before = torch.get_num_threads()
    x, weight, bias = (each.detach() for each in given(20, 128, 64, 16, 16))
    order = torch.randperm(20, generator=torch.Generator().manual_seed(2))
    try:
        torch.set_num_threads(threads)
        assert torch.equal(winograd.conv2d(x[order], weight, bias), winograd.conv2d(x, weight, bias)[order])
    finally:
        torch.set_num_threads(before)


UNFIT = [
    (4, 16, 16, 16, 18), (4, 16, 16, 18, 16), (4, 24, 16, 16, 16), (4, 16, 24, 16, 16), (1, 16, 16, 8, 8),
]


@pytest.mark.parametrize("shape", UNFIT)
def test_it_is_torchs_own_where_sides_channels_or_their_number_do_not_fit(shape):
    leaves = given(*shape)
    assert not winograd.pays(*leaves[:2])
    assert torch.equal(winograd.conv2d(*leaves), functional.conv2d(*leaves, padding=1))


def test_it_is_torchs_own_in_another_type_and_under_autocast():
    leaves = given(4, 16, 16, 16, 16)
    doubles = [each.double() for each in leaves]
    assert torch.equal(winograd.conv2d(*doubles), functional.conv2d(*doubles, padding=1))
    with device.autocast(CPU, "bf16", 16):
        y = winograd.conv2d(*leaves)
        assert y.dtype == torch.bfloat16 and torch.equal(y, functional.conv2d(*leaves, padding=1))


def network(channels: tuple[int, ...] = (64, 64)) -> torch.nn.Module:
    torch.manual_seed(0)
    return build_unet(
        image_size=16, image_channels=3, num_classes=4, channels=channels, blocks=1, attention=(), dropout=0.0
    )


@compiles
@pytest.mark.parametrize(("has", "lasts", "settings", "resources"), [
    (True, True, {}, {}), (True, True, {"trains": False}, {}),
    (False, True, {"precision": "bf16"}, {}), (False, True, {"precision": "bf16", "trains": False}, {}),
    (False, False, {"precision": "bf16"}, {"compile": True}),
    (False, False, {"precision": "bf16"}, {"tuned": False}), (False, False, {}, {"tuned": False}),
    (False, False, {}, {"compile": True}), (False, False, {}, {"gpus": 1}),
])  # fmt: skip
def test_wide_networks_have_it_on_a_cpu_in_float32(has, lasts, settings, resources):
    """And are channels-last where C has the norms."""
    given, settings = Allotment(**resources), {"precision": "float32", **settings}
    model, layout = device.placed(network(), given, CPU, **settings)
    assert blocks.has_winograd(model) == has
    assert layout == (torch.channels_last if lasts else torch.contiguous_format)
    narrow, _ = device.placed(network((32, 48)), given, CPU, **settings)
    assert not blocks.has_winograd(narrow)


@compiles
@pytest.mark.parametrize("each", [1, 2])
def test_a_network_with_it_is_the_same_function(each):
    """Also with two labels an image, of which parts are computed once."""
    rng = torch.Generator().manual_seed(1)
    x, times = torch.randn(8, 3, 16, 16, generator=rng), torch.arange(8)
    labels, found = torch.randint(0, 4, (each * 8,), generator=rng), []
    for tuned in (False, True):
        model, layout = device.placed(network(), Allotment(tuned=tuned), CPU, precision="float32")
        y = model(x.contiguous(memory_format=layout), times, labels).sample
        y, *grads = results(y, list(model.parameters()))
        found.append([y, torch.cat([grad.flatten() for grad in grads])])
    assert blocks.has_winograd(model) and near(found[1], found[0])


@compiles
def test_a_network_that_is_only_evaluated_keeps_what_it_made_of_its_weights():
    def network(**how) -> torch.nn.Module:
        torch.manual_seed(0)
        model = torch.nn.Sequential(*(torch.nn.Conv2d(64, c, 3, padding=1) for c in (64, 128)))
        blocks.winograd_convolutions(model, **how)
        return model

    x = given(4, 64, 64, 16, 16)[0].detach()
    trained, fixed = network(), network(trains=False)
    with torch.no_grad():
        assert torch.equal(fixed(x), trained(x)) and torch.equal(fixed(x), trained(x))
        for model in (trained, fixed):
            model[0].weight.zero_()
        assert torch.equal(trained(x)[0, :, 4, 4], trained(x)[1, :, 8, 8])  # made of the first bias alone
        assert not torch.equal(fixed(x)[0, :, 4, 4], fixed(x)[1, :, 8, 8])
    assert list(fixed.state_dict()) == list(trained.state_dict())
    fixed(x).sum().backward()  # with gradients it is the usual convolution
    assert fixed[1].weight.grad is not None
