"""The long-tailed split as an artifact."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffult_ray import files
from diffult_ray.config import Dataset
from diffult_ray.errors import BadInput
from diffult_ray.stages import Order


def build(orders: Sequence[Order], resources: Any) -> None:
    """Made in the driver: choosing images takes less than starting a worker.

    Args:
        resources: the place of the data, `root`, `download` and `loading`, which is in no key.
    """
    (order,) = orders
    from diffult_ray.data import make_split, save_split

    place = {"root": resources.root, "download": resources.download, "loading": resources.loading}
    config = {k: v for k, v in order.config.items() if k != "content"}
    split = make_split(Dataset.model_validate({**config, **place}))
    if split.facts["fingerprint"] != order.config["content"]:
        raise BadInput(
            where="dataset.root", rule="the data changed while the sweep was starting", value=resources.root,
            advice="start it again when they are whole",
        )
    save_split(split, order.out)
    files.write_json(order.out / "summary.json", {
        "classes": split.num_classes,
        "train_images": len(split.train),
        "validation_images": len(split.validation),
        "test_images": len(split.test),
        "balanced_images": len(split.balanced),
        "skipped_images": split.facts["skipped"]["n"],
        "streamed": split.streamed,
        "notes": split.facts["notes"],
    })
