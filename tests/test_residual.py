"""Residual blocks of classifiers in C: a batch norm, the sum and the ReLU in one, and whole blocks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional
from torchvision.models.resnet import BasicBlock as Torchvisions

from diffult_ray.allotment import Allotment
from diffult_ray.method import blocks, device, native
from diffult_ray.method.rectified import relu_of_batch_norm
from diffult_ray.models import build_classifier
from diffult_ray.models.classifiers import BasicBlock

CPU = torch.device("cpu")
compiles = pytest.mark.skipif(native.compiler() is None, reason="no C compiler is at hand")


def images(n: int, channels: int, side: int, *, centre: float = 0.5, spread: float = 2.0) -> torch.Tensor:
    """Channels-last."""
    x = centre + spread * torch.randn(n, channels, side, side, generator=torch.Generator().manual_seed(0))
    return x.contiguous(memory_format=torch.channels_last)


def drawn(module: torch.nn.Module) -> torch.nn.Module:
    """With weights of norms that are not all alike."""
    rng = torch.Generator().manual_seed(1)
    for each in module.modules():
        if isinstance(each, torch.nn.BatchNorm2d):
            each.weight.data.uniform_(0.5, 1.5, generator=rng)
            each.bias.data.normal_(generator=rng)
    return module


def results(
    function, module: torch.nn.Module, inputs: list[torch.Tensor], dtype=torch.float32
) -> list[torch.Tensor]:
    """The output, the gradients of its weighted sum, and the buffers, of a copy of the module."""
    module = copy.deepcopy(module).to(dtype)
    inputs = [x.detach().to(dtype).requires_grad_() for x in inputs]
    y = function(module, *inputs)
    weights = torch.linspace(-1, 1, y.numel(), dtype=dtype).view(y.shape)
    found = torch.autograd.grad((weights * y).sum(), [*inputs, *module.parameters()])
    return [y.detach(), *found, *module.buffers()]


def usual(norm: torch.nn.Module, x: torch.Tensor, aside: torch.Tensor | None = None) -> torch.Tensor:
    return functional.relu(norm(x) if aside is None else norm(x) + aside)


def assert_near(ours: list[torch.Tensor], exact: list[torch.Tensor], most: float) -> None:
    assert len(ours) == len(exact)
    for a, b in zip(ours, exact, strict=True):
        assert (a - b).double().norm() <= most * b.double().norm()


SHAPES = [(8, 16, 32), (5, 48, 5), (3, 64, 8), (1, 32, 16), (2, 16, 1)]


@compiles
@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize(("n", "channels", "side"), SHAPES)
def test_batch_norm_sum_and_relu_are_torchs(n, channels, side, beside):
    norm = drawn(torch.nn.BatchNorm2d(channels, momentum=0.3))
    inputs = [images(n, channels, side), images(n, channels, side, centre=-0.2)][: 1 + beside]
    ours = results(relu_of_batch_norm, norm, inputs)
    assert ours[0].is_contiguous(memory_format=torch.channels_last)
    if n * side**2 == 2:  # the norm makes 1 and -1 of two values, whatever they are: no gradient but rounding
        ours, exact = ([*r[:1], *r[-3:]] for r in (ours, results(usual, norm, inputs, torch.float64)))
    else:
        exact = results(usual, norm, inputs, torch.float64)
    assert_near(ours, exact, 1e-5)


@compiles
@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize(("n", "channels", "side"), SHAPES[:-1])
def test_of_bf16_only_what_it_gives_back_is_rounded(n, channels, side, beside):
    norm = drawn(torch.nn.BatchNorm2d(channels, momentum=0.3))
    rng = torch.Generator().manual_seed(2)
    given = [images(n, channels, side), images(n, channels, side, centre=-0.2)][: 1 + beside]
    given.append(torch.randn(n, channels, side, side, generator=rng))

    def found(function, dtype: torch.dtype, norm: torch.nn.Module) -> list[torch.Tensor]:
        *inputs, upstream = (each.bfloat16().to(dtype) for each in given)
        leaves = [x.requires_grad_() for x in inputs]
        y = function(norm, *leaves)
        assert y.dtype == dtype
        return [y.detach(), *torch.autograd.grad(y, [*leaves, *norm.parameters()], upstream), *norm.buffers()]

    ours = found(relu_of_batch_norm, torch.bfloat16, copy.deepcopy(norm))
    exact = found(usual, torch.float64, copy.deepcopy(norm).double())
    assert ours[0].is_contiguous(memory_format=torch.channels_last)
    rounded = 2 + beside  # the result, and gradients of what is as long
    assert all(each.dtype == torch.bfloat16 for each in ours[:rounded])
    assert_near(ours[:rounded], exact[:rounded], 2**-8)
    assert_near(ours[rounded:], exact[rounded:], 1e-5)


@compiles
def test_it_keeps_what_is_small_beside_a_large_mean():
    norm, x = drawn(torch.nn.BatchNorm2d(32)), images(16, 32, 16, centre=1000)
    torchs, ours = (results(each, norm, [x])[0] for each in (usual, relu_of_batch_norm))
    exact = results(usual, norm, [x], torch.float64)[0]
    assert (ours - exact).norm() <= (torchs - exact).norm()


@compiles
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-6)])
def test_without_gradients_it_norms_by_the_running_moments(dtype, most):
    norm, x = drawn(torch.nn.BatchNorm2d(16)), images(4, 16, 8).to(dtype)
    norm(x)
    norm.eval()
    kept = copy.deepcopy(norm.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(relu_of_batch_norm(norm, x, x), usual(norm, x, x), rtol=most, atol=most)
    assert all(torch.equal(kept[name], value) for name, value in norm.state_dict().items())
    x.requires_grad_()  # of an extractor that guides a generator
    assert torch.equal(relu_of_batch_norm(norm, x), usual(norm, x))


@pytest.mark.parametrize("what", ["contiguous", "float64", "24 channels", "no running moments", "all bf16"])
def test_it_is_torchs_own_where_c_does_not_fit(what):
    x = images(4, 24 if what == "24 channels" else 32, 8)
    norm = torch.nn.BatchNorm2d(x.shape[1], track_running_stats=what != "no running moments")
    if what == "contiguous":
        x = x.contiguous()
    dtype = {"float64": torch.float64, "all bf16": torch.bfloat16}.get(what, torch.float32)
    ours, torchs = (results(each, norm, [x], dtype) for each in (relu_of_batch_norm, usual))
    assert all(torch.equal(a, b) for a, b in zip(ours, torchs, strict=True))


@compiles
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_no_number_stays_none(dtype):
    """So that a training that has diverged says so."""
    x = images(2, 16, 4).to(dtype)
    x[0, 3, 0, 0] = torch.nan
    y = relu_of_batch_norm(torch.nn.BatchNorm2d(16), x)
    assert y[:, 3].isnan().all() and not y[:, :3].isnan().any()


# --- whole blocks -------------------------------------------------------------------------------


def tuned(module: torch.nn.Module) -> torch.nn.Module:
    module = torch.nn.Sequential(copy.deepcopy(module)).to(memory_format=torch.channels_last)
    blocks.rectified_residuals(module)
    blocks.winograd_convolutions(module, fewest=16)
    return module[0]


BLOCKS = {
    "ours": (lambda: BasicBlock(32, 32, 1), 32, 16),
    "ours, of 16 channels": (lambda: BasicBlock(16, 16, 1), 16, 32),
    "ours, strided": (lambda: BasicBlock(16, 32, 2), 16, 16),
    "torchvision's": (lambda: Torchvisions(64, 64), 64, 8),
    "torchvision's, of 128 channels": (lambda: Torchvisions(128, 128), 128, 8),
    "torchvision's, strided": (lambda: Torchvisions(64, 128, 2, torch.nn.Sequential(
        torch.nn.Conv2d(64, 128, 1, stride=2, bias=False), torch.nn.BatchNorm2d(128))), 64, 16),
    "on a side that 4 does not divide": (lambda: BasicBlock(32, 32, 1), 32, 14),
}


def called(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return module(x)


@compiles
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_is_the_same_function(name):
    make, channels, side = BLOCKS[name]
    torch.manual_seed(0)
    module, x = drawn(make()), images(9, channels, side)
    ours, exact = results(called, tuned(module), [x]), results(called, module, [x], torch.float64)
    # A unit within rounding of zero is on one side or the other of the ReLU.
    assert_near(ours[:1] + ours[-6:], exact[:1] + exact[-6:], 1e-5)
    assert_near(ours, exact, 5e-3)


@compiles
def test_what_is_no_number_goes_through_a_block():
    x = images(2, 16, 16)
    x[0, 3, 0, 0] = torch.nan
    assert tuned(BasicBlock(16, 16, 1))(x).isnan().all()


@compiles
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_is_the_same_on_any_number_of_threads(dtype):
    norm, x, before = drawn(torch.nn.BatchNorm2d(32)), images(9, 32, 16).to(dtype), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaf = x.clone().requires_grad_()
            y = relu_of_batch_norm(norm, leaf, leaf)
            found.append([y, *torch.autograd.grad(y.sum(), [leaf, *norm.parameters()])])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@compiles
@pytest.mark.parametrize("channels", [16, 64])
def test_a_block_is_the_same_on_any_number_of_threads(channels):
    module, before = tuned(drawn(BasicBlock(channels, channels, 1))), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(results(called, module, [images(9, channels, 16)]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@compiles
def test_the_gradient_reaches_what_is_asked_for():
    module, x = tuned(drawn(BasicBlock(16, 16, 1))), images(8, 16, 16)
    module(x).sum().backward()
    assert x.grad is None and all(p.grad is not None for p in module.parameters())
    frozen = tuned(BasicBlock(16, 16, 1)).requires_grad_(False)
    x.requires_grad_()
    (found,) = torch.autograd.grad(frozen(x).square().sum(), x)
    assert found.isfinite().all() and found.abs().max() > 0


# --- classifiers --------------------------------------------------------------------------------


def placed(given: Allotment, *, size: int = 32, architecture: str = "resnet32", precision: str = "float32"):
    torch.manual_seed(0)
    model = build_classifier(architecture=architecture, num_classes=10, channels=3, image_size=size)
    return device.placed_classifier(model, given, CPU, precision=precision, image_size=size)


def trained(
    given: Allotment, architecture: str, *, precision: str = "float32", steps: int = 3
) -> tuple[list[float], torch.nn.Module]:
    """Losses of a few steps."""
    model, layout, _ = placed(given, architecture=architecture, precision=precision)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    rng = torch.Generator().manual_seed(2)
    losses = []
    for _ in range(steps):
        x = torch.randn(16, 3, 32, 32, generator=rng).contiguous(memory_format=layout)
        with device.autocast(CPU, precision, 32):
            loss = functional.cross_entropy(model(x), torch.randint(0, 10, (16,), generator=rng))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model


@pytest.mark.parametrize("architecture", ["resnet32", "resnet10"])
@pytest.mark.parametrize(("precision", "most"), [("float32", 2e-3), ("bf16", 2e-2)])
def test_a_tuned_classifier_trains_alike(architecture, precision, most):
    ours, model = trained(Allotment(), architecture, precision=precision)
    theirs, plain = trained(Allotment(tuned=False), architecture, precision=precision)
    assert ours == pytest.approx(theirs, rel=most)
    kept, wanted = model.state_dict(), plain.state_dict()
    assert list(kept) == list(wanted)
    assert all(kept[name] == 3 for name in kept if name.endswith("num_batches_tracked"))
    again, _ = trained(Allotment(), architecture, precision=precision)
    assert again == ours


def arranged(model: torch.nn.Module) -> str:
    """Which parts have another form."""
    if blocks.has_winograd(model):
        return "all"
    return "norms" if any("forward" in vars(module) for module in model.modules()) else "nothing"


@compiles
@pytest.mark.parametrize(("given", "precision", "size", "parts"), [
    (Allotment(), "float32", 32, "all"),
    (Allotment(tuned=False), "float32", 32, "nothing"),
    (Allotment(compile=True), "float32", 32, "nothing"),
    (Allotment(), "bf16", 32, "norms"),
    (Allotment(tuned=False), "bf16", 32, "nothing"),
    (Allotment(), "float32", 8, "nothing"),
])  # fmt: skip
def test_larger_images_on_a_processor_are_what_is_arranged_for(given, precision, size, parts):
    model, layout, taken = placed(given, size=size, precision=precision)
    assert arranged(model) == parts
    assert taken == precision
    assert layout == (torch.channels_last if size >= 16 else torch.contiguous_format)


@compiles
@pytest.mark.parametrize(("architecture", "given", "amx", "parts"), [
    ("resnet32", Allotment(), False, "all"),
    ("cnn", Allotment(), False, "all"),
    ("resnet32", Allotment(), True, "norms"),
    ("resnet10", Allotment(), False, "norms"),
    ("resnet32", Allotment(tuned=False), False, "nothing"),
])  # fmt: skip
def test_with_bf16_instructions_a_narrow_classifier_is_in_float32_all_the_same(
    monkeypatch, architecture, given, amx, parts
):
    """Of which it is the faster; with AMX, or where channels are many, it is not."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    model, _, precision = placed(given, architecture=architecture, precision="auto")
    assert device.uses_bf16(CPU, precision, 32) == (parts != "all")
    assert arranged(model) == parts


@compiles
def test_a_tuned_classifier_measures_as_the_stored_one_does():
    """After training it makes features and logits of its images, and the stored weights make the same."""
    from diffult_ray.stages.classifier import outputs

    _, model = trained(Allotment(), "resnet32")
    stored = build_classifier(architecture="resnet32", num_classes=10, channels=3, image_size=32)
    stored.load_state_dict(model.state_dict())
    rng = torch.Generator().manual_seed(3)
    pictures = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8, generator=rng)
    found = [outputs(each, lambda x: x.float() / 127.5 - 1, pictures, CPU) for each in (model, stored)]
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
