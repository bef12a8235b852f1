"""Networks as they are arranged for the device: the same functions, but for rounding and luck."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.training_utils import EMAModel
from torch.utils.flop_counter import FlopCounterMode

from diffult_ray.allotment import Allotment
from diffult_ray.method import device
from diffult_ray.models import build_unet
from diffult_ray.models.dropout import Dropout

CPU = torch.device("cpu")


def network(dropout: float = 0.0, **changed) -> UNet2DModel:
    torch.manual_seed(0)
    settings = {"channels": (32, 64), "blocks": 1, "attention": (8,), "dropout": dropout, **changed}
    return build_unet(image_size=16, image_channels=3, num_classes=4, **settings)


def batch(n: int = 3) -> tuple[torch.Tensor, ...]:
    rng = torch.Generator().manual_seed(1)
    return (torch.randn(n, 3, 16, 16, generator=rng), torch.randint(0, 1000, (n,), generator=rng),
            torch.randint(0, 4, (n,), generator=rng))


def output(model: UNet2DModel, precision: str) -> torch.Tensor:
    with torch.no_grad(), device.autocast(CPU, precision, 16):
        return model.eval()(*batch()).sample.float()


# On a CPU, and for a GPU where it is compiled, which is the same function on a CPU, too.
GIVEN = [Allotment(), Allotment(gpus=1, compile=True)]


@pytest.mark.parametrize("given", GIVEN, ids=["cpu", "compiled on a gpu"])
def test_tuned_is_the_same_function(given):
    usual = output(network(), "float32")
    tuned = output(device.tuned(network(), given), "float32")
    torch.testing.assert_close(tuned, usual, rtol=1e-4, atol=1e-5)
    off = device.tuned(network(), Allotment(tuned=False))
    assert torch.equal(output(off, "float32"), usual)


def test_weights_that_are_rounded_once_are_those_that_autocast_rounds_each_time():
    each_time = output(device.tuned(network(), Allotment()), "bf16")
    once = device.tuned(network(), Allotment(), rounded=True, trains=False)
    assert once.dtype == torch.float32 and once.conv_out.weight.dtype == torch.bfloat16
    assert torch.equal(output(once, "bf16"), each_time)
    torch.testing.assert_close(each_time, output(network(), "float32"), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("given", GIVEN, ids=["cpu", "compiled on a gpu"])
def test_gradients_of_a_tuned_network(given):
    grads = []
    for each in (Allotment(tuned=False), given):
        model = device.tuned(network(), each).to(memory_format=torch.channels_last)
        x, times, labels = batch()
        shown = x.contiguous(memory_format=torch.channels_last).requires_grad_()
        model(shown, times, labels).sample.square().mean().backward()
        grads.append([shown.grad, *(p.grad for p in model.parameters())])
    for usual, tuned in zip(*grads, strict=True):
        torch.testing.assert_close(tuned, usual, rtol=1e-3, atol=1e-6)


# Too narrow for Winograd's convolutions, which are made for channels-last; then with them; without, in bf16.
@pytest.mark.parametrize(("layout", "channels", "each", "precision"), [
    (torch.contiguous_format, (32, 48), 1, "float32"), (torch.channels_last, (64, 64), 1, "float32"),
    (torch.channels_last, (64, 64), 2, "float32"), (torch.channels_last, (64, 64), 1, "bf16"),
    (torch.channels_last, (64, 64), 2, "bf16"),
])
def test_gradients_on_a_cpu_lie_as_their_weights_do(layout, channels, each, precision):
    """Else DDP, whose buckets lie so, copies them and warns."""
    rounded = precision == "bf16"
    model = device.tuned(network(channels=channels), Allotment(), rounded=rounded).to(memory_format=layout)
    x, times, labels = batch()
    with device.autocast(CPU, precision, 16):
        output = model(x.contiguous(memory_format=layout), times, labels.repeat(each)).sample
    output.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.stride() == parameter.stride(), name


# Groups of channels that lie in both of what the last block concatenates; attention in the first and the
# last block; a network that halves nothing.
SHAPES = [
    {}, {"channels": (6, 12)}, {"attention": (16, 8), "blocks": 2}, {"channels": (8,), "attention": ()},
]


@pytest.mark.parametrize("given", [*GIVEN, Allotment(tuned=False)], ids=["cpu", "compiled", "untuned"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("each", [1, 2, 3])
def test_several_labels_an_image_are_as_many_images(shape, given, each):
    x, times, labels = batch()
    labels = torch.cat([(labels + i) % 5 for i in range(each)])
    found = []
    for model in (network(**shape), device.tuned(network(**shape), given)):
        images = x.clone().requires_grad_()
        if found:
            output = model(images, times, labels).sample
        else:
            output = model(images.repeat(each, 1, 1, 1), times.repeat(each), labels).sample
        weights = torch.linspace(-1, 1, output.numel()).view(output.shape)  # each row its own
        (weights * output).sum().backward()
        found.append([output.detach(), images.grad, *(p.grad for p in model.parameters())])
    for usual, tuned in zip(*found, strict=True):
        torch.testing.assert_close(tuned, usual, rtol=1e-3, atol=1e-4 * float(usual.abs().max() + 1))


def test_a_processor_convolves_less_for_a_second_label_and_for_what_is_upsampled():
    """Of 16 products a small pixel instead of 36, and of the shared layers once an image."""
    x, times, labels = batch()

    def products(model, labels):
        with FlopCounterMode(display=False) as counted, torch.no_grad():
            model(x, times, labels)
        return counted.get_flop_counts()["Global"][torch.ops.aten.convolution] / 2 / len(x)

    both = torch.cat([labels, labels])
    few = {"channels": (32, 48)}  # too few for Winograd's convolutions
    untuned, tuned = (device.tuned(network(**few), Allotment(tuned=t)) for t in (False, True))
    assert products(untuned, both) == 2 * products(untuned, labels)
    upsampling, pixels = 48 * 48, 8 * 8
    assert products(untuned, labels) - products(tuned, labels) == upsampling * pixels * (36 - 16)
    once = (3 * 9 + 32 * 9 + 32 * 9 + 32) * 32 * 16 * 16  # of the last block also its shortcut's half
    assert 2 * products(tuned, labels) - products(tuned, both) == once


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_in_bf16_a_tuned_network_is_as_near_float32_as_an_untuned_one(layout):
    """Output and gradients for two labels an image; of bf16's 8 bits, sums of weights lose no more."""
    x, times, labels = batch()
    found = []
    for tuned, precision in ((False, "float32"), (False, "bf16"), (True, "bf16")):
        model = device.tuned(network(), Allotment(tuned=tuned), rounded=precision == "bf16")
        model = model.to(memory_format=layout)
        with device.autocast(CPU, precision, 16):
            shown = x.contiguous(memory_format=layout)
            output = model(shown, times, torch.cat([labels, (labels + 1) % 4])).sample.float()
        (output * torch.linspace(-1, 1, output.numel()).view(output.shape)).sum().backward()
        found.append([output.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])])
    for exact, usual, ours in zip(*found, strict=True):
        assert 0 < (ours - exact).norm() < 1.2 * (usual - exact).norm() < 0.03 * exact.norm()


