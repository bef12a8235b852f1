"""Pools of processes on Ray Data, with and without a GPU that Ray is told of."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pytest

from diffult_ray.config.experiment import PoolResources
from diffult_ray.stages import Order, dataflow


@pytest.fixture(scope="module")
def gpus(ray_folder: Path):
    """A Ray of this process with two GPUs, which nothing here computes on."""
    import ray

    previous = os.environ.pop("RAY_ADDRESS", None)
    ray.init("local", num_cpus=2, num_gpus=2, _temp_dir=str(ray_folder), include_dashboard=False)
    yield
    ray.shutdown()
    if previous is not None:
        os.environ["RAY_ADDRESS"] = previous


@pytest.mark.parametrize("resources", [{"gpus": 0.5}, {"gpus": 1, "workers": 2}, {"cpus": 1}])
@pytest.mark.parametrize("by_block", [True, False])
def test_every_row_passes_a_pool_once_in_batches_of_at_most_a_block(gpus, tmp_path, resources, by_block):
    class Tell:
        def __init__(self, given) -> None:
            self.gpus = given.gpus

        def __call__(self, rows: pa.Table) -> pa.Table:
            told = [rows.num_rows] * rows.num_rows
            return rows.append_column("batch", pa.array(told)).append_column(
                "gpus", pa.array([float(self.gpus)] * rows.num_rows)
            )

    tables = [pa.table({"id": list(range(n))}) for n in (300, 5)]
    given = PoolResources(**resources)
    made = dataflow.map_rows(
        dataflow.from_tables(tables, workers=given.workers), Tell, {}, resources=given, by_block=by_block,
        order=Order(config={}, inputs={}, out=tmp_path / "out", work=tmp_path),
    ).take_all()  # fmt: skip
    assert sorted((row["target"], row["id"]) for row in made) == [
        (number, i) for number, n in enumerate((300, 5)) for i in range(n)
    ]
    assert max(row["batch"] for row in made) <= dataflow.BLOCK_ROWS
    assert {row["gpus"] for row in made} == {float(given.gpus)}
