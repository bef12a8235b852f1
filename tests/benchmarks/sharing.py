"""What a sweep costs: N trials against S + N c, and against N times one trial alone.

    python tests/benchmarks/sharing.py [--trials 1 4 16 64]

Each N is a whole sweep on digits with a storage of its own, run by the command line, Ray's start included. S
is the time before the first trial, with the start and end of the command, and c the time a trial adds at the
sweep's own concurrency: c = (T(largest N) - T(1)) / (largest N - 1), S = T(1) - c.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import tell

SWEEP = """
name: sharing
base: digits
experiment:
  generator: {steps: 400}
search:
  classifier.seed: {grid: [0]}
"""


def seconds(trials: int, folder: Path) -> float:
    """Wall seconds of a sweep of so many trials, in a new storage."""
    file = folder / "sharing.yaml"
    file.write_text(SWEEP)
    grid = f"search.classifier.seed.grid={list(range(trials))}".replace(" ", "")
    command = [sys.executable, "-m", "diffult_ray.sweep", str(file), grid]
    start = time.perf_counter()
    subprocess.run([*command, "--storage", str(folder / str(trials))], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, nargs="+", default=[1, 4, 16, 64])
    counts = sorted(parser.parse_args().trials)
    with tempfile.TemporaryDirectory() as folder:
        taken = {n: seconds(n, Path(folder)) for n in counts}
    most = counts[-1]
    each = (taken[most] - taken[1]) / (most - 1)
    shared = taken[1] - each
    for n, found in taken.items():
        tell(
            "sharing", packages=("ray", "torch"), trials=n, seconds=round(found, 1),
            shared=round(shared, 1), each=round(each, 2), of_s_plus_nc=round(found / (shared + n * each), 3),
            alone=round(n * taken[1], 1), times_less_than_alone=round(n * taken[1] / found, 2),
        )


if __name__ == "__main__":
    main()
