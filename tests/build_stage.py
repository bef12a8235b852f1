"""Builds one stage of a sweep, and what it needs, on a running cluster, in a process of its own.

    python -m tests.build_stage SWEEP STAGE [key=value ...]

DIFFULT_STORAGE and RAY_ADDRESS say where. DIFFULT_TEST_SECONDS shortens the intervals between checkpoints
and between looks for more workers, DIFFULT_TEST_ROWS the blocks that an actor has in hand.
"""

from __future__ import annotations

import os
import sys

from diffult_ray import build, cluster, config, pipeline
from diffult_ray.budget import Purse
from diffult_ray.costs import Costs
from diffult_ray.plan import make_plan
from diffult_ray.progress import Narrator
from diffult_ray.stages import dataflow, training
from diffult_ray.store import Store


def stage_of(sweep: str, name: str, *overrides: str) -> pipeline.Stage:
    """That stage of the first experiment that has it."""
    experiments = config.experiments(config.load(sweep, list(overrides)))
    return next(s for e in experiments for s in pipeline.stages(e) if s.name == name)


def main(sweep: str, name: str, *overrides: str) -> int:
    seconds = os.environ.get("DIFFULT_TEST_SECONDS")
    if seconds:
        training.CHECKPOINT_SECONDS = training.RESIZE_SECONDS = float(seconds)
    rows = os.environ.get("DIFFULT_TEST_ROWS")
    if rows:
        dataflow.BLOCK_ROWS = int(rows)
    stages = list({s.key: s for s in stage_of(sweep, name, *overrides).walk()}.values())
    capacity = cluster.connect(None)
    store, narrator = Store(os.environ["DIFFULT_STORAGE"]), Narrator()
    costs = Costs(make_plan(config.load(sweep, list(overrides))), store)
    purse = Purse(costs, seconds=lambda: 0.0)
    failed = build.build_all(stages, store, capacity, narrator, lambda *_: None, purse)
    cluster.disconnect()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
