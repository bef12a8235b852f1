"""Each path of a GPU against float64 on the CPU: within rounding in float32, within 1e-2 in bf16.

Beyond 1e-2 are only a whole prediction of the untrained U-Net in bf16 (1.2e-2, as a CPU's), a classifier's
gradient behind ReLUs that flip, and what a sampler adds up over its steps; each has its tolerance below, the
last that of bf16 on a CPU.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from diffult_ray.allotment import Allotment
from diffult_ray.config import Generator
from diffult_ray.data.batches import Draw, augment, draw, normalise
from diffult_ray.method import device
from diffult_ray.method.bands import (
    band,
    class_statistics,
    closeness,
    distances,
    keep,
    nearest_other,
    nearest_real,
)
from diffult_ray.method.objective import Guide, Objective
from diffult_ray.method.objectives import make_objective
from diffult_ray.method.sampling import initial_noise, make_scheduler, sample, to_uint8
from diffult_ray.models import build_classifier, build_unet
from diffult_ray.models.unet import unet_preset

CPU = torch.device("cpu")
FLOAT32, TF32, BF16 = 1e-5, 2e-3, 1e-2  # relative, of a whole tensor's norm
PREDICTION = 2e-2  # of the U-Net in bf16, some forty layers after another
CLASSES, ROWS = 10, 6
WAYS = {  # how a network is run -> (precision, Allotment, tolerance)
    "float32": ("float32", Allotment(gpus=1), FLOAT32),
    "bf16": ("bf16", Allotment(gpus=1), BF16),
    "bf16, compiled": ("bf16", Allotment(gpus=1, compile=True), BF16),
    "bf16, graphs": ("bf16", Allotment(gpus=1, compile=True, graphs=True), BF16),
}


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative, in the norm of the whole."""
    difference = found.detach().double().cpu() - wanted.detach().double().cpu()
    return float(difference.norm() / wanted.detach().double().norm().cpu())


def unet() -> torch.nn.Module:
    """The paper's, without dropout, whose draws are another device's; its last layer is not zero."""
    torch.manual_seed(0)
    preset = {**unet_preset(32), "dropout": 0.0}
    return build_unet(image_size=32, image_channels=3, num_classes=CLASSES, **preset)


def batch(n: int = ROWS) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    images = torch.rand(n, 3, 32, 32, generator=rng, dtype=torch.float64) * 2 - 1
    return images, torch.randint(0, CLASSES, (n,), generator=rng)


def on_gpu(gpu: torch.device, given: Allotment, model: torch.nn.Module):
    """(the network, how it is called) as the generator stage has them."""
    layout = device.memory_format(gpu, 32, network="unet")
    model = device.tuned(model, given).to(gpu, memory_format=layout)
    wrapped = device.compiled(model, given)
    return model, lambda x, t, y: wrapped(x.contiguous(memory_format=layout), t, y).sample.float()


def settings(**values) -> dict:
    section = Generator(**{**unet_preset(32), "dropout": 0.0}, batch_size=ROWS, label_drop=0.0, **values)
    return {**section.model_dump(mode="json"), "seed": 0}


def guide(on: torch.device, kind: torch.dtype) -> Guide:
    """A random extractor and what it makes of random real images."""
    torch.manual_seed(2)
    extractor = build_classifier(architecture="cnn", num_classes=CLASSES, channels=3, image_size=32).eval()
    real, labels = batch(60)
    with torch.no_grad():
        features = copy.deepcopy(extractor).double().features(real)
    statistics = class_statistics(features, labels, CLASSES, normalise=False, scope="class")
    moved = type(statistics)(statistics.centre.to(on), statistics.scale.to(on), statistics.normalise)
    extractor = extractor.to(on, kind)
    return Guide(lambda images: extractor.features(images.to(kind)), moved)


OBJECTIVES = {
    "ddpm": {"regulariser": "none"},
    "cbdm": {"regulariser": "cbdm"},
    "aid": {"regulariser": "none", "aid_weight": 0.1},
    "edm": {"objective": "edm", "regulariser": "none"},
}


