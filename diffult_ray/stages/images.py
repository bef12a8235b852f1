"""Generation: rows (id, label, seed) mapped to images by samplers in Ray Data, into parquet."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from diffult_ray import files, metrics
from diffult_ray.allotment import Allotment
from diffult_ray.stages import Order, pool
from diffult_ray.stages.dataflow import (
    by_target,
    count,
    from_tables,
    map_rows,
    read_parts,
    without,
    write_part,
)
from diffult_ray.stages.sampler import Samplers

SCHEMA = pool.hugging_face_metadata(pool.IMAGE_SCHEMA)


class SampleRows:
    """Samples the rows it is given and writes them into the parts of their order."""

    def __init__(self, *, targets: list[dict[str, Any]], given: Allotment) -> None:
        self.targets = targets
        self.samplers = Samplers(targets, given=given)

    def __call__(self, rows: pa.Table) -> pa.Table:
        began = time.time()
        for target, mine in by_target(rows):
            images = self.samplers[target](mine["label"].to_numpy(), mine["seed"].to_numpy())
            column = pa.array(pool.encode(images), type=pool.IMAGE)
            made = mine.append_column("image", column).select(SCHEMA.names).cast(SCHEMA)
            write_part(self.targets[target]["site"], self.targets[target]["parts"], made)
            metrics.count("diffult_images_generated", made.num_rows)
        return pa.table({"done": [rows.num_rows], "began": [began]})


def build(orders: Sequence[Order], resources: Any) -> None:
    """N_t - |c| images for every class c with |c| < N_t, in each order's `out/pool`.

    Images that an interrupted build has left in the work folder, or that are in a stored pool of other
    size, are not made again.
    """
    wanted = [_wanted(order) for order in orders]
    missing = [
        without(rows, _made(order))
        for order, rows in zip(orders, wanted, strict=True)
    ]
    total, seconds = sum(rows.num_rows for rows in missing), 0.0
    if total:
        batch = min(_at_once(order, Allotment.of(resources)) for order in orders)
        data = map_rows(
            from_tables(missing, workers=resources.workers, batch=batch), SampleRows,
            {"targets": [_target(o) for o in orders]}, resources=resources, order=orders[0], by_block=True,
        )
        seconds = count(data, total, orders[0])
    rate = total / seconds if seconds else None
    for order, rows, lacked in zip(orders, wanted, missing, strict=True):
        _finish(order, rows, lacked.num_rows, rate)


def _wanted(order: Order) -> pa.Table:
    counts = files.read_json(order.inputs["split"] / "split.json")["class_counts"]
    per_class = order.config["per_class"]
    return pool.requests([max(0, per_class - n) for n in counts], order.config["seed"])


def _at_once(order: Order, given: Allotment) -> int:
    size = files.read_json(order.inputs["split"] / "split.json")["image_size"]
    return given.images_at_once(size, guided=order.config["guidance"] > 0)


def _made(order: Order) -> pa.Table:
    """The images that there are, each once."""
    parts = read_parts(order.site.fetch(order.work / "parts"), SCHEMA)
    if "start" not in order.inputs:
        return parts
    stored = pool.read_pool(order.site.fetch(order.inputs["start"])).table.select(SCHEMA.names).cast(SCHEMA)
    every = pa.concat_tables([stored, without(parts, stored)])
    return every.sort_by([("label", "ascending"), ("id", "ascending")])


def _target(order: Order) -> dict[str, Any]:
    return {
        "generator": str(order.inputs["generator"]),
        "generation": dict(order.config),
        "parts": str(order.work / "parts"),
        "site": order.site,
    }


def _finish(order: Order, wanted: pa.Table, made_now: int, rate: float | None) -> None:
    """The wanted images in the order of (label, id), so that equal pools are equal files.

    Raises:
        RuntimeError: if an image is missing.
    """
    made = _made(order)
    table = made.filter(pc.is_in(made["seed"], value_set=wanted["seed"].combine_chunks()))
    if table.num_rows != wanted.num_rows:
        raise RuntimeError(f"{wanted.num_rows} images were to be made, {table.num_rows} are there")
    pool.write_pool(table, order.out / "pool")
    files.write_json(order.out / "summary.json", {
        "images": wanted.num_rows,
        "per_class": order.config["per_class"],
        "made_now": made_now,
        "images_per_second": rate and round(rate, 1),
    })
