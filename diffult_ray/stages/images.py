"""Generation: rows (id, label, seed) mapped to images by a pool of sampler actors, into parquet."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from diffult_ray import files
from diffult_ray.stages import pool
from diffult_ray.stages.dataflow import IO_CPUS, from_rows, map_with_actors
from diffult_ray.stages.sampler import Sampler


class SampleRows:
    """A table of rows to the same table with an image column."""

    def __init__(self, *, generator: str, generation: dict, cpus: float, gpus: float) -> None:
        self.sampler = Sampler(generator, generation, cpus=cpus, gpus=gpus)

    def __call__(self, rows: pa.Table) -> pa.Table:
        images = self.sampler(rows["label"].to_numpy(), rows["seed"].to_numpy())
        column = pa.array(pool.encode(images), type=pool.IMAGE)
        schema = pool.hugging_face_metadata(pool.IMAGE_SCHEMA)
        return rows.append_column("image", column).select(schema.names).cast(schema)


def build(config, inputs, out, *, resources, work) -> None:
    """N_t - |c| images for every class c with |c| < N_t, in `out/pool`.

    Images already in the work folder, from an interrupted build, are not made again.
    """
    start = time.monotonic()
    counts = files.read_json(Path(inputs["split"]) / "split.json")["class_counts"]
    wanted = pool.requests([max(0, config["per_class"] - n) for n in counts], config["seed"])
    parts = Path(work) / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    missing = _without(wanted, read_parts(parts))
    if missing.num_rows:
        _generate(missing, inputs["generator"], dict(config), parts, resources)
    made = read_parts(parts)
    _write_pool(made, wanted, Path(out) / "pool")
    seconds = time.monotonic() - start
    files.write_json(Path(out) / "summary.json", {
        "images": wanted.num_rows,
        "per_class": config["per_class"],
        "images_per_second": round(missing.num_rows / seconds, 1),
        "made_now": missing.num_rows,
    })


def _generate(rows: pa.Table, generator: str, config: dict[str, Any], parts: Path, resources) -> None:
    data = from_rows(rows)
    arguments = {"generator": str(generator), "generation": config}
    made = map_with_actors(data, SampleRows, arguments, resources=resources)
    made.write_parquet(str(parts), ray_remote_args={"num_cpus": IO_CPUS})


def read_parts(folder: Path) -> pa.Table:
    """All whole part files of a folder, each (label, id) once; a half-written file is removed."""
    tables = []
    for path in sorted(folder.glob("*.parquet")):
        try:
            tables.append(pq.read_table(path))
        except (pa.ArrowInvalid, OSError):
            path.unlink(missing_ok=True)
    if not tables:
        return pool.IMAGE_SCHEMA.empty_table()
    table = pa.concat_tables(tables, promote_options="permissive")
    table = table.sort_by([("label", "ascending"), ("id", "ascending")])
    label, number = table["label"].to_numpy(), table["id"].to_numpy()
    first = [i == 0 or (label[i], number[i]) != (label[i - 1], number[i - 1]) for i in range(len(label))]
    return table.filter(pa.array(first, type=pa.bool_()))


def _without(wanted: pa.Table, made: pa.Table) -> pa.Table:
    """The rows of `wanted` whose seed is not in `made`: a seed stands for its class and id."""
    return wanted.filter(pc.invert(pc.is_in(wanted["seed"], value_set=made["seed"].combine_chunks())))


def _write_pool(made: pa.Table, wanted: pa.Table, folder: Path) -> None:
    """The wanted rows in the order of (label, id), so that equal pools are equal files.

    Raises:
        RuntimeError: if an image is missing.
    """
    table = made.filter(pc.is_in(made["seed"], value_set=wanted["seed"].combine_chunks()))
    if table.num_rows != wanted.num_rows:
        raise RuntimeError(f"{wanted.num_rows} images were to be made, {table.num_rows} are there")
    write_table(table, folder)


def write_table(table: pa.Table, folder: Path, rows_per_file: int = 20_000) -> None:
    """A parquet data set of files of bounded size, replacing what was there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    table = table.cast(pool.hugging_face_metadata(table.schema.remove_metadata()))
    for number, start in enumerate(range(0, max(1, table.num_rows), rows_per_file)):
        part = table.slice(start, rows_per_file)
        pq.write_table(part, folder / f"part-{number:05d}.parquet", row_group_size=2000)
