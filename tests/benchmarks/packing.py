"""Small classifier trials that share a set of cores or a GPU: how many an hour, and what accuracy.

    python tests/benchmarks/packing.py [--at-once 1 2 4 8] [--trials 16] [--repeats 2] [--gpu]

Whole sweeps of `ce` trials on digits through the command line, the numbers at once in turns, each sweep with
a storage of its own. The rule is `resources.classifier`: of C cores, k trials at once have C / k each (and
max(1, C / k) threads); of a GPU 1 / k, with that part of its memory. The rate is that between the first
trial's start and the last one's end, by their manifests. One JSON line a number.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd
from measure import ratios, summary, tell

SWEEP = """
name: packing
base: digits
experiment:
  method: ce
baselines: []
search:
  classifier.seed: {grid: [0]}
"""


def sweep(folder: Path, trials: int, at_once: int, gpu: bool) -> tuple[float, dict[int, float]]:
    """Seconds of all trials, and the accuracy of each seed."""
    folder.mkdir()
    file, storage = folder / "packing.yaml", folder / "storage"
    file.write_text(SWEEP)
    share = [f"resources.classifier.cpus={(os.cpu_count() or 1) / at_once:g}"]
    share += [f"resources.classifier.gpus={1 / at_once:g}"] if gpu else []
    grid = f"search.classifier.seed.grid={list(range(trials))}".replace(" ", "")
    subprocess.run(
        [sys.executable, "-m", "diffult_ray.sweep", str(file), grid, *share, "--storage", str(storage)],
        check=True, stdout=subprocess.DEVNULL,
    )
    found = [json.loads(p.read_text()) for p in (storage / "artifacts/classifier").glob("*/manifest.json")]
    span = max(m["created"] for m in found) - min(m["created"] - m["seconds"] for m in found)
    results = pd.read_parquet(storage / "sweeps" / "packing" / "results.parquet")
    return span, dict(zip(results["seed"], results["accuracy"], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--gpu", action="store_true")
    given = parser.parse_args()
    seconds: dict[str, list[float]] = {str(k): [] for k in given.at_once}
    accuracies: dict[str, dict[int, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(given.repeats):
            for k in given.at_once:
                place = Path(folder, f"{turn}-{k}")
                span, accuracies[str(k)] = sweep(place, given.trials, k, given.gpu)
                seconds[str(k)].append(span)
    alone = str(given.at_once[0])
    faster = ratios(seconds, alone)
    for k, taken in seconds.items():
        differences = [accuracies[k][seed] - value for seed, value in accuracies[alone].items()]
        tell(
            f"packing, {k} trials at once", packages=("ray", "torch"), trials=given.trials,
            trials_an_hour=summary([3600 * given.trials / s for s in taken], 0),
            ratio=faster.get(k), base=f"the rate of {alone} at a time",
            accuracy=round(statistics.mean(accuracies[k].values()), 2),
            largest_difference_of_a_seed=round(max(map(abs, differences)), 2),
        )


if __name__ == "__main__":
    main()
