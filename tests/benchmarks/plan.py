"""The plan of 10,000 trials, and a finished sweep of 1,000 that is run again.

    python tests/benchmarks/plan.py [--repeats 5]

Of the 1,000 trials one is trained; the others get a copy of its artifact under their own keys and a record,
so that the command sees a finished sweep. Seconds are of whole processes, interpreter and imports included.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import summary, tell

from diffult_ray import config, results
from diffult_ray.plan import make_plan
from diffult_ray.store import Store

PLANNED = """
name: planned
base: digits
search:
  classifier.synthetic_weight: {grid: [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]}
  filter.threshold: {grid: [0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, inf]}
  seed: {grid: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]}
  classifier.seed: {grid: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]}
"""
FINISHED = f"""
name: finished
base: digits
experiment:
  extractor: {{steps: 50}}
  generator: {{steps: 20}}
  classifier: {{steps: 50}}
  quality: {{images: 200, reference: {{steps: 50}}}}
search:
  classifier.seed: {{grid: {list(range(1000))}}}
"""


def run(*arguments: str) -> tuple[float, float]:
    """Seconds and peak MiB of the front door."""
    command = [sys.executable, "-m", "diffult_ray.sweep", *arguments]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)}: exit {os.waitstatus_to_exitcode(status)}")
    return time.perf_counter() - start, used.ru_maxrss / 1024


def finish(file: Path, storage: Path) -> None:
    """Train one trial, and give its artifact to all."""
    run(str(file), "search.classifier.seed.grid=[0]", "--storage", str(storage))
    plan, store = make_plan(config.load(str(file))), Store(storage)
    made = store.folder(plan.trials[0].stage)
    for trial in plan.trials:
        if store.find(trial.stage) is None:
            shutil.copytree(made, store.folder(trial.stage), ignore=shutil.ignore_patterns("manifest.json"))
            store.commit(trial.stage, seconds=store.find(plan.trials[0].stage).seconds)
        results.write_record(results.record(trial, store, None), store, plan.sweep.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name, text in (("planned", PLANNED), ("finished", FINISHED)):
            (root / f"{name}.yaml").write_text(text)
        planned = (str(root / "planned.yaml"), "--plan", "--storage", str(root / "none"))
        _tell("plan of 10,000 trials", [run(*planned) for _ in range(repeats)])
        arguments = (str(root / "finished.yaml"), "--storage", str(root / "storage"))
        finish(root / "finished.yaml", root / "storage")
        _tell("results of 1,000 trials, written and logged once", [run(*arguments)])
        _tell("a finished sweep of 1,000 trials, run again", [run(*arguments) for _ in range(repeats)])


def _tell(name: str, runs: list[tuple[float, float]]) -> None:
    seconds, mib = zip(*runs, strict=True)
    tell(name, packages=("pydantic", "pandas"), seconds=summary(seconds, 2), peak_mib=summary(mib, 0))


if __name__ == "__main__":
    main()
