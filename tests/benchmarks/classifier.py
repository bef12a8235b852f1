"""A training step of ResNet-32 at batch 128 as the classifier stage takes it, against plain PyTorch.

    python tests/benchmarks/classifier.py [--repeats 7] [--threads 2]
                                          [--gpu [--inner 100] [--compile] [--graphs] [--at-once 1 2 4 8]]

Reference: the same network in eager float32, contiguous NCHW, with torch's SGD, given normalised images that
are on the device; nothing augments them. Ours: images picked from those of CIFAR100-LT's size on the device,
cropped, mirrored and normalised there, the weighted loss, and fused SGD. In turns, each in its process.

`--at-once` measures instead how many steps a second as many trainings make together that share the GPU, each
in a process with an equal part of its memory: one JSON line a number, as trials an hour of the paper's recipe
(200 epochs of 50,000 images).
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import torch
from measure import alternately_apart, ratios, summary, tell
from unet import Step, made

from diffult_ray.allotment import Allotment
from diffult_ray.config.experiment import Classifier
from diffult_ray.data.batches import augment
from diffult_ray.method import device
from diffult_ray.method.objectives import make_objective
from diffult_ray.models import build_classifier
from diffult_ray.stages import classifier, feed

IMAGES, CLASSES, BATCH = 10_847, 100, 128
PAPER_STEPS = 200 * 391


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return build_classifier(architecture="resnet32", num_classes=CLASSES, channels=3, image_size=32)


def plain_step(given: Allotment, on: torch.device) -> Step:
    model = network().to(on)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=2e-4)
    images, labels = torch.randn(BATCH, 3, 32, 32, device=on), torch.randint(0, CLASSES, (BATCH,), device=on)

    def step() -> None:
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def own_step(given: Allotment, on: torch.device) -> Step:
    section = Classifier(architecture="resnet32", crop_padding=4, flip=True)
    config = {**section.model_dump(mode="json"), "seed": 0}
    split = SimpleNamespace(image_size=32)
    model, layout, precision = device.placed_classifier(
        network(), given, on, precision=config["precision"], image_size=32
    )
    wrapped, optimizer = device.compiled(model, given), classifier._optimizer(model, config)
    labels = torch.randint(0, CLASSES, (IMAGES,), device=on)
    weights = torch.ones(IMAGES, device=on)
    objective = make_objective(config, labels, weights, num_classes=CLASSES, steps=10**6)
    plan = feed.Plan(feed.Epochs(0, BATCH, IMAGES), slice(0, BATCH), 0, 10**6)
    pictures = torch.randint(0, 256, (IMAGES, 3, 32, 32), dtype=torch.uint8)
    images = feed.make(pictures, plan, device=on, readers=1)
    normalise = classifier.Normaliser([0.5] * 3, [0.25] * 3, on)
    done = iter(range(10**6))

    def step() -> None:
        number = next(done)
        index = plan.indices(number).to(on, non_blocking=True)
        drawn = classifier._batch_draws(config, split, number, on)
        x = augment(images(number), drawn, padding=config["crop_padding"], cutout=config["cutout"])
        x = normalise(x).contiguous(memory_format=layout)
        with device.autocast(on, precision, 32):
            logits = wrapped(x)
        loss = objective.loss(logits, labels[index], weights[index], step=number)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def packed(given: Allotment, numbers: list[int], inner: int, repeats: int) -> None:
    """Tell the rate of each number of trainings at once, in turns."""
    context = multiprocessing.get_context("spawn")
    most = max(numbers)
    part = replace(given, gpus=given.gpus / most)
    ready = context.Barrier(most + 1, timeout=600)
    turns = [context.Queue() for _ in range(most)]
    processes = [context.Process(target=_share, args=(part, inner, turn, ready)) for turn in turns]
    for process in processes:
        process.start()
    taken: dict[int, list[float]] = {number: [] for number in numbers}
    ready.wait()
    for _ in range(repeats):
        for number in numbers:
            for place, turn in enumerate(turns):
                turn.put(place < number)
            ready.wait()
            start = time.perf_counter()
            ready.wait()
            taken[number].append(number * inner / (time.perf_counter() - start))
    for turn in turns:
        turn.put(None)
    for process in processes:
        process.join()
    for number, rates in taken.items():
        tell(
            f"ResNet-32 trainings at once on a GPU: {number}", compile=given.compile, graphs=given.graphs,
            steps_per_second=summary(rates, 1),
            trials_an_hour=summary([3600 * r / PAPER_STEPS for r in rates], 1),
            ratio=summary([a / b for a, b in zip(rates, taken[numbers[0]], strict=True)]),
            base=f"the rate of {numbers[0]} at a time",
        )


def _share(given: Allotment, inner: int, turns, ready) -> None:
    call = made(own_step, given, inner)
    call()
    ready.wait()
    while (works := turns.get()) is not None:
        ready.wait()
        if works:
            call()
        ready.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--inner", type=int, default=1, help="steps a turn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--graphs", action="store_true")
    parser.add_argument("--at-once", type=int, nargs="+", default=[])
    given = parser.parse_args()
    plain = Allotment(cpus=given.threads, gpus=int(given.gpu), keep_memory=False)
    ours = Allotment(cpus=given.threads, gpus=int(given.gpu), compile=given.compile, graphs=given.graphs)
    if given.at_once:
        packed(ours, given.at_once, given.inner, given.repeats)
        return
    seconds, peaks = alternately_apart({
        "plain": partial(made, plain_step, plain, given.inner),
        "ours": partial(made, own_step, ours, given.inner),
    }, given.repeats)
    seconds = {k: [s / given.inner for s in v] for k, v in seconds.items()}
    tell(
        "ResNet-32 training step, batch 128", threads=given.threads, compile=given.compile,
        graphs=given.graphs, peak_mib=peaks, ratio=ratios(seconds, "plain")["ours"],
        images_per_second={k: summary([BATCH / s for s in v], 0) for k, v in seconds.items()},
    )


if __name__ == "__main__":
    main()
