"""Shared by the tests: a small sweep on digits, and the front door in a process of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from diffult_ray import processes

TINY = """
name: tiny
experiment:
  dataset: {name: digits, imbalance_factor: 20, max_per_class: 60, validation_per_class: 4}
  extractor: &recipe {architecture: cnn, steps: 60, batch_size: 32, learning_rate: 0.1, crop_padding: 1,
                      flip: false, schedule: cosine, warmup: 0.1}
  generator: {channels: [16, 32], blocks: 1, attention: [], dropout: 0.0, steps: 80, batch_size: 32,
              learning_rate: 2.0e-3, warmup_steps: 10, ema: 0.98, flip: false}
  generation: {per_class: 30, sampler: dpmsolver++, steps: 5, guidance: 0.5}
  classifier: {<<: *recipe, synthetic_weight: 0.5}
  quality: {images: 200, reference: *recipe}
  resources: {generator: {workers: 2}}
baselines: [ce, oversample]
search:
  - filter.threshold: {grid: [2.0, inf]}
    classifier.seed: {grid: [0, 1]}
  - generator.steps: {grid: [40]}
    classifier.seed: {grid: [0]}
"""


# Columns of the results that are another time's clock and memory.
MEASURED = ["seconds", "memory_mib", "gpu_memory_mib"]


def driver_of(process: subprocess.Popen[str]) -> int:
    """The process that drives Ray: a child of the one that was started."""
    for pid in processes.children(process.pid):
        with suppress(OSError):
            if b"diffult_ray.sweep" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
    raise ProcessLookupError(f"{process.pid} has no driver")


@dataclass
class FrontDoor:
    """`python -m diffult_ray.sweep` with a storage folder and a Ray temp dir of its own."""

    storage: Path
    sweep: Path
    ray: Path

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "diffult_ray.sweep", str(self.sweep), *arguments]

    @property
    def environment(self) -> dict[str, str]:
        without = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "DIFFULT_", "MLFLOW_"))}
        return {**without, "DIFFULT_STORAGE": str(self.storage), "RAY_TMPDIR": str(self.ray)}

    def run(self, *arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments), env=self.environment, capture_output=True, text=True,
            timeout=timeout, stdin=subprocess.DEVNULL,
        )

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(*arguments), env=self.environment, text=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )

    def processes(self) -> list[str]:
        """Command lines of all processes that this front door's Ray has started."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                environment = (entry / "environ").read_bytes()
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if f"RAY_TMPDIR={self.ray}".encode() in environment.split(b"\0"):
                found.append(f"{entry.name} {line[:120]}")
        return found

    def manifests(self) -> dict[str, int]:
        """Stage/key -> time of its manifest, in nanoseconds."""
        root = self.storage / "artifacts"
        found = root.glob("*/*/manifest.json")
        return {str(p.parent.relative_to(root)): p.stat().st_mtime_ns for p in found}


def temporary_folder() -> Iterator[Path]:
    """A short path: Ray puts sockets in it, whose paths may have 107 characters."""
    path = Path(tempfile.mkdtemp(prefix="dr-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


ray_folder = pytest.fixture(scope="module")(temporary_folder)


@pytest.fixture(scope="module")
def new_door(tmp_path_factory: pytest.TempPathFactory, ray_folder: Path):
    """Makes front doors with new storage, for the tiny sweep or a text given."""

    def make(text: str = TINY) -> FrontDoor:
        folder = tmp_path_factory.mktemp("door")
        sweep = folder / "tiny.yaml"
        sweep.write_text(text)
        return FrontDoor(storage=folder / "storage", sweep=sweep, ray=ray_folder)

    return make


@pytest.fixture(scope="module")
def cluster(ray_folder: Path) -> Iterator[object]:
    """A Ray cluster in this process, ended with its processes."""
    previous = {k: os.environ.pop(k) for k in ("RAY_ADDRESS",) if k in os.environ}
    os.environ["RAY_TMPDIR"] = str(ray_folder)
    from diffult_ray.cluster import connect, disconnect

    yield connect("local")
    disconnect()
    os.environ.pop("RAY_TMPDIR")
    os.environ.update(previous)


def lines(text: str, words: Sequence[str]) -> list[str]:
    """The lines that hold all the words."""
    return [line for line in text.splitlines() if all(w in line for w in words)]


@pytest.fixture
def imagenet_lists(tmp_path, monkeypatch):
    """DIFFULT_DATA with list files of one image each, where the ImageNet-LT sweeps look for theirs."""
    folder = tmp_path / "imagenet" / "ImageNet_LT"
    folder.mkdir(parents=True)
    (folder.parent / "a.jpg").write_bytes(b"")
    for part in ("train", "val", "test"):
        (folder / f"ImageNet_LT_{part}.txt").write_text("a.jpg 0\n")
    monkeypatch.setenv("DIFFULT_DATA", str(tmp_path))
