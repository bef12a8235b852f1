"""A sweep on s3:// or gs://: killed on one machine, it goes on from another, to a folder's results."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from tests.buckets import Bucket, bucket, storage_server  # noqa: F401  fixtures
from tests.conftest import MEASURED, FrontDoor, temporary_folder
from tests.faults.door import check_runs, wait_for, wait_for_the_end_of
from tests.machines import Cluster

SWEEP = """
name: remote
experiment:
  dataset: {name: digits, imbalance_factor: 20, max_per_class: 60}
  extractor: &recipe {architecture: cnn, steps: 60, batch_size: 32, learning_rate: 0.1, crop_padding: 1,
                      flip: false, schedule: cosine, warmup: 0.1}
  generator: {channels: [16, 32], blocks: 1, attention: [], dropout: 0.0, steps: 80, batch_size: 32,
              learning_rate: 2.0e-3, warmup_steps: 10, ema: 0.98, flip: false}
  generation: {per_class: 30, sampler: dpmsolver++, steps: 5, guidance: 0.5}
  classifier: {<<: *recipe, synthetic_weight: 0.5}
  quality: {images: 100, reference: *recipe}
  resources: {extractor: &half {cpus: 0.5}, reference: *half, generator: *half, images: *half, scores: *half,
              quality: *half}
  select: test
search:
  classifier.seed: {grid: [0, 1]}
"""
RUNS_WITHIN = 300.0


@dataclass
class RemoteDoor(FrontDoor):
    """The front door on a machine whose mirror is in a folder."""

    bucket: Bucket | None = None
    variables: Mapping[str, str] = field(default_factory=dict)

    def on(self, cache: Path) -> RemoteDoor:
        """The same door on another machine."""
        return RemoteDoor(self.storage, self.sweep, self.ray, self.bucket, self.bucket.environment(cache))

    @property
    def environment(self) -> dict[str, str]:
        uri = {"DIFFULT_STORAGE": self.bucket.uri} if self.bucket else {}
        return {**super().environment, **uri, **self.variables}

    def finish(self) -> str:
        done = self.run(timeout=RUNS_WITHIN)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def ray_here():
    yield from temporary_folder()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, ray_here: Path) -> pd.DataFrame:
    """What a folder holds at the end."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "sweep.yaml").write_text(SWEEP)
    RemoteDoor(folder / "storage", folder / "sweep.yaml", ray_here).finish()
    return measured(folder / "storage" / "sweeps" / "remote" / "results.parquet")


def measured(path: Path) -> pd.DataFrame:
    """Results without what a clock says."""
    return pd.read_parquet(path).drop(columns=MEASURED).set_index("trial").sort_index()


def in_storage(bucket: Bucket, to: Path) -> pd.DataFrame:  # noqa: F811
    to.write_bytes(bucket.read("sweeps/remote/results.parquet"))
    return measured(to)


@pytest.mark.slow
def test_killed_on_one_machine_and_finished_on_another(bucket, undisturbed, ray_here, tmp_path):  # noqa: F811
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    door = RemoteDoor(tmp_path, tmp_path / "sweep.yaml", ray_here, bucket)
    first = door.on(tmp_path / "first")
    process = first.start()
    wait_for(lambda: any("manifest" in name for name in bucket.names("artifacts/generator")), 120)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    wait_for_the_end_of(first.processes)
    kept = bucket.names("artifacts")

    second = door.on(tmp_path / "second")
    said = second.finish()
    assert "generator" not in said.replace("generators", "")  # it was fetched, not built
    pd.testing.assert_frame_equal(in_storage(bucket, tmp_path / "r.parquet"), undisturbed)
    assert bucket.names("work") == [] and bucket.names("leases") == []
    assert set(kept) <= set(bucket.names("artifacts"))

    third = door.on(tmp_path / "third").finish()
    assert "Ray:" not in third and bucket.below("sweeps/remote/report.html") in third
    (tmp_path / "mlflow.db").write_bytes(bucket.read("sweeps/remote/mlflow.db"))
    check_runs(tmp_path / "mlflow.db", "diffult.trial", sorted(undisturbed.index))


@pytest.mark.cluster
@pytest.mark.timeout(1200)
def test_machines_that_share_no_folder(bucket, undisturbed, tmp_path):  # noqa: F811
    text = SWEEP.replace("generator: *half", "generator: {cpus: 0.5, workers: 2}")
    (tmp_path / "sweep.yaml").write_text(text)
    folders = temporary_folder()
    cluster = Cluster(next(folders) / "c")
    try:
        cluster.up()
        for name in ("one", "two"):
            cluster.add(cpus=1, variables=bucket.environment(tmp_path / name))
        door = RemoteDoor(tmp_path, tmp_path / "sweep.yaml", cluster.folder, bucket).on(tmp_path / "driver")
        door.variables = {**door.variables, **cluster.variables, "RAY_ADDRESS": cluster.address}
        said = door.finish()
    finally:
        cluster.down()
        folders.close()
    assert "joined" in said or "2 CPUs" in said
    found = in_storage(bucket, tmp_path / "r.parquet")
    assert set(found["status"]) == {"done"} and len(found) == len(undisturbed)
    assert all(any((tmp_path / name).rglob("*.safetensors")) for name in ("one", "two"))
    table = pq.read_table(next((tmp_path / "driver").rglob("pool/*.parquet")))
    assert table.num_rows and bucket.names("work") == []
