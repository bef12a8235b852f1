"""Keys and the plan of a sweep of 10,000 trials, as a user asks for them.

    python tests/benchmarks/plan_size.py [--trials 10000] [--runs 3]

The sweep has four generators of one family, ten synthetic weights, ten thresholds and the rest in seeds.
`--plan` runs in a process of its own, on an empty storage folder and on one where a trial in ten is
stored; one JSON line tells seconds (median, least, most) and the most memory that the process held.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from diffult_ray import config, files
from diffult_ray.plan import make_plan
from diffult_ray.store import Store

ROOT = Path(__file__).resolve().parents[2]
SWEEP = """
name: large
base: digits
search:
  generator.steps: {{grid: [250, 500, 750, 1000]}}
  classifier.synthetic_weight: {{grid: [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]}}
  filter.threshold: {{grid: [0.5, 0.75, 1, 1.25, 1.5, 2, 2.5, 3, 4, inf]}}
  classifier.seed: {{grid: {seeds}}}
"""


def store_some(store: Store, sweep: Path, every: int) -> None:
    """Every stage, and a trial in `every`, with little in them."""
    plan = make_plan(config.load(str(sweep)))
    for stage in [*plan.stages, *(t.stage for t in plan.trials[::every])]:
        folder = store.folder(stage)
        files.write_json(folder / "summary.json", {"images": 869, "accuracy": 90.0, "train_seconds": 1.5})
        store.commit(stage, seconds=2.0)


def plan_once(sweep: Path, storage: Path) -> dict[str, float]:
    """Seconds and memory of one process, and that it says what it should."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "diffult_ray.sweep", str(sweep), "--plan", "--storage", str(storage)],
        stdout=subprocess.PIPE, text=True, cwd=ROOT,
    )
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0 and "left to do" in said, said
    return {"seconds": time.perf_counter() - start, "mib": usage.ru_maxrss / 1024}


def measure(trials: int, runs: int) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sweep = folder / "large.yaml"
        sweep.write_text(SWEEP.format(seeds=list(range(trials // 400))))
        store_some(Store(folder / "some"), sweep, 10)
        found = {}
        for storage in ("none", "some"):
            taken = [plan_once(sweep, folder / storage) for _ in range(runs)]
            seconds = sorted(t["seconds"] for t in taken)
            found[storage] = {
                "seconds": [round(f(seconds), 2) for f in (statistics.median, min, max)],
                "peak_mib": round(max(t["mib"] for t in taken)),
            }
    return {"trials": trials // 400 * 400, "runs": runs, "empty_storage": found["none"],
            "a_tenth_stored": found["some"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    print(json.dumps({
        "benchmark": "plan of a large sweep", **measure(options.trials, options.runs),
        "hardware": f"{os.cpu_count()} CPUs, {platform.machine()}, load {os.getloadavg()[0]:.1f}",
        "versions": {"python": platform.python_version()},
    }))


if __name__ == "__main__":
    main()
