"""A driver that builds one generator, with checkpoints more often than a sweep makes them.

    python -m tests.faults.one_generator STORAGE STEPS SECONDS WORKERS
"""

from __future__ import annotations

import sys

from diffult_ray import build, cluster, pipeline
from diffult_ray.config import Experiment
from diffult_ray.stages import training
from diffult_ray.store import Store


def stage(steps: int, workers: int = 1) -> pipeline.Stage:
    """A small generator of the digits; the number of its workers is not in its key."""
    return pipeline.generator(Experiment(
        select="test",
        dataset={"name": "digits", "imbalance_factor": 20, "max_per_class": 60},
        resources={"generator": {"workers": workers}},
        generator={"channels": [16, 32], "blocks": 1, "attention": [], "dropout": 0.0, "steps": steps,
                   "batch_size": 32, "learning_rate": 2e-3, "warmup_steps": 10, "ema": 0.98, "flip": False},
    ))


def main(storage: str, steps: str, seconds: str, workers: str) -> None:
    training.CHECKPOINT_SECONDS = float(seconds)
    cluster.connect("local")
    wanted, store = stage(int(steps), int(workers)), Store(storage)
    for each in wanted.walk():
        if store.find(each) is None:
            build.build_one(each, store)
    cluster.disconnect()


if __name__ == "__main__":
    main(*sys.argv[1:])
