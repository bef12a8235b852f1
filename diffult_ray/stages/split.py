"""The long-tailed split as an artifact."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

from diffult_ray import files
from diffult_ray.stages import Order


def build(orders: Sequence[Order], resources: None) -> None:
    """Made in the driver: choosing images takes less than starting a worker."""
    (order,) = orders
    from diffult_ray.data import make_split, save_split

    split = make_split(SimpleNamespace(**order.config))
    save_split(split, order.out)
    files.write_json(order.out / "summary.json", {
        "classes": split.num_classes,
        "train_images": len(split.train),
        "validation_images": len(split.validation),
        "test_images": len(split.test),
        "balanced_images": len(split.balanced),
    })