@pytest.fixture(scope="module")
def wanted():
    """Losses and gradients of each objective in float64 on the CPU, with the draws."""
    found = {}
    images, labels = batch()
    for name, values in OBJECTIVES.items():
        objective = Objective(settings(**values), torch.full((CLASSES,), 10), guide(CPU, torch.float64))
        coins = [torch.Generator().manual_seed(i) for i in range(2)]
        drawn = objective.draw(labels, images.shape[1:], *coins)
        drawn = type(drawn)(**{
            k: v.double() if v is not None and v.is_floating_point() else v for k, v in vars(drawn).items()
        })
        model = device.tuned(unet(), Allotment(tuned=False)).double()
        losses = objective.losses(lambda x, t, y, m=model: m(x, t, y).sample, images, drawn)
        losses.mean().backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
        found[name] = (drawn, losses.detach(), gradients)
    return found


CASES = [(name, way) for name in OBJECTIVES for way in ("float32", "bf16")] + [("cbdm", "bf16, graphs")]


@pytest.mark.parametrize(("name", "way"), CASES)
def test_losses_and_gradients_of_the_papers_network(gpu, exact, wanted, name, way):
    precision, given, tolerance = WAYS[way]
    drawn, losses, gradients = wanted[name]
    images, _ = batch()
    counts = torch.full((CLASSES,), 10, device=gpu)
    objective = Objective(settings(**OBJECTIVES[name]), counts, guide(gpu, torch.float32))
    moved = type(drawn)(**{
        k: None if v is None else (v.float() if v.is_floating_point() else v).to(gpu)
        for k, v in vars(drawn).items()
    })
    model, network = on_gpu(gpu, given, unet())
    with device.autocast(gpu, precision, 32):
        found = objective.losses(network, images.float().to(gpu), moved)
    found.mean().backward()
    flat = torch.cat([p.grad.flatten() for p in model.parameters()])
    print(f"{name}, {way}: losses {error(found, losses):.1e}, gradients {error(flat, gradients):.1e}")
    assert error(found, losses) < tolerance
    assert error(flat, gradients) < 3 * tolerance  # sums over rows and positions, of both signs


def test_an_evaluation_with_rounded_weights_and_with_tf32(gpu):
    images, labels = batch()
    times = torch.arange(ROWS) * 150
    with torch.no_grad():
        wanted = unet().double().eval()(images, times, labels).sample
        arguments = images.float().to(gpu), times.to(gpu), labels.to(gpu)
        assert error(unet().eval().to(gpu)(*arguments).sample, wanted) < TF32
        model = device.tuned(unet().eval(), Allotment(gpus=1), rounded=True, trains=False)
        model = model.to(gpu, memory_format=torch.channels_last)
        for given in (Allotment(gpus=1), Allotment(gpus=1, compile=True, graphs=True)):
            with device.autocast(gpu, "auto", 32):
                found = device.compiled(model, given)(*arguments).sample
            print(f"evaluation, {'graphs' if given.graphs else 'bf16'}: {error(found, wanted):.1e}")
            assert error(found, wanted) < PREDICTION


