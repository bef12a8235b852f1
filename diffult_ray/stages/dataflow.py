"""Ray Data around a class: processes that never take the CPU of the reads in front of them.

One pipeline serves several orders, since starting it costs more than many a pool. Rows carry the number
of their order in `target`.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from diffult_ray import files
from diffult_ray.allotment import Allotment
from diffult_ray.footprint import Footprint
from diffult_ray.stages import Order, Site, held

# A mapper asks for a little less than its share, so that read tasks always find room beside it.
MAPPER_SHARE = 0.9
IO_CPUS = 0.05
# At most so much a mapper has in hand, and loses with its machine; a whole number of a sampler's batches.
BLOCK_ROWS = 128


def from_tables(tables: Sequence[pa.Table], *, workers: int = 1, batch: int = BLOCK_ROWS) -> Any:
    """A data set of the n-th table's rows with `target` n, already in blocks.

    A repartition would be tasks that want a whole CPU each, and wait for ever beside a pool of actors.

    Args:
        workers, batch: of `block_sizes`.
    """
    import ray.data

    blocks, left = [], sum(table.num_rows for table in tables)
    for number, table in enumerate(tables):
        targets = pa.array([number] * table.num_rows, type=pa.int64())
        table = table.append_column("target", targets)
        start = 0
        for size in block_sizes(table.num_rows, left, workers=workers, batch=batch):
            blocks.append(table.slice(start, size).combine_chunks())
            start += size
        left -= table.num_rows
    return ray.data.from_arrow(blocks)


def block_sizes(rows: int, left: int, *, workers: int, batch: int) -> Iterator[int]:
    """Rows of the blocks of a table: large ones first, and small ones at the end, when workers wait.

    Guided self-scheduling (Polychronopoulos and Kuck, IEEE Transactions on Computers C-36, 1987) with half of
    its share: a block has what is left over twice the workers.

    Args:
        rows: of the table.
        left: of it and of all that follow.
        batch: rows that are worked on at a time; all blocks have a multiple of it, but for a table's last one
            and where BLOCK_ROWS are fewer.

    >>> list(block_sizes(500, 500, workers=2, batch=32))
    [96, 96, 64, 32, 32, 32, 32, 32, 32, 32, 20]
    >>> list(block_sizes(300, 1300, workers=2, batch=32)), list(block_sizes(300, 300, workers=2, batch=128))
    ([128, 128, 44], [128, 128, 44])
    """
    while rows > 0:
        share = left // (2 * workers) // batch * batch
        size = min(rows, BLOCK_ROWS, max(batch, share))
        yield size
        rows, left = rows - size, left - size


def from_parquet(folders: Sequence[str], system: Any, rows: int) -> Any:
    """A data set of the `rows` rows of parquet folders, each row with its `path`, in blocks of BLOCK_ROWS.

    By Ray's first reader: its second one splits no file, and lists them in a task of a whole CPU.
    """
    import ray.data

    ray.data.DataContext.get_current().use_datasource_v2 = False
    return ray.data.read_parquet(
        list(folders), filesystem=system, include_paths=True, num_cpus=IO_CPUS,
        override_num_blocks=max(len(folders), -(-rows // BLOCK_ROWS)),
    )


def map_rows(
    dataset: Any, mapper: type, arguments: Mapping[str, Any], *, resources: Any, order: Order,
    by_block: bool = False,
) -> Any:
    """`dataset` mapped in batches of pyarrow tables by up to `resources.workers` processes.

    What a process had in hand when it was killed is done again by another one. With a GPU they are actors.
    On CPUs they are tasks, which Ray gives to processes that have torch loaded by then: an actor is always
    a new one, whose imports take longer than many a pool.

    Args:
        mapper: a class that is made of `arguments` and `given`, once a process, and called with tables.
        order: in whose work folder they note how much memory they take.
        by_block: the batches are the blocks, as `from_tables` made them; with a GPU, for which Ray Data
            wants a number, they are BLOCK_ROWS, as all its blocks but the last of a table are.
    """
    import ray.data

    noting = _noting(mapper, Footprint(order.site, order.work))
    arguments = {**arguments, "given": Allotment.of(resources)}
    if resources.in_tasks:
        how = {"compute": ray.data.TaskPoolStrategy(resources.workers)}
        function = _kept_between_tasks(noting, arguments)
    else:
        function = noting
        how = {
            "compute": ray.data.ActorPoolStrategy(min_size=1, max_size=resources.workers),
            "fn_constructor_kwargs": arguments,
        }
    return dataset.map_batches(
        function,
        batch_size=None if by_block and not resources.gpus else BLOCK_ROWS,
        batch_format="pyarrow",
        num_cpus=resources.cpus * MAPPER_SHARE,
        num_gpus=resources.gpus or None,
        **how,
    )


def _noting(mapper: type, footprint: Footprint) -> type:
    """The same mapper, by the same name, that notes its memory after each batch."""

    class Noting(mapper):
        def __call__(self, rows: pa.Table) -> pa.Table:
            made = super().__call__(rows)
            footprint.note()
            return made

    Noting.__name__, Noting.__qualname__ = mapper.__name__, mapper.__qualname__
    return Noting


def _kept_between_tasks(mapper: type, arguments: Mapping[str, Any]) -> Callable[[pa.Table], pa.Table]:
    """As a function, which makes its mapper in the first of a process's tasks of this pipeline."""
    pipeline = uuid.uuid4().hex

    def call(rows: pa.Table) -> pa.Table:
        from diffult_ray.method import device

        make, resume = partial(mapper, **arguments), partial(device.prepare, arguments["given"])
        return held.get(pipeline, make, resume)(rows)

    call.__name__ = call.__qualname__ = mapper.__name__
    return call


