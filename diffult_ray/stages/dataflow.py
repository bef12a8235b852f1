"""Ray Data around a class: a pool of actors that never takes the CPU of the reads in front of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

# An actor asks for a little less than its share, so that read and write tasks always find room.
ACTOR_SHARE = 0.9
IO_CPUS = 0.05
BLOCK_ROWS = 512


def map_with_actors(dataset: Any, mapper: type, arguments: Mapping[str, Any], *, resources: Any) -> Any:
    """`dataset` mapped in batches of pyarrow tables by a pool of `resources.workers` actors.

    A batch that fails because its actor was killed is done again by another one.
    """
    import ray.data

    return dataset.map_batches(
        mapper,
        fn_constructor_kwargs={**arguments, "cpus": resources.cpus, "gpus": resources.gpus},
        batch_size=BLOCK_ROWS,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=resources.workers),
        num_cpus=resources.cpus * ACTOR_SHARE,
        num_gpus=resources.gpus or None,
    )


def from_rows(rows: pa.Table) -> Any:
    """A data set of the rows, already in blocks: a repartition would be tasks that want a CPU each."""
    import ray.data

    starts = range(0, rows.num_rows, BLOCK_ROWS)
    return ray.data.from_arrow([rows.slice(start, BLOCK_ROWS) for start in starts])