def test_fused_steps_and_the_average_follow_float64(gpu, exact):
    """Twenty steps of Adam with clipping and EMA, by the same gradients."""
    from diffusers.training_utils import EMAModel

    ends = []
    for on, kind in ((CPU, torch.float64), (gpu, torch.float32)):
        torch.manual_seed(0)
        model = torch.nn.Linear(30, 20, dtype=torch.float64).to(on, kind)
        average = EMAModel(model.parameters(), decay=0.9, foreach=True)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, fused=True)
        x = torch.randn(50, 30, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(on, kind)
        for _ in range(20):
            optimizer.zero_grad(set_to_none=True)
            model(x).square().mean().backward()
            device.clip(list(model.parameters()), 0.1)
            optimizer.step()
            device.averaged(average, list(model.parameters()), Allotment())
        ends.append([*model.parameters(), *average.shadow_params])
    for wanted, found in zip(*ends, strict=True):
        assert error(found, wanted) < FLOAT32


@pytest.mark.parametrize(("architecture", "way"), [
    *((name, way) for name in ("cnn", "resnet32", "resnet10") for way in ("float32", "bf16")),
    ("resnet32", "bf16, compiled"), ("resnet32", "bf16, graphs"),
])
def test_a_classifiers_logits_and_gradients(gpu, exact, architecture, way):
    precision, given, tolerance = WAYS[way]
    images, labels = batch(64)

    def network() -> torch.nn.Module:
        torch.manual_seed(0)
        return build_classifier(
            architecture=architecture, num_classes=CLASSES, channels=3, image_size=32
        ).train()

    wanted = network().double()
    logits = wanted(images)
    torch.nn.functional.cross_entropy(logits, labels).backward()
    model = network().to(gpu, memory_format=torch.channels_last)
    with device.autocast(gpu, precision, 32):
        shown = images.float().to(gpu).contiguous(memory_format=torch.channels_last)
        found = device.compiled(model, given)(shown)
    torch.nn.functional.cross_entropy(found.float(), labels.to(gpu)).backward()
    assert error(found, logits) < tolerance
    pairs = zip(model.parameters(), wanted.parameters(), strict=True)
    gradients = [(found.grad.flatten().cpu(), own.grad.flatten()) for found, own in pairs]
    flat = [torch.cat(each) for each in zip(*gradients, strict=True)]
    print(f"{architecture}, {way}: logits {error(found, logits):.1e}, gradients {error(*flat):.1e}")
    # A ReLU near zero is on here and off there, so that a gradient jumps: 0.12 in bf16 on a CPU, too.
    assert error(*flat) < (0.25 if precision == "bf16" else 0.02)


@pytest.mark.parametrize("method", ["ce", "reweight", "balanced_softmax", "ldam_drw", "mixup"])
def test_a_classifiers_losses(gpu, method):
    rng = torch.Generator().manual_seed(0)
    labels, weights = torch.randint(0, 5, (40,), generator=rng), torch.rand(40, generator=rng)
    logits = torch.randn(40, 5, generator=rng)
    config = {"method": method, "max_margin": 0.5, "scale": 30, "drw_start": 0.5, "mixup_alpha": 1.0}
    found = []
    for on in (CPU, gpu):
        made = make_objective(config, labels.to(on), weights.to(on), num_classes=5, steps=10)
        arguments = logits.to(on), labels.to(on), weights.to(on)
        found.append([made.loss(*arguments, step=s, mixing=made.mixing(0, s, 40)).cpu() for s in (0, 9)])
    torch.testing.assert_close(found[1], found[0])


def test_crops_flips_and_holes_are_the_same_images(gpu):
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (50, 3, 32, 32), generator=rng, dtype=torch.uint8)
    drawn = draw(50, rng, padding=4, flip=True, cutout=8, image_size=32)
    moved = Draw(*(x.to(gpu) for x in (drawn.shift, drawn.mirrored, drawn.hole)))
    usual = augment(images, drawn, padding=4, cutout=8)
    found = augment(images.to(gpu), moved, padding=4, cutout=8)
    assert torch.equal(found.cpu(), usual)
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.1])
    torch.testing.assert_close(
        normalise(found, mean.to(gpu), std.to(gpu)).cpu(), normalise(usual, mean, std)
    )


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("to", ["centre", "nearest"])
def test_scores_are_the_same(gpu, to, normalised):
    rng = torch.Generator().manual_seed(0)
    real, fake = torch.randn(700, 64, generator=rng), torch.randn(900, 64, generator=rng)
    real_labels, labels = (torch.randint(0, 12, (n,), generator=rng) for n in (700, 900))

    def scored(on):
        known, classes, new, own = (x.to(on) for x in (real, real_labels, fake, labels))
        statistics = class_statistics(known, classes, 12, normalise=normalised, scope="class")
        got = distances(new, own, statistics, to=to, real_features=known, real_labels=classes)
        spacing = nearest_other(known)[1]
        closest = closeness(new, known, spacing)
        assert got.device == known.device
        return [got, band(got), keep(got, band(got), bands=("AID",)), spacing, *closest,
                *nearest_real(new, own, known, classes)]

    for usual, found in zip(scored(CPU), scored(gpu), strict=True):
        if usual.is_floating_point():
            torch.testing.assert_close(found.cpu(), usual, rtol=1e-9, atol=1e-9)
        else:
            assert torch.equal(found.cpu(), usual)


