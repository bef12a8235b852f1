"""The long-tailed split: which images train, which choose between cells, which test."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffult_ray import files
from diffult_ray.data import digits
from diffult_ray.data.longtail import choose, exponential_counts
from diffult_ray.errors import BadInput

PARTS = ("train", "validation", "test", "balanced")


@dataclass(frozen=True)
class Part:
    """Images [n, C, H, W] uint8, labels [n] int64, and their indices [n] in the source."""

    images: np.ndarray
    labels: np.ndarray
    source: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Split:
    """A long-tailed set.

    `train` is the long tail; `validation` (balanced, perhaps empty) chooses between the cells of a
    sweep; `test` is balanced; `balanced` is the full balanced training set, which only measures:
    it holds `train` and what the profile left over, and no image of the other two.
    """

    name: str
    class_names: list[str]
    train: Part
    validation: Part
    test: Part
    balanced: Part

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def counts(self) -> list[int]:
        """Training images a class."""
        return np.bincount(self.train.labels, minlength=self.num_classes).tolist()

    @property
    def channels(self) -> int:
        return self.train.images.shape[1]

    @property
    def image_size(self) -> int:
        return self.train.images.shape[-1]


def make_split(config: Any) -> Split:
    """The split of a `dataset` section.

    Raises:
        BadInput: if the set has too few images for what is asked.
    """
    images, labels, names = digits.load()
    images = _resized(images, config.image_size)
    parts = _digits_indices(labels, config)
    return Split(
        name=config.name,
        class_names=names,
        **{name: Part(images[i], labels[i], i) for name, i in parts.items()},
    )


def _digits_indices(labels: np.ndarray, config: Any) -> dict[str, np.ndarray]:
    """Test first, so that it stays the same images whatever the profile; then validation, then train."""
    classes = int(labels.max()) + 1
    held = choose(labels, [digits.TEST_PER_CLASS + config.validation_per_class] * classes, config.seed)
    held = held.reshape(classes, -1)
    test, validation = held[:, : digits.TEST_PER_CLASS], held[:, digits.TEST_PER_CLASS :]
    left = labels.copy()
    left[held.ravel()] = -1
    room = np.bincount(left[left >= 0], minlength=classes)
    counts = exponential_counts(config.max_per_class, config.imbalance_factor, classes)
    _check_counts(counts, room, config)
    train = choose(left, counts, config.seed)
    # The same shuffle without a tail, so that it contains `train`; a class may be a few images short.
    full = [min(config.max_per_class, int(n)) for n in room]
    balanced = choose(left, full, config.seed)
    return {
        "train": train,
        "validation": validation.ravel(),
        "test": test.ravel(),
        "balanced": balanced,
    }


def _check_counts(counts: list[int], room: np.ndarray, config: Any) -> None:
    for c, (count, there) in enumerate(zip(counts, room, strict=True)):
        if count > there:
            raise BadInput(
                where="dataset.max_per_class",
                rule=f"class {c} of digits has {there} images beside test and validation",
                value=f"{config.max_per_class}, which takes {count} of it",
                advice="lower it, or dataset.validation_per_class",
            )
    if min(counts) == 0:
        raise BadInput(
            where="dataset.imbalance_factor",
            rule="leaves a class without a training image",
            value=config.imbalance_factor,
            advice=f"at most dataset.max_per_class ({config.max_per_class})",
        )


def _resized(images: np.ndarray, size: int | None) -> np.ndarray:
    if size is None or images.shape[-1] == size:
        return images
    import torch
    from torch.nn.functional import interpolate

    tensor = torch.from_numpy(images).float()
    resized = interpolate(tensor, size=(size, size), mode="bilinear", antialias=True)
    return resized.round().clamp(0, 255).to(torch.uint8).numpy()


def save_split(split: Split, folder: str | Path) -> None:
    """Write `split.safetensors` and `split.json` into a folder."""
    import torch

    tensors = {}
    for name in PARTS:
        part = getattr(split, name)
        for field in ("images", "labels", "source"):
            tensors[f"{name}.{field}"] = torch.from_numpy(getattr(part, field))
    files.write_tensors(Path(folder) / "split.safetensors", tensors)
    files.write_json(
        Path(folder) / "split.json",
        {
            "name": split.name,
            "class_names": split.class_names,
            "class_counts": split.counts,
            "parts": {name: len(getattr(split, name)) for name in PARTS},
        },
    )


def load_split(folder: str | Path) -> Split:
    """Read what `save_split` wrote."""
    facts = files.read_json(Path(folder) / "split.json")
    tensors = files.read_tensors(Path(folder) / "split.safetensors")
    parts = {
        name: Part(*(tensors[f"{name}.{f}"].numpy() for f in ("images", "labels", "source")))
        for name in PARTS
    }
    return Split(name=facts["name"], class_names=facts["class_names"], **parts)
