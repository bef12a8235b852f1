"""An epoch of ResNet-32 on the real CIFAR100-LT (IF 100) against plain eager PyTorch.

    python tests/benchmarks/epochs.py --root DIR [--epochs 5] [--seeds 3]

DIR holds CIFAR-100 in torchvision's official files. Ours: the classifier stage in this process as a
one-worker trial runs it (images in memory, batched augmentation, what `precision: auto` picks). The
reference: the same network, recipe and split in eager float32, contiguous NCHW, with torchvision's PIL
transforms in a DataLoader whose number of workers (0 or 2) was the faster one in an epoch before. They
alternate by seed; one JSON line tells images a second, the ratio, and the loss of each epoch.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torchvision
from measure import summary, tell
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Subset
from torchvision import transforms

from diffult_ray import files, pipeline
from diffult_ray.config import Dataset, Experiment, StageResources
from diffult_ray.data import Split, make_split, save_split
from diffult_ray.models import build_classifier
from diffult_ray.seeds import stream
from diffult_ray.stages import Order, classifier

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
Curve = tuple[float, list[float]]  # images a second, mean loss of each epoch


def recipe(root: Path, epochs: int, seed: int) -> dict[str, object]:
    """The configuration that the stage of a `ce` trial has."""
    return dict(pipeline.classifier(Experiment(
        method="ce", select="test", dataset={"name": "cifar100", "root": str(root)},
        classifier={"epochs": epochs, "warmup": 0.2, "seed": seed},
    )).config)


def ours(config: dict, split_folder: Path, folder: Path, epochs: int, batches: int) -> Curve:
    order = Order(config, {"split": split_folder}, folder / "out", folder / "work")
    for each in (order.out, order.work):
        each.mkdir(parents=True)
    resources = StageResources(cpus=os.cpu_count())
    start = time.perf_counter()
    classifier.build([order], resources)
    rows = files.read_json(order.out / "history.json")
    seconds = rows[-1]["seconds"]
    assert seconds < time.perf_counter() - start
    return epochs * batches * 128 / seconds, _by_epoch(rows, batches, epochs)


def _by_epoch(rows: list[dict], batches: int, epochs: int) -> list[float]:
    """The mean loss of each epoch from the curve's points, each a mean since the one before."""
    losses, before = np.full(epochs * batches, np.nan), 0
    for row in rows:
        losses[before : row["step"]] = row["loss"]
        before = row["step"]
    return losses.reshape(epochs, batches).mean(1).tolist()


def loader(root: Path, split: Split, workers: int) -> DataLoader:
    transform = transforms.Compose([
        transforms.RandomCrop(32, 4), transforms.RandomHorizontalFlip(), transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ])
    images = torchvision.datasets.CIFAR100(root, train=True, transform=transform)
    chosen = Subset(images, split.train.source.tolist())
    return DataLoader(
        chosen, 128, shuffle=True, num_workers=workers, persistent_workers=workers > 0, drop_last=False
    )


def reference(config: dict, data: DataLoader, epochs: int) -> Curve:
    torch.set_num_threads(os.cpu_count())
    torch.manual_seed(stream(config["seed"], "weights"))
    model = build_classifier(architecture="resnet32", num_classes=100, channels=3, image_size=32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=2e-4)
    total, step, losses, seen = epochs * len(data), 0, [], 0
    start = time.perf_counter()
    for _ in range(epochs):
        found = 0.0
        for x, y in data:
            for group in optimizer.param_groups:
                group["lr"] = classifier.learning_rate(step, total, config)
            loss = cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found, step, seen = found + float(loss.detach()), step + 1, seen + len(y)
        losses.append(found / len(data))
    return seen / (time.perf_counter() - start), losses


def measure(root: Path, epochs: int, seeds: int) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        split = make_split(Dataset(name="cifar100", root=str(root), imbalance_factor=100))
        save_split(split, folder / "split")
        batches = math.ceil(len(split.train) / 128)
        loaders = {workers: loader(root, split, workers) for workers in (0, 2)}
        tried = {workers: reference(recipe(root, 1, 0), data, 1)[0] for workers, data in loaders.items()}
        data = loaders[max(tried, key=tried.__getitem__)]
        pairs: list[tuple[Curve, Curve]] = []
        for seed in range(seeds):
            config = recipe(root, epochs, seed)
            mine = ours(config, folder / "split", folder / str(seed), epochs, batches)
            pairs.append((mine, reference(config, data, epochs)))
    return {
        "epochs": epochs, "n": seeds, "reference_dataloader_images_per_second": tried,
        "images_per_second": {k: summary([p[i][0] for p in pairs]) for i, k in enumerate(("ours", "eager"))},
        "ratio": summary([a[0] / b[0] for a, b in pairs]),
        "loss": {k: losses([p[i][1] for p in pairs]) for i, k in enumerate(("ours", "eager"))},
    }


def losses(curves: list[list[float]]) -> list[str]:
    """Mean and deviation over the seeds, by epoch."""
    deviation = statistics.stdev if len(curves) > 1 else lambda _: math.nan
    return [f"{statistics.mean(e):.3f} (sd {deviation(e):.3f})" for e in zip(*curves, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", required=True, type=Path)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    tell(
        "ResNet-32 on CIFAR100-LT (IF 100), batch 128", packages=("torch", "torchvision"),
        **measure(options.root, options.epochs, options.seeds),
    )


if __name__ == "__main__":
    main()
