"""A training step of ResNet-32 at batch 128 as the classifier stage takes it, against plain PyTorch.

    python tests/benchmarks/classifier.py [--repeats 7] [--threads 2]
                                          [--gpu [--inner 100] [--compile] [--graphs]]

Reference: the same network in eager float32, contiguous NCHW, with torch's SGD, given normalised images that
are on the device; nothing augments them. Ours: images picked from those of CIFAR100-LT's size on the device,
cropped, mirrored and normalised there, the weighted loss, and fused SGD. In turns, each in its process.
"""

from __future__ import annotations

import argparse
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
    layout = device.memory_format(on, 32, network="classifier")
    model = network().to(on, memory_format=layout)
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
        with device.autocast(on, config["precision"], 32):
            logits = wrapped(x)
        loss = objective.loss(logits, labels[index], weights[index], step=number)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--inner", type=int, default=1, help="steps a turn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--graphs", action="store_true")
    given = parser.parse_args()
    plain = Allotment(cpus=given.threads, gpus=int(given.gpu), keep_memory=False)
    ours = Allotment(cpus=given.threads, gpus=int(given.gpu), compile=given.compile, graphs=given.graphs)
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
