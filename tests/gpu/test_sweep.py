"""A whole sweep with its stages on a GPU, through the command line and on Ray."""

from __future__ import annotations

import pandas as pd
import pytest

STAGES = ("extractor", "reference", "generator", "images", "scores", "quality", "classifier")
SMALL = [
    "search.filter.threshold.grid=[2]", "search.classifier.seed.grid=[0,1]", "generator.steps=60",
    "baselines=[ce]", "resources.generator.workers=1",
]


@pytest.mark.parametrize("compiled", [False, True], ids=["usual", "graphs"])
def test_a_sweep_runs_on_a_gpu(gpu, new_door, compiled):
    door = new_door()
    share = [f"resources.{stage}.gpus={0.5 if stage == 'classifier' else 1}" for stage in STAGES]
    if compiled:
        share += [f"resources.{stage}.{key}=true" for stage in STAGES for key in ("compile", "graphs")]
    done = door.run(*SMALL, *share, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    results = pd.read_parquet(next(door.storage.glob("sweeps/*/results.parquet")))
    assert len(results) >= 4 and (results["status"] == "done").all(), results
    assert (results["gpu_memory_mib"] > 0).all()
    assert (results["accuracy"] > 20).all()


def test_a_train_group_of_one_has_the_gpu(gpu, new_door):
    door = new_door()
    group = ["resources.generator.gpus=1", "resources.generator.max_workers=2"]
    done = door.run(*SMALL, *group, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
