"""FID and IS of a generator's images, drawn uniformly over classes and never stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from diffult_ray import files
from diffult_ray.stages import Order, pool
from diffult_ray.stages.dataflow import by_target, from_tables, map_with_actors, tell
from diffult_ray.stages.sampler import Samplers

SPLITS = 10  # of the inception score


class MeasureRows:
    """Samples the rows it is given, and returns their reference features and logits."""

    def __init__(self, *, targets: list[dict[str, Any]], cpus: float, gpus: float) -> None:
        from diffult_ray.stages.classifier import load_classifier

        self.samplers = Samplers(targets, cpus=cpus, gpus=gpus)
        device = self.samplers.device
        self.references = [load_classifier(t["reference"], device) for t in targets]

    def __call__(self, rows: pa.Table) -> pa.Table:
        return pa.concat_tables([self._measure(target, mine) for target, mine in by_target(rows)])

    def _measure(self, target: int, rows: pa.Table) -> pa.Table:
        import torch

        from diffult_ray.stages.classifier import outputs

        images = self.samplers[target](rows["label"].to_numpy(), rows["seed"].to_numpy())
        model, normalise = self.references[target]
        found = outputs(model, normalise, torch.from_numpy(images), self.samplers.device)
        features, logits = (pa.FixedSizeListArray.from_arrays(x.numpy().ravel(), x.shape[1]) for x in found)
        targets = pa.array([target] * rows.num_rows, type=pa.int64())
        return pa.table({"target": targets, "split": rows["split"], "features": features, "logits": logits})


class Measures:
    """One order's running sums."""

    def __init__(self) -> None:
        from diffult_ray.method.quality import InceptionScore, Moments

        self.moments, self.score = Moments(), InceptionScore(splits=SPLITS)

    def update(self, rows: pa.Table) -> None:
        features, logits = (_matrix(rows[name]) for name in ("features", "logits"))
        self.moments.update(features)
        self.score.update(logits, rows["split"].to_numpy())


def build(orders: Sequence[Order], resources: Any) -> None:
    """Streamed in float64 against the full balanced training set, 10 splits for IS."""
    wanted = [_wanted(order) for order in orders]
    targets = [_target(order) for order in orders]
    measured = map_with_actors(from_tables(wanted), MeasureRows, {"targets": targets}, resources=resources)
    measures = [Measures() for _ in orders]
    done, total = 0, sum(rows.num_rows for rows in wanted)
    for batch in measured.iter_batches(batch_format="pyarrow", batch_size=None):
        for target, rows in by_target(batch):
            measures[target].update(rows)
        done += batch.num_rows
        tell(orders[0].work, done, total)
    for order, each in zip(orders, measures, strict=True):
        _finish(order, each)


def _wanted(order: Order) -> pa.Table:
    from diffult_ray.method.quality import balanced_counts

    classes = len(files.read_json(order.inputs["split"] / "split.json")["class_names"])
    counts = balanced_counts(order.config["images"], classes)
    rows = pool.requests(counts, order.config["generation"]["seed"])
    return rows.append_column("split", pa.array(_splits(rows["seed"].to_numpy())))


def _splits(seeds: np.ndarray) -> np.ndarray:
    """The inception score's split of each image: equal parts, in the random order of the images' seeds."""
    rank = np.empty(len(seeds), dtype=np.int64)
    rank[np.argsort(seeds)] = np.arange(len(seeds))
    return rank * SPLITS // len(seeds)


def _target(order: Order) -> dict[str, Any]:
    return {
        "generator": str(order.inputs["generator"]),
        "generation": dict(order.config["generation"]),
        "reference": str(order.inputs["reference"]),
    }


def _finish(order: Order, measures: Measures) -> None:
    from diffult_ray.method.quality import Moments, frechet_distance

    real = Moments()
    real.update(files.read_tensors(order.inputs["reference"] / "features.safetensors")["features"])
    mean, deviation = measures.score.result()
    fid = frechet_distance(measures.moments, real)
    files.write_json(order.out / "summary.json", {
        "network": order.config["network"],
        "images": measures.moments.count,
        "real_images": real.count,
        # Blocks arrive in any order: the last digits of the sums are not kept.
        "fid": float(f"{fid:.9g}"),
        "inception_score": float(f"{mean:.9g}"),
        "inception_score_sd": float(f"{deviation:.9g}"),
    })


def _matrix(column: pa.ChunkedArray) -> np.ndarray:
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks)
    return np.asarray(array.flatten()).reshape(len(array), -1)
