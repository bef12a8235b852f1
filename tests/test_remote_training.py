"""A training on s3:// or gs:// goes on, killed, from a checkpoint that it has written beside itself."""

from __future__ import annotations

import pytest
import torch

from diffult_ray import cluster, config, files, pipeline
from diffult_ray.store import Store, open_store
from tests.buckets import bucket, storage_server  # noqa: F401  fixtures
from tests.conftest import TINY
from tests.test_stages import build, build_and_kill, losses, weights


@pytest.fixture
def ray_that_knows_the_bucket(bucket, ray_folder, monkeypatch):  # noqa: F811
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(ray_folder))
    cluster.connect("local")
    yield
    cluster.disconnect()


@pytest.mark.slow
@pytest.mark.parametrize("workers, victim", [(1, "ray::generator"), (2, "RayTrainWorker")])
def test_a_killed_worker_goes_on(ray_that_knows_the_bucket, bucket, tmp_path, monkeypatch, workers, victim):  # noqa: F811
    (tmp_path / "sweep.yaml").write_text(TINY)
    overrides = ["generator.steps=600", f"resources.generator.workers={workers}",
                 "search.filter.threshold.grid=[2]"]
    experiments = config.experiments(config.load(str(tmp_path / "sweep.yaml"), overrides))
    stage = pipeline.generator(next(e for e in experiments if e.method == "diffult"))
    undisturbed = build(stage, Store(tmp_path / "storage"))

    hit = open_store(bucket.uri)
    monkeypatch.setattr("diffult_ray.stages.training.CHECKPOINT_SECONDS", 0.5)
    build_and_kill(stage, hit, victim, lambda: any("checkpoint_" in name for name in bucket.names("work")))
    folder = hit.folder(stage)
    assert files.read_json(folder / "summary.json")["trained_now"] < 600
    assert losses(folder) == losses(undisturbed)
    for name, tensor in weights(undisturbed).items():
        assert torch.equal(weights(folder)[name], tensor), name
