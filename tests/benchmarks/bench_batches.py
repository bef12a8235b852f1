"""In-memory batches against torchvision's CIFAR100 with PIL transforms and a DataLoader.

    python tests/benchmarks/bench_batches.py [--repeats 7] [--images 10000] [--threads 1]

Both give batches of 128 images of 32x32 in colour: random crop with padding 4, horizontal flip,
normalised float32. The data are random, in the official file format, so nothing is downloaded. The
variants alternate in one process; one JSON line tells images a second and their ratios.
"""

from __future__ import annotations

import argparse
import hashlib
import pickle
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torchvision
from measure import summary, tell
from torch.utils.data import DataLoader
from torchvision import transforms

from diffult_ray.data import batches
from diffult_ray.stages import feed

BATCH, SIZE, PADDING = 128, 32, 4
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


def write_official(root: Path, images: np.ndarray, labels: np.ndarray) -> dict[str, str]:
    """Files in CIFAR-100's official format; returns the md5 of each."""
    folder, md5s = root / "cifar-100-python", {}
    folder.mkdir()
    content = {"data": images.reshape(len(images), -1), "fine_labels": labels.tolist()}
    names = {"fine_label_names": [f"class {c}" for c in range(100)]}
    for name, value in (("train", content), ("test", content), ("meta", names)):
        data = pickle.dumps(value)
        (folder / name).write_bytes(data)
        md5s[name] = hashlib.md5(data).hexdigest()
    return md5s


def torchvision_set(root: Path, md5s: dict[str, str]) -> torchvision.datasets.CIFAR100:
    """torchvision's own class on those files, whose md5 it is told."""
    known = torchvision.datasets.CIFAR100
    transform = transforms.Compose([
        transforms.RandomCrop(SIZE, PADDING),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ])
    official = {
        "train_list": [["train", md5s["train"]]],
        "test_list": [["test", md5s["test"]]],
        "meta": {**known.meta, "md5": md5s["meta"]},
    }
    with mock.patch.multiple(known, **official):
        return known(root, train=True, transform=transform)


def in_memory(images: torch.Tensor, epoch: int) -> Iterator[torch.Tensor]:
    """What the training loop of a classifier does before its forward pass."""
    mean, std, n = torch.tensor(MEAN), torch.tensor(STD), len(images)
    steps = n // BATCH
    first, total = epoch * steps, (epoch + 1) * steps
    plan = feed.Plan(feed.Epochs(0, BATCH, n), slice(0, BATCH), first, total)
    taken = feed.make(images, plan, device=torch.device("cpu"), readers=1)
    for step in range(first, total):
        drawn = batches.draw(BATCH, batches.generator(0, "augment", step), padding=PADDING, flip=True)
        drawn = drawn.only(plan.rows(step))
        yield batches.normalise(batches.augment(taken(step), drawn, padding=PADDING), mean, std)


def rate(make: Callable[[int], Iterator], epoch: int) -> float:
    """Images a second of one epoch, workers already running where there are any."""
    count, start = 0, time.perf_counter()
    for batch in make(epoch):
        count += len(batch[0] if isinstance(batch, list) else batch)
    return count / (time.perf_counter() - start)


def step_seconds(steps: int = 20) -> float:
    """A training step of ResNet-32 with what `precision: auto` picks here, its batch at hand."""
    from diffult_ray.method.device import autocast, memory_format
    from diffult_ray.models import build_classifier

    device = torch.device("cpu")
    layout = memory_format(device, SIZE, network="classifier")
    model = build_classifier(architecture="resnet32", num_classes=100, channels=3, image_size=SIZE)
    model.to(memory_format=layout)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
    x = torch.randn(BATCH, 3, SIZE, SIZE).contiguous(memory_format=layout)
    y = torch.randint(0, 100, (BATCH,))
    seconds = []
    for _ in range(steps + 3):
        start = time.perf_counter()
        with autocast(device, "auto", SIZE):
            logits = model(x)
        optimizer.zero_grad(set_to_none=True)
        torch.nn.functional.cross_entropy(logits.float(), y).backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[3:])


def measure(repeats: int, images: int) -> dict[str, list[float]]:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (images, 3, SIZE, SIZE), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        md5s = write_official(Path(folder), pixels, rng.integers(0, 100, images))
        data = torchvision_set(Path(folder), md5s)
    variants: dict[str, Callable[[int], Iterator]] = {
        "in memory": lambda epoch: in_memory(torch.from_numpy(pixels), epoch),
    }
    for workers in (0, 2):
        loader = DataLoader(
            data, BATCH, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0
        )
        variants[f"torchvision, {workers} workers"] = lambda _, loader=loader: iter(loader)
    rates: dict[str, list[float]] = {name: [] for name in variants}
    for epoch in range(repeats + 1):
        for name, make in variants.items():
            found = rate(make, epoch)
            rates[name] += [found] if epoch else []  # the first epoch starts the workers
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rates = measure(options.repeats, options.images)
    ours = rates.pop("in memory")
    for name, found in rates.items():
        tell(
            "in-memory batches, crop 4 + flip + normalise, batch 128, 32x32 colour", base=name,
            packages=("torch", "numpy", "torchvision", "pillow"), threads=options.threads,
            images_per_second={"ours": summary(ours, 1), name: summary(found, 1)},
            share_of_a_resnet32_step=round(BATCH / statistics.median(ours) / step_seconds(), 4),
            ratio=summary([a / b for a, b in zip(ours, found, strict=True)], 2),
        )


if __name__ == "__main__":
    main()
