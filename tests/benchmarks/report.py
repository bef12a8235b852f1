"""The report of a sweep of many cells: page, figures and statistics.json, of 999 and of 2,997 trials.

    python tests/benchmarks/report.py [--repeats 3]

Three seeds a cell of drawn accuracies over weight and threshold, 100 classes, and the plain classifier. In
turns, each size in its process; the ratio is that of their seconds, of three times as many trials.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from measure import alternately_apart, summary, tell

from diffult_ray import report, statistics
from diffult_ray.report import ReportData
from diffult_ray.results import COLUMNS_AFTER_SEARCHED

CLASSES, SEEDS, FEW = 100, 3, 333
WEIGHT, THRESHOLD = "classifier.synthetic_weight", "filter.threshold"


def sweep(cells: int) -> ReportData:
    rng, across = np.random.default_rng(0), round(cells**0.5)
    rows = [trial(rng, "ce", "ce", seed) for seed in range(SEEDS)]
    for i in range(cells):
        values = {WEIGHT: 0.1 * (i % across), THRESHOLD: 0.1 * (i // across)}
        pool = {"fid": 9.1, "generator": "g", "quality_network": "reference", "p_id": 0.6, "kept": 800}
        rows += [{**trial(rng, str(i), "diffult", seed), **values, **pool} for seed in range(SEEDS)]
    columns = dict.fromkeys(["trial", "method", "status", "seed", WEIGHT, THRESHOLD, *COLUMNS_AFTER_SEARCHED])
    stages = ["stage", "key", "status", "seconds", "memory_mib", "gpu_memory_mib", "trials"]
    return ReportData(
        name="drawn", description="", results=pd.DataFrame(rows, columns=list(columns)),
        searched=[WEIGHT, THRESHOLD], select="validation", class_names=[str(c) for c in range(CLASSES)],
        class_counts=list(range(CLASSES, 0, -1)), gallery={}, stages=pd.DataFrame(columns=stages), facts={},
    )


def trial(rng: np.random.Generator, cell: str, method: str, seed: int) -> dict[str, object]:
    by_class = rng.normal(80, 5, CLASSES)
    accuracies = {"accuracy": by_class.mean(), "validation_accuracy": by_class.mean(), "nll": 0.2}
    told = {"trial": f"{cell}-{seed}", "cell": cell, "method": method, "status": "done", "seed": seed}
    return {**told, **accuracies, "per_class_accuracy": by_class}


def writing(cells: int) -> Callable[[], None]:
    def write() -> None:
        data = sweep(cells)
        with tempfile.TemporaryDirectory() as folder:
            report.write(data, Path(folder))
            statistics.write(data, Path(folder))

    return write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    few, many = FEW * SEEDS, 3 * FEW * SEEDS
    seconds, peaks = alternately_apart(
        {str(few): partial(writing, FEW), str(many): partial(writing, 3 * FEW)}, parser.parse_args().repeats
    )
    tell(
        f"report of {many:,} trials against {few}", packages=("pandas", "matplotlib"),
        seconds={n: summary(s, 2) for n, s in seconds.items()}, peak_mib=peaks,
        ratio=summary([b / a for a, b in zip(seconds[str(few)], seconds[str(many)], strict=True)]),
    )


if __name__ == "__main__":
    main()
