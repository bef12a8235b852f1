"""Inception as an artifact: its weights where every worker finds them, its features of real images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from diffult_ray import files
from diffult_ray.allotment import Allotment
from diffult_ray.stages import Order
from diffult_ray.stages.dataflow import from_tables, map_rows, matrix, tell


class FeatureRows:
    """Inception's features of the balanced images at the indices it is given."""

    def __init__(self, *, target: Mapping[str, Any], given: Allotment) -> None:
        from diffult_ray.data import load_split
        from diffult_ray.method import device
        from diffult_ray.stages.networks import load_network

        on = device.prepare(given)
        site = target["site"]
        self.split = load_split(site.fetch(target["split"]))
        self.network = load_network("inception", site.fetch(target["inception"]), on)

    def __call__(self, rows: pa.Table) -> pa.Table:
        images = self.split.pixels("balanced", rows["index"].to_numpy())
        features = self.network(images)[0].numpy()
        column = pa.FixedSizeListArray.from_arrays(features.ravel(), features.shape[1])
        return pa.table({"index": rows["index"], "features": column})


def build(orders: Sequence[Order], resources: Any) -> None:
    """The features of the full balanced set, once for all generators of a split.

    Args:
        resources: of the processes, and where the weights are, which is in no key.

    Raises:
        BadInput: for weights that cannot be had.
    """
    from diffult_ray.method import inception

    (order,) = orders
    state = inception.read(inception.find(resources.weights))
    files.write_tensors(order.out / "model.safetensors", state)
    order.site.publish(order.out)
    total = files.read_json(order.inputs["split"] / "split.json")["parts"]["balanced"]
    rows = from_tables([pa.table({"index": np.arange(total)})])
    target = {"split": str(order.inputs["split"]), "inception": str(order.out), "site": order.site}
    measured = map_rows(rows, FeatureRows, {"target": target}, resources=resources, order=order)
    features = _gathered(measured, total, order)
    _write(features, order.out)


def _gathered(measured: Any, total: int, order: Order) -> np.ndarray:
    """[n, d] float32 in the order of the images, whichever block comes first."""
    features, done = np.empty((total, 0), np.float32), 0
    for batch in measured.iter_batches(batch_format="pyarrow", batch_size=None):
        found = matrix(batch["features"])
        if features.shape[1] == 0:
            features = np.full((total, found.shape[1]), np.nan, np.float32)
        features[batch["index"].to_numpy()] = found
        done += len(found)
        tell(order, done, total)
    return features


def _write(features: np.ndarray, out: Path) -> None:
    import torch

    files.write_tensors(out / "features.safetensors", {"features": torch.from_numpy(features)})
    files.write_json(out / "summary.json", {"images": len(features), "dimensions": features.shape[1]})
