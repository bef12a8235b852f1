"""A cluster that is started here and ended again, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

WHILE_IT_RUNS = """
import os
from diffult_ray import cluster

watched, asked = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "RAY_TRAIN_METRICS_ENABLED"
assert cluster.connect("local").cpus > 0
assert (os.environ[watched], os.environ[asked]) == ("0", "1")
cluster.disconnect()
assert watched not in os.environ and os.environ[asked] == "1"
"""


def test_what_only_a_cluster_of_ones_own_does_without_ends_with_it_and_yields_to_the_user(ray_folder):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", WHILE_IT_RUNS], capture_output=True, text=True, timeout=120,
        env={**environment, "RAY_TMPDIR": str(ray_folder), "RAY_TRAIN_METRICS_ENABLED": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
