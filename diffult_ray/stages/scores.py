"""Scoring: distance in units of d_f, band, nearest real image and closeness of every generated image."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from diffult_ray import files
from diffult_ray.allotment import Allotment
from diffult_ray.stages import Order, pool
from diffult_ray.stages.dataflow import (
    count,
    from_parquet,
    map_rows,
    read_parts,
    write_part,
)

SCHEMA = pool.hugging_face_metadata(pool.SCORED_SCHEMA)


class Scorer:
    """One order's extractor, and what it makes of the real images."""

    def __init__(self, target: dict[str, Any], device: Any) -> None:
        from diffult_ray.stages.classifier import load_classifier

        folders = {name: target["site"].fetch(target[name]) for name in ("extractor", "split")}
        self.target, self.device = {**target, **folders}, device
        self.model, self.normalise = load_classifier(self.target["extractor"], device)

    @cached_property
    def real(self) -> dict[str, Any]:
        import torch

        from diffult_ray.data import load_split

        split = load_split(self.target["split"])
        features = files.read_tensors(Path(self.target["extractor"]) / "features.safetensors")["features"]
        labels = torch.from_numpy(split.train.labels)
        self.num_classes = split.num_classes
        return {"real_features": features.to(self.device), "real_labels": labels.to(self.device)}

    @cached_property
    def statistics(self) -> Any:
        from diffult_ray.method.bands import class_statistics

        features, labels = self.real.values()
        config = self.target["config"]
        return class_statistics(
            features, labels, self.num_classes, normalise=config["normalise"], scope=config["scope"]
        )

    @cached_property
    def spacing(self) -> Any:
        from diffult_ray.method.bands import nearest_other

        return nearest_other(self.real["real_features"])[1]

    def __call__(self, rows: pa.Table) -> pa.Table:
        """The rows with the score columns."""
        import torch

        from diffult_ray.method.bands import BANDS, band, closeness, distances, nearest_real
        from diffult_ray.stages.classifier import outputs

        images = torch.from_numpy(pool.decode(rows["image"].to_pylist()))
        labels = torch.from_numpy(rows["label"].to_numpy().copy()).to(self.device)
        features, logits = outputs(self.model, self.normalise, images, self.device)
        features = features.to(self.device)
        to = self.target["config"]["distance"]
        distance = distances(features, labels, self.statistics, to=to, **self.real)
        nearest, nearest_distance = nearest_real(features, labels, **self.real)
        closest, ratio = closeness(features, self.real["real_features"], self.spacing)
        columns = {
            "distance": distance.double().cpu().numpy(),
            "band": [BANDS[code] for code in band(distance).tolist()],
            "nearest": nearest.cpu().numpy(),
            "nearest_distance": nearest_distance.double().cpu().numpy(),
            "predicted": logits.argmax(1).numpy(),
            "closest": closest.cpu().numpy(),
            "closest_ratio": ratio.cpu().numpy(),
        }
        for name, kind in pool.SCORE_FIELDS:
            rows = rows.append_column(name, pa.array(columns[name], type=kind))
        return rows.cast(SCHEMA)


class ScoreRows:
    """Scores the images it is given and writes them into the parts of their order."""

    def __init__(self, *, targets: list[dict[str, Any]], given: Allotment) -> None:
        from diffult_ray.method import device

        on = device.prepare(given)
        self.targets = targets
        self.scorers = [Scorer(target, on) for target in targets]

    def __call__(self, rows: pa.Table) -> pa.Table:
        began, done = time.time(), 0
        for number, mine in self._shared_out(rows):
            target = self.targets[number]
            write_part(target["site"], target["parts"], self.scorers[number](mine))
            done += mine.num_rows
        return pa.table({"done": [done], "began": [began]})

    def _shared_out(self, rows: pa.Table) -> Iterator[tuple[int, pa.Table]]:
        """(order, its rows); a pool may be that of several orders, which score it differently."""
        folders = pa.array([str(Path(path).parent) for path in rows["path"].to_pylist()])
        images = rows.select(pool.IMAGE_SCHEMA.names)
        for number, target in enumerate(self.targets):
            mine = images.filter(pc.equal(folders, target["pool"]))
            if mine.num_rows:
                yield number, mine


def build(orders: Sequence[Order], resources: Any) -> None:
    """Each order's pool with its scores, in `out/pool`."""
    targets = [_target(order) for order in orders]
    pools = [order.inputs["images"] / "pool" for order in orders]
    sizes = [pq.read_table(pool, columns=["id"]).num_rows for pool in pools]
    if any(sizes):
        full = list({t["pool"]: None for t, size in zip(targets, sizes, strict=True) if size})
        _, system = orders[0].site.storage(pools[0])
        data = from_parquet(full, system, sum(sizes))
        scored = map_rows(
            data, ScoreRows, {"targets": targets}, resources=resources, order=orders[0]
        )
        count(scored, sum(sizes), orders[0])
    for order, size in zip(orders, sizes, strict=True):
        _finish(order, size)


def _target(order: Order) -> dict[str, Any]:
    return {
        "pool": order.site.storage(order.inputs["images"] / "pool")[0],
        "extractor": str(order.inputs["extractor"]),
        "split": str(order.inputs["split"]),
        "config": dict(order.config),
        "parts": str(order.work / "parts"),
        "site": order.site,
    }


def _finish(order: Order, size: int) -> None:
    table = read_parts(order.site.fetch(order.work / "parts"), SCHEMA)
    if table.num_rows != size:
        raise RuntimeError(f"{size} images were to be scored, {table.num_rows} are there")
    pool.write_pool(table, order.out / "pool")
    shares = Counter(table["band"].to_pylist())
    files.write_json(order.out / "summary.json", {
        "images": size,
        **{f"p_{band.lower()}": shares[band] / max(1, size) for band in ("ID", "AID", "OOD")},
        **_memorisation(table, order),
    })


def _memorisation(table: pa.Table, order: Order) -> dict[str, float | None]:
    """Shares of images that are nearer to a training image than any other training image is.

    `memorised` of the generated images, `memorised_expected` of the training images among themselves,
    `agreement` of the generated images whose label the extractor predicts. None without images.
    """
    from diffult_ray.method.bands import expected_share, nearest_other

    features = files.read_tensors(order.inputs["extractor"] / "features.safetensors")["features"]
    ratio = table["closest_ratio"].to_numpy()
    agrees = table["predicted"].to_numpy() == table["label"].to_numpy()
    middle = float(np.median(ratio)) if len(ratio) else math.inf
    return {
        "memorised": float((ratio < 1).mean()) if len(ratio) else None,
        "memorised_expected": expected_share(*nearest_other(features)),
        "closest_ratio": middle if math.isfinite(middle) else None,  # the median
        "agreement": float(agrees.mean()) if len(ratio) else None,
    }
