"""The store's share of a sweep's time: leases, checksums and manifests of every artifact of a storage.

    python tests/benchmarks/store.py --storage DIR --seconds WALL [--sweep digits]

DIR holds a finished sweep and WALL is the time that it took. For each of its artifacts this does again what
the store did: take and release its lease, write its manifest with checksums, and compare its content and
its inputs' as a process does that uses them for the first time.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path

from measure import tell

from diffult_ray import config, lease
from diffult_ray.plan import make_plan
from diffult_ray.store import Store, altered, read_manifest


def seconds(store: Store, stages: list, scratch: Store) -> dict[str, float]:
    """Of each kind of the store's work, over all stages."""
    taken = {"leases": 0.0, "manifests": 0.0, "comparisons": 0.0}
    for stage in stages:
        folder, copy = store.folder(stage), scratch.folder(stage)
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("manifest.json"))
        start = time.perf_counter()
        with lease.hold(scratch.leases, lease.names_for([stage])):
            held = time.perf_counter()
            scratch.commit(stage, seconds=1.0)
            written = time.perf_counter()
        released = time.perf_counter()
        for used in (stage, *stage.inputs.values()):
            altered(store.folder(used), read_manifest(store.folder(used)))
        taken["leases"] += held - start + released - written
        taken["manifests"] += written - held
        taken["comparisons"] += time.perf_counter() - released
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--storage", required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--sweep", default="digits")
    given = parser.parse_args()
    plan, store = make_plan(config.load(given.sweep)), Store(given.storage)
    stages = [*plan.stages, *(t.stage for t in plan.trials)]
    with tempfile.TemporaryDirectory(dir=Path(given.storage)) as folder:
        taken = seconds(store, stages, Store(folder))
    tell(
        "the store's share", packages=("pyarrow",), artifacts=len(stages), wall=given.seconds,
        seconds={k: round(v, 3) for k, v in taken.items()},
        share=round(sum(taken.values()) / given.seconds, 4),
    )


if __name__ == "__main__":
    main()
