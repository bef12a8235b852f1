"""A stage that a process of its own builds on a cluster of raylets, as it is seen from outside."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from diffult_ray import files
from diffult_ray.pipeline import Stage
from diffult_ray.store import Store
from tests.build_stage import stage_of
from tests.machines import ROOT, Cluster


class Building:
    """
    Args:
        name: of the stage.
        options: of `tests.build_stage`, such as DIFFULT_TEST_ROWS.
    """

    def __init__(
        self, cluster: Cluster, sweep: str, storage: Path, name: str, *overrides: str, **options: str
    ) -> None:
        self.cluster, self.store = cluster, Store(storage)
        self.stage: Stage = stage_of(sweep, name, *overrides)
        where = {"DIFFULT_STORAGE": str(storage), "RAY_ADDRESS": cluster.address}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.build_stage", sweep, name, *overrides],
            cwd=ROOT, env=cluster.environment | where | {"DIFFULT_TEST_SECONDS": "2"} | options,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    @property
    def work(self) -> Path:
        return self.store.work(self.stage)

    @property
    def done(self) -> int:
        """Steps or images that are told of; 0 before the first."""
        return (self.store.progress(self.stage) or {"done": 0})["done"]

    @property
    def checkpoints(self) -> dict[Path, float]:
        """Each with the time at which it was whole."""
        found = {}
        for path in self.work.glob("**/checkpoint*/state.safetensors"):
            try:
                found[path] = path.stat().st_mtime
            except OSError:
                continue
        return found

    def workers(self) -> int:
        """Processes that train."""
        return sum(len(m.processes("RayTrainWorker")) for m in self.cluster.machines.values())

    def end(self, code: int = 0, seconds: float = 600) -> str:
        """What it said, once it has ended with that code."""
        out, _ = self.process.communicate(timeout=seconds)
        assert self.process.returncode == code, out
        return out

    @property
    def folder(self) -> Path:
        return self.store.folder(self.stage)

    @property
    def summary(self) -> dict[str, Any]:
        return files.read_json(self.folder / "summary.json")
