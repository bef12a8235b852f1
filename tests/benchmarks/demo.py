"""`make demo` as a new user runs it: a fresh clone, set-up, the sweep, and the same command again.

    python tests/benchmarks/demo.py [--runs 1]

Prints one JSON line a run: seconds of each part, the largest memory of all its processes together
(proportional set size, sampled every half second), and the overhead of a trial: what a trial takes of
the two slots beyond the seconds of its training loop, the start of Ray Tune included.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from measure import tell

ROOT = Path(__file__).resolve().parents[2]


def timed(call: Callable[[], object]) -> float:
    start = time.monotonic()
    call()
    return time.monotonic() - start


class Memory(threading.Thread):
    """The largest sum of the memory of processes that have a mark in their environment."""

    def __init__(self, mark: str) -> None:
        super().__init__(daemon=True)
        self.mark, self.most, self.ended = mark.encode(), 0, threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.5):
            self.most = max(self.most, sum(map(self._bytes, Path("/proc").glob("[0-9]*"))))

    def _bytes(self, process: Path) -> int:
        try:
            if self.mark not in (process / "environ").read_bytes():
                return 0
            return 1024 * int(re.search(r"^Pss: +(\d+)", (process / "smaps_rollup").read_text(), re.M)[1])
        except (OSError, TypeError):
            return 0


def seconds(log: str, told: str) -> list[int]:
    """When the lines that begin so were printed."""
    return [int(m) * 60 + int(s) for m, s in re.findall(rf"^\[(\d+):(\d\d)\] {told}", log, flags=re.M)]


def trial_overhead(log: str, storage: Path) -> dict[str, float]:
    """Seconds a trial beyond its training loop, with two trials at a time."""
    times, start = seconds(log, "trial"), seconds(log, "scores .*done")[-1]
    summaries = [json.loads(p.read_text()) for p in storage.glob("artifacts/classifier/*/summary.json")]
    training = sum(s["train_seconds"] for s in summaries) / len(summaries)
    return {
        "trials": len(times),
        "trial_training_s": round(training, 2),
        "trial_overhead_s": round(2 * (times[-1] - start) / len(times) - training, 2),
    }


def run() -> dict[str, object]:
    folder = Path(tempfile.mkdtemp(prefix="dd-"))
    clone, storage, ray = folder / "clone", folder / "storage", folder / "ray"
    environment = {**os.environ, "DIFFULT_STORAGE": str(storage), "RAY_TMPDIR": str(ray)}
    environment.pop("RAY_ADDRESS", None)

    def make(target: str) -> str:
        done = subprocess.run(["make", target], cwd=clone, env=environment, text=True, capture_output=True)
        if done.returncode:
            raise SystemExit(done.stdout + done.stderr)
        return done.stdout

    logs: list[str] = []
    try:
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        setup = timed(lambda: make("setup"))
        memory = Memory(f"RAY_TMPDIR={ray}")
        memory.start()
        sweep = timed(lambda: logs.append(make("demo")))
        memory.ended.set()
        again = timed(lambda: logs.append(make("demo")))
        print(logs[0], file=sys.stderr)
        return {
            "setup_s": round(setup, 1), "sweep_s": round(sweep, 1),
            "again_s": round(again, 1), "peak_memory_gib": round(memory.most / 2**30, 2),
            **trial_overhead(logs[0], storage),
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=1)
    for _ in range(parser.parse_args().runs):
        tell("demo", packages=("torch", "ray"), **run())