def test_a_group_norm_of_channels_far_from_zero_loses_nothing():
    """Its variance is no difference of large numbers."""
    model = device.tuned(network(), Allotment(gpus=1, compile=True))
    norm = model.mid_block.resnets[0].norm1
    x = torch.randn(4, 64, 8, 8, generator=torch.Generator().manual_seed(0)) + 1000
    usual = torch.nn.functional.group_norm(x.double(), norm.num_groups, eps=norm.eps)
    torch.testing.assert_close(norm(x).double(), usual, rtol=1e-4, atol=1e-3)


# diffusers makes 64 images contiguous before it upsamples them.
@pytest.mark.parametrize(("n", "each"), [(64, 1), (4, 2)])
def test_what_is_compiled_for_a_gpu_stays_channels_last(n, each):
    """Inputs of all convolutions and the gradients of their outputs, as torch.compile lays them out."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.decomposition import select_decomp_table

    layouts: dict[str, list[bool]] = {}

    def record(graph, _):
        for node in graph.graph.nodes:
            if str(node.target).startswith("aten.convolution"):
                shown = (argument.meta["val"] for argument in node.args[:2])
                lasts = [each.is_contiguous(memory_format=torch.channels_last) for each in shown]
                layouts.setdefault(str(node.target), []).extend(lasts)
        return make_boxed_func(graph.forward)

    model = device.tuned(network(), Allotment(gpus=1, compile=True)).to(memory_format=torch.channels_last)
    backend = aot_autograd(fw_compiler=record, bw_compiler=record, decompositions=select_decomp_table())
    called = torch.compile(model, backend=backend, dynamic=False)
    x = torch.randn(n, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    called(x, torch.arange(n), torch.zeros(n * each, dtype=torch.long)).sample.square().mean().backward()
    convolutions = sum(isinstance(module, torch.nn.Conv2d) for module in model.modules())
    assert len(layouts) == 2 and all(found == [True] * (2 * convolutions) for found in layouts.values())


@pytest.mark.parametrize("given", GIVEN, ids=["cpu", "compiled on a gpu"])
def test_a_tuned_network_is_copied_with_weights_of_its_own(given):
    model = device.tuned(network(), given).eval()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for block in other.modules():
            if isinstance(block, torch.nn.GroupNorm):
                block.weight.zero_()
    assert not torch.equal(output(other, "float32"), output(model, "float32"))
    torch.testing.assert_close(output(model, "float32"), output(network(), "float32"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_on_a_cpu_all_layers_have_the_layout_of_the_images(layout):
    model, layouts = device.tuned(network(), Allotment()).to(memory_format=layout), []
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_pre_hook(
                lambda _, given: layouts.append(given[0].is_contiguous(memory_format=layout))
            )
    images, times, labels = batch()
    model(images.contiguous(memory_format=layout), times, labels)
    assert len(layouts) > 15 and all(layouts)


@pytest.mark.parametrize("most", [1e-3, 0.5, 1e3])
def test_gradients_are_clipped_as_torch_clips_them(most):
    clipped = []
    for clip in (device.clip, torch.nn.utils.clip_grad_norm_):
        model = network()
        model(*batch()).sample.square().mean().backward()
        clip(list(model.parameters()), most)
        clipped.append([p.grad for p in model.parameters()])
    assert all(torch.equal(ours, usual) for ours, usual in zip(*clipped, strict=True))


@pytest.mark.parametrize("tuned", [True, False])
def test_the_average_of_the_weights_is_diffusers_own(tuned):
    torch.manual_seed(0)
    weights = torch.nn.Linear(20, 10)
    usual, ours = (EMAModel(weights.parameters(), decay=0.9, foreach=True) for _ in range(2))
    for _ in range(30):
        with torch.no_grad():
            weights.weight.add_(torch.randn(10, 20))
        usual.step(weights.parameters())
        device.averaged(ours, list(weights.parameters()), Allotment(tuned=tuned))
    assert (ours.optimization_step, ours.cur_decay_value) == (30, usual.cur_decay_value)
    torch.testing.assert_close(ours.shadow_params, usual.shadow_params, rtol=1e-5, atol=1e-6)
    assert (usual.shadow_params[0] - weights.weight).abs().max() > 0.1


@pytest.mark.parametrize("p", [0.1, 0.5, 0.999])
def test_dropout_keeps_elements_at_its_rate_and_scales_them(p):
    torch.manual_seed(0)
    x = torch.ones(1_000_001, requires_grad=True)  # no multiple of four
    y = Dropout(p)(x)
    assert y.detach().unique().tolist() == [0.0, pytest.approx(1 / (1 - p), rel=0.01)]
    kept = (y > 0).float().mean().item()
    assert kept * y.max().item() == pytest.approx(1, abs=6 * (p / (1 - p) / 1e6) ** 0.5)
    assert kept == pytest.approx(1 - p, abs=5 * (p * (1 - p) / 1e6) ** 0.5)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


def test_neighbours_are_dropped_independently():
    torch.manual_seed(0)
    kept = Dropout(0.5)(torch.ones(1_000_000)).view(-1, 4) > 0
    joint = (kept.float().T @ kept.float()) / len(kept)
    assert joint.fill_diagonal_(0.25).sub(0.25).abs().max() < 0.005


def test_dropout_does_nothing_in_evaluation_or_at_zero_and_draws_from_torchs_generator():
    x = torch.randn(5, 7)
    assert torch.equal(Dropout(0.5).eval()(x), x) and torch.equal(Dropout(0.0)(x), x)
    assert Dropout(1.0)(x).abs().sum() == 0
    drawn = []
    for _ in range(2):
        torch.manual_seed(3)
        drawn.append(Dropout(0.5)(x))
    assert torch.equal(*drawn)


def test_a_network_with_dropout_is_saved_as_diffusers_own(tmp_path):
    model = network(dropout=0.1)
    assert sum(isinstance(m, Dropout) for m in model.modules()) > 4
    model.save_pretrained(tmp_path)
    loaded = UNet2DModel.from_pretrained(tmp_path)
    assert torch.equal(output(loaded, "float32"), output(model, "float32"))


def test_how_many_images_are_made_at_a_time_follows_the_memory(monkeypatch):
    held = []
    monkeypatch.setattr(device, "_memory", lambda *_: held[-1])
    row = 25 * 32 * 16 * 16 * 4
    for rows, guided, images in ((1000, False, 128), (1000, True, 128), (250, True, 64), (99, False, 64),
                                 (99, True, 32), (3, True, 1), (0.1, True, 1)):
        held.append(rows * row / device.MEMORY_SHARE)
        assert device.images_at_once(network(), CPU, Allotment(), guided=guided) == images


@pytest.mark.parametrize(
    ("given", "size", "guided", "images"),
    [
        (Allotment(), 32, True, 32), (Allotment(), 32, False, 64), (Allotment(cpus=0.5), 32, True, 32),
        (Allotment(cpus=2), 32, True, 64), (Allotment(cpus=16), 32, True, 128), (Allotment(), 28, True, 32),
        (Allotment(), 8, True, 128), (Allotment(), 512, True, 1), (Allotment(gpus=0.5), 256, True, 128),
    ],
)
def test_a_cpu_makes_no_more_images_at_a_time_than_are_faster(given, size, guided, images):
    assert given.images_at_once(size, guided=guided) == images


def test_a_process_has_its_cpus_share_of_the_memory():
    whole, half = (device._memory(CPU, Allotment(cpus=share * (os.cpu_count() or 1))) for share in (1, 0.5))
    assert whole == 2 * half > 2**28
    assert device._memory(CPU, Allotment(cpus=1000)) == whole
