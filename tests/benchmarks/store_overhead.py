"""How much of the demo's time the store takes: artifacts, checksums, leases, and whole files.

    python tests/benchmarks/store_overhead.py [SWEEP] [key=value ...]

The sweep (`digits` unless named) runs in a process whose `sitecustomize` wraps the functions of `store`,
`lease` and `files` with a clock, in the driver and in every Ray process. A call within another counts
once; waiting for a lease does not count. One JSON line: seconds by function, summed over all processes,
and their share of the wall time, which is thus an upper bound of what they hold the sweep up.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HOOK = '''
import functools, importlib.abc, importlib.machinery, os, sys, threading, time

WRAPPED = {
    "diffult_ray.store": ["Store.check", "Store.look", "Store.find", "Store.commit", "Store.discard_work"],
    "diffult_ray.lease": ["Lease.take", "Lease.refresh", "Lease.release", "read", "_tidy"],
    "diffult_ray.files": ["write_bytes", "read_json", "read_tensors", "remove_empty"],
}
inside = threading.local()
log = os.open(os.path.join(os.environ["STORE_LOG"], str(os.getpid())), os.O_CREAT | os.O_APPEND | os.O_WRONLY)


def clocked(function, name):
    @functools.wraps(function)
    def call(*args, **named):
        if getattr(inside, "it", False):
            return function(*args, **named)
        inside.it, start = True, time.perf_counter()
        try:
            return function(*args, **named)
        finally:
            inside.it = False
            os.write(log, f"{name} {time.perf_counter() - start}\\n".encode())
    return call


def wrap(module):
    for dotted in WRAPPED[module.__name__]:
        *path, last = dotted.split(".")
        holder = functools.reduce(getattr, path, module)
        setattr(holder, last, clocked(getattr(holder, last), f"{module.__name__.split('.')[1]}.{dotted}"))


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name not in WRAPPED:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        run = spec.loader.exec_module

        def load(module):
            run(module)
            wrap(module)

        spec.loader.exec_module = load
        return spec


sys.meta_path.insert(0, Finder())
'''


def run(arguments: list[str]) -> dict[str, object]:
    folder = Path(tempfile.mkdtemp(prefix="do-"))
    (folder / "hook").mkdir()
    (folder / "log").mkdir()
    (folder / "hook" / "sitecustomize.py").write_text(HOOK)
    paths = [str(folder / "hook"), os.environ.get("PYTHONPATH", str(ROOT))]
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(paths), "STORE_LOG": str(folder / "log"),
        "DIFFULT_STORAGE": str(folder / "storage"), "RAY_TMPDIR": str(folder / "ray"),
    }
    environment.pop("RAY_ADDRESS", None)
    try:
        start = time.perf_counter()
        command = [sys.executable, "-m", "diffult_ray.sweep", *arguments]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        wall = time.perf_counter() - start
        if done.returncode:
            raise SystemExit(done.stdout + done.stderr)
        return told(folder / "log", wall)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def told(log: Path, wall: float) -> dict[str, object]:
    seconds: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for path in log.iterdir():
        for line in path.read_text().splitlines():
            name, took = line.split()
            seconds[name] += float(took)
            calls[name] += 1
    assert calls["store.Store.commit"] > 0, "nothing was clocked"
    order = sorted(seconds, key=lambda name: -seconds[name])
    return {
        "wall_s": round(wall, 1), "store_s": round(sum(seconds.values()), 2),
        "share": round(sum(seconds.values()) / wall, 4),
        "by_function": {name: [round(seconds[name], 3), calls[name]] for name in order},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("arguments", nargs="*", default=["digits"])
    options = parser.parse_args()
    print(json.dumps({
        "benchmark": "store overhead", **run(options.arguments),
        "hardware": f"{os.cpu_count()} CPUs, {platform.machine()}, load {os.getloadavg()[0]:.1f}",
        "versions": {"python": platform.python_version()},
    }))


if __name__ == "__main__":
    main()
