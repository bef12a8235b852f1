"""Metrics of our own on Ray's metrics endpoint, beside Ray's. `clusters/grafana.json` plots them.

Every process of a cluster, driver or actor, may count; without a cluster nothing is counted.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import Any

# name: what it counts, and its tags. On the endpoint each is `ray_<name>_total`.
COUNTERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "diffult_images_generated": ("Images that samplers have made.", ()),
    "diffult_trials_done": ("Trials that have ended in this run.", ("sweep", "status")),
    "diffult_stage_seconds": ("Seconds that building stages took.", ("sweep", "stage")),
    "diffult_artifacts_reused": ("Stages and trials that were stored already.", ("sweep", "stage")),
}


def count(name: str, value: float = 1.0, **tags: str) -> None:
    """Add to one of `COUNTERS`. Ray takes no zero."""
    ray = sys.modules.get("ray")
    if value > 0 and ray is not None and ray.is_initialized():
        _counter(name, ray.get_runtime_context().get_job_id()).inc(value, tags=tags)


@lru_cache(maxsize=64)
def _counter(name: str, job: str) -> Any:
    """One a metric; another one after this process has joined another cluster."""
    from ray.util.metrics import Counter

    description, tags = COUNTERS[name]
    return Counter(name, description=description, tag_keys=tags)
