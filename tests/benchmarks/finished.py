"""A finished sweep of 1,000 trials run again: how long until it has printed its results.

    python tests/benchmarks/finished.py [--trials 1000] [--runs 3]

Everything before the trials and the classifiers of four cells are built by a real run with few steps. The
artifacts of the other trials are copies of one of those, committed and recorded through the store's own
functions. Then the command runs once more, which writes results and report of all, and again, which is
what is timed. One JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from diffult_ray import config, results
from diffult_ray.plan import Plan, make_plan
from diffult_ray.store import Store

ROOT = Path(__file__).resolve().parents[2]
SWEEP = """
name: many
base: digits
experiment:
  extractor: {{steps: 100}}
  generator: {{steps: 100}}
  classifier: {{steps: 100}}
  quality: {{images: 200, reference: {{steps: 100}}}}
tracking: {{enabled: false}}
search:
  classifier.synthetic_weight: {{grid: [0.3, 1.0]}}
  filter.threshold: {{grid: [2.0, inf]}}
  classifier.seed: {{grid: {seeds}}}
"""


def sweep(folder: Path) -> float:
    """Seconds of one run of the command, which ends with 0."""
    command = [sys.executable, "-m", "diffult_ray.sweep", str(folder / "many.yaml")]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    environment |= {"DIFFULT_STORAGE": str(folder / "storage"), "RAY_TMPDIR": str(folder / "ray")}
    start = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    assert "results:" in done.stdout
    return time.perf_counter() - start


def write(folder: Path, seeds: int) -> Plan:
    (folder / "many.yaml").write_text(SWEEP.format(seeds=list(range(seeds))))
    return make_plan(config.load(str(folder / "many.yaml")))


def fill(store: Store, plan: Plan, like: Path) -> None:
    """Artifact and record of every trial that has none."""
    for trial in plan.trials:
        if store.look(trial.stage) is None:
            shutil.copytree(like, store.folder(trial.stage), ignore=shutil.ignore_patterns("manifest.json"))
            store.commit(trial.stage, seconds=1.0)
        results.write_record(results.record(trial, store, None), store, plan.sweep.name)


def measure(trials: int, runs: int) -> dict[str, object]:
    folder = Path(tempfile.mkdtemp(prefix="df-"))
    try:
        first = write(folder, 1)
        real = sweep(folder)
        store = Store(folder / "storage")
        whole = write(folder, trials // 4)
        fill(store, whole, store.folder(first.trials[0].stage))
        concluded = sweep(folder)
        again = sorted(sweep(folder) for _ in range(runs))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {
        "trials": len(whole.trials), "real_run_s": round(real, 1), "all_stored_s": round(concluded, 1),
        "again_s": [round(f(again), 2) for f in (statistics.median, min, max)], "runs": runs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    print(json.dumps({
        "benchmark": "a finished sweep again", **measure(options.trials, options.runs),
        "hardware": f"{os.cpu_count()} CPUs, {platform.machine()}, load {os.getloadavg()[0]:.1f}",
        "versions": {"python": platform.python_version()},
    }))


if __name__ == "__main__":
    main()