SAMPLERS = [("ddpm", "ddpm", 20), ("ddpm", "ddim", 10), ("ddpm", "dpmsolver++", 10), ("ddpm", "heun", 6),
            ("edm", "heun", 6), ("edm", "dpmsolver++", 10)]


@pytest.mark.parametrize(("objective", "sampler", "steps"), SAMPLERS)
def test_sampled_images_are_the_same_and_those_of_bf16_nearly(gpu, exact, objective, sampler, steps):
    torch.manual_seed(0)
    model = build_unet(image_size=16, image_channels=3, num_classes=4, channels=(32, 64), blocks=1,
                       attention=(8,), dropout=0.0).eval()
    seeds = list(range(5))
    found = {}
    for name, on, precision in (("cpu", CPU, "float32"), ("gpu", gpu, "float32"), ("again", gpu, "float32"),
                                ("bf16", gpu, "bf16"), ("bf16 on the cpu", CPU, "bf16")):
        own = copy.deepcopy(model).to(on)

        def network(x, t, y, own=own, on=on, precision=precision):
            with device.autocast(on, precision, 16):
                return own(x, t, y).sample.float()

        scheduler = make_scheduler(sampler, objective=objective, timesteps=1000, steps=steps)
        found[name] = sample(
            network, scheduler, initial_noise(seeds, (3, 16, 16)).to(on), torch.arange(5).to(on) % 4,
            guidance=1.5, null_label=4, seeds=seeds,
        ).cpu()
    assert error(found["gpu"], found["cpu"]) < 1e-3
    assert torch.equal(found["again"], found["gpu"])
    on_gpu, on_cpu = (error(found[name], found["cpu"]) for name in ("bf16", "bf16 on the cpu"))
    print(f"{objective} by {sampler}: float32 {error(found['gpu'], found['cpu']):.1e}, "
          f"bf16 {on_gpu:.1e}, on a CPU {on_cpu:.1e}")
    assert on_gpu < 2 * on_cpu  # a solver adds up what each of its steps rounds: up to 0.05 there, too
    assert to_uint8(found["gpu"].to(gpu)).dtype == torch.uint8


def test_inception_is_the_same(gpu, exact):
    from diffult_ray.method import inception
    from tests.inception_weights import random_weights

    images = np.random.default_rng(0).integers(0, 256, (4, 3, 32, 32), dtype=np.uint8)
    network = inception.build(random_weights())
    usual = inception.outputs(network, torch.from_numpy(images), CPU)
    found = inception.outputs(network.to(gpu), torch.from_numpy(images), gpu)
    for own, wanted in zip(found, usual, strict=True):
        assert error(own, wanted) < 1e-3


def test_a_part_of_a_gpu_bounds_the_memory(gpu):
    on = device.pick(0.25)
    total = torch.cuda.get_device_properties(on).total_memory
    try:
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(int(0.3 * total), dtype=torch.uint8, device=on)
        torch.empty(int(0.1 * total), dtype=torch.uint8, device=on)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, on)


def test_ddp_over_nccl_takes_the_same_step(gpu):
    """A group of one: more ranks need more GPUs."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    images, labels = (x.to(gpu) for x in batch(4))
    gradients = []
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for parallel in (False, True):
            model, _ = on_gpu(gpu, Allotment(gpus=1), unet())
            wrapped = model
            if parallel:
                wrapped = DistributedDataParallel(model, device_ids=[0], gradient_as_bucket_view=True)
            with device.autocast(gpu, "bf16", 32):
                found = wrapped(images.float(), labels * 10, labels).sample.float()
            found.square().mean().backward()
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    finally:
        dist.destroy_process_group()
    assert error(gradients[1], gradients[0]) < BF16  # sums in another order
