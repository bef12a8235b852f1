"""What N trials cost beside S + N c, and beside building each alone.

    python tests/benchmarks/sharing.py [--trials 1 4 16 64]

On digits, each N on storage of its own, with everything that a run needs: 400 generator steps and
classifiers of 800. Two trials run at a time. S is the wall time of the run of one trial less that trial's
own seconds, and so holds the start of Ray; c is what a trial takes of the wall time when two run: the mean
of their seconds in the largest run, halved. One JSON line tells for each N the wall time, its ratio to
S + N c, and N (S + c).
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
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
AT_A_TIME = 2
SWEEP = """
name: shared
base: digits
experiment: {{generator: {{steps: 400}}}}
tune: {{concurrency: {at_a_time}}}
search:
  classifier.synthetic_weight: {{grid: {weights}}}
  filter.threshold: {{grid: {thresholds}}}
  classifier.seed: {{grid: {seeds}}}
"""


def grids(n: int) -> dict[str, list[float]]:
    """Seeds first, then weights, then thresholds: four of each at most."""
    sizes = [4, 4, n // 16] if n >= 16 else [4, n // 4, 1] if n >= 4 else [n, 1, 1]
    values = {"seeds": [0, 1, 2, 3], "weights": [0.3, 1.0, 2.0, 4.0], "thresholds": [2.0, 1.0, 1.5, 3.0]}
    return {name: v[:size] for (name, v), size in zip(values.items(), sizes, strict=True)}


def run(n: int) -> dict[str, object]:
    """Wall time of N trials from nothing, and the seconds that their manifests tell."""
    folder = Path(tempfile.mkdtemp(prefix="ds-"))
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    environment |= {"DIFFULT_STORAGE": str(folder / "storage"), "RAY_TMPDIR": str(folder / "ray")}
    try:
        (folder / "shared.yaml").write_text(SWEEP.format(at_a_time=AT_A_TIME, **grids(n)))
        command = [sys.executable, "-m", "diffult_ray.sweep", str(folder / "shared.yaml")]
        start = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        wall = time.perf_counter() - start
        if done.returncode:
            raise SystemExit(done.stdout + done.stderr)
        manifests = [json.loads(p.read_text()) for p in folder.glob("storage/artifacts/*/*/manifest.json")]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    trials = [m["seconds"] for m in manifests if m["stage"] == "classifier"]
    assert len(trials) == n
    print(f"{n} trials: {wall:.1f} s", file=sys.stderr, flush=True)
    return {"n": n, "wall": wall, "trial": statistics.mean(trials), "load": os.getloadavg()[0],
            "stages": sum(m["seconds"] for m in manifests if m["stage"] != "classifier")}


def measure(numbers: Sequence[int]) -> dict[str, object]:
    runs = [run(n) for n in sorted(numbers)]
    one, most = runs[0], runs[-1]
    shared, each = one["wall"] - one["n"] * one["trial"], most["trial"] / AT_A_TIME
    rows = [
        {
            "n": r["n"], "wall_s": round(r["wall"], 1), "bound_s": round(shared + r["n"] * each, 1),
            "ratio": round(r["wall"] / (shared + r["n"] * each), 3),
            "alone_s": round(r["n"] * (shared + one["trial"]), 1), "load": round(r["load"], 1),
        }
        for r in runs
    ]
    return {
        "S": round(shared, 1), "c": round(each, 2), "S_of_manifests": round(one["stages"], 1), "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, nargs="+", default=[1, 4, 16, 64])
    options = parser.parse_args()
    print(json.dumps({
        "benchmark": "the cost of a sweep", **measure(options.trials),
        "hardware": f"{os.cpu_count()} CPUs, {platform.machine()}",
        "versions": {"python": platform.python_version()},
    }))


if __name__ == "__main__":
    main()