def by_target(rows: pa.Table) -> Iterator[tuple[int, pa.Table]]:
    """(target, its rows) of a batch, which may hold the end of one order and the start of the next."""
    for target in pc.unique(rows["target"]).to_pylist():
        yield target, rows.filter(pc.equal(rows["target"], target)).drop_columns(["target"])


def count(dataset: Any, total: int, order: Order) -> float:
    """Run a data set whose rows say how much was `done`, and since when, telling progress on the way.

    Returns:
        seconds since the first of them began, without the start of the processes.
    """
    done, first = 0, time.time()
    for batch in dataset.iter_batches(batch_format="pyarrow", batch_size=None):
        done += pc.sum(batch["done"]).as_py() or 0
        first = min(first, pc.min(batch["began"]).as_py() or first)
        tell(order, done, total)
    return time.time() - first


def matrix(column: pa.ChunkedArray) -> np.ndarray:
    """A column of lists of one length as [n, d]."""
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks)
    return np.asarray(array.flatten()).reshape(len(array), -1)


def tell(order: Order, done: int, total: int) -> None:
    files.write_json(order.work / "progress.json", {"done": done, "total": total}, lasting=False)
    order.site.publish_soon(order.work / "progress.json")


# --- parts: what the processes have finished, in files that are whole or not there ---


def write_part(site: Site, folder: str | Path, table: pa.Table) -> None:
    """One more part of a site's folder; one that is written twice, after a killed process, does no harm."""
    sink, name = pa.BufferOutputStream(), f"{uuid.uuid4().hex}.parquet"
    pq.write_table(table, sink)
    files.write_bytes(site.here(folder) / name, sink.getvalue().to_pybytes())
    site.publish(Path(folder) / name)


def read_parts(folder: Path, schema: pa.Schema) -> pa.Table:
    """All parts in the order of (label, id), each image once."""
    paths = sorted(folder.glob("*.parquet")) if folder.exists() else []
    tables = [pq.read_table(path).cast(schema) for path in paths]
    table = pa.concat_tables(tables) if tables else schema.empty_table()
    table = table.sort_by([("label", "ascending"), ("id", "ascending")])
    seeds = table["seed"].to_pylist()
    first = [i == 0 or seed != seeds[i - 1] for i, seed in enumerate(seeds)]
    return table.filter(pa.array(first, type=pa.bool_()))


def without(wanted: pa.Table, made: pa.Table) -> pa.Table:
    """The rows of `wanted` that are not in `made`; a seed stands for its class and id."""
    return wanted.filter(pc.invert(pc.is_in(wanted["seed"], value_set=made["seed"].combine_chunks())))
