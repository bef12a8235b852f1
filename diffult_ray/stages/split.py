"""The long-tailed split as an artifact."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from diffult_ray import files


def build(config, inputs, out, *, resources, work) -> None:
    """Made in the driver: choosing images takes less than starting a worker."""
    from diffult_ray.data import make_split, save_split

    split = make_split(SimpleNamespace(**config))
    save_split(split, out)
    files.write_json(Path(out) / "summary.json", {
        "classes": split.num_classes,
        "train_images": len(split.train),
        "validation_images": len(split.validation),
        "test_images": len(split.test),
        "balanced_images": len(split.balanced),
    })
