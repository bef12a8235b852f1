"""The front door under attack: a sweep of every stage, started, hit, started again and looked over."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from tests.conftest import MEASURED, FrontDoor

SWEEP = """
name: faults
experiment:
  dataset: {name: digits, imbalance_factor: 20, max_per_class: 60}
  extractor: &recipe {architecture: cnn, steps: 60, batch_size: 32, learning_rate: 0.1, crop_padding: 1,
                      flip: false, schedule: cosine, warmup: 0.1}
  generator: {channels: [16, 32], blocks: 1, attention: [], dropout: 0.0, steps: 80, batch_size: 32,
              learning_rate: 2.0e-3, warmup_steps: 10, ema: 0.98, flip: false}
  generation: {per_class: 30, sampler: dpmsolver++, steps: 5, guidance: 0.5}
  classifier: {<<: *recipe, synthetic_weight: 0.5}
  quality: {images: 100, reference: *recipe}
  resources: {extractor: &half {cpus: 0.5}, reference: *half, generator: {workers: 2, cpus: 0.5},
              images: *half, scores: {cpus: 0.5, compute: actors}, quality: *half}
  select: test
baselines: [ce]
search:
  generator.steps: {grid: [40, 80]}
  classifier.seed: {grid: [0, 1]}
"""
TRIALS = 6  # 2 seeds x (ce, 40 steps, 80 steps)
STAGES = {"split": 1, "extractor": 1, "reference": 1, "generator": 2, "images": 2, "scores": 2, "quality": 2}
# Seconds in which no process of an ended or killed driver is left: of a killed one, Ray's agents try for a
# minute to tell of it.
ENDS_WITHIN = 120.0
RUNS_WITHIN = 300.0


def wait_for(condition: Callable[[], Any], seconds: float = ENDS_WITHIN, what: str = "") -> Any:
    """The first value of the condition that is true."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"after {seconds:g} seconds: {what}"
        time.sleep(0.05)
    return found


def wait_for_the_end_of(processes: Callable[[], list[str]], seconds: float = ENDS_WITHIN) -> None:
    """Of processes that end by themselves; what is left is told."""
    end = time.monotonic() + seconds
    while left := processes():
        assert time.monotonic() < end, f"left after {seconds:g} seconds: {left}"
        time.sleep(0.05)


@dataclass
class Door(FrontDoor):
    """Remembers what each run said and when each artifact was first seen."""

    options: list[str] = field(default_factory=list)
    variables: dict[str, str] = field(default_factory=dict)
    name: str = "faults"
    said: list[str] = field(default_factory=list)
    seconds: float = 0.0  # of all runs
    seen: dict[str, int] = field(default_factory=dict)
    process: subprocess.Popen[str] | None = None
    _began: float = 0.0

    @property
    def log(self) -> Path:
        return self.sweep.parent / f"said-{len(self.said)}.txt"  # two doors may share a storage

    @property
    def environment(self) -> dict[str, str]:
        return {**super().environment, **self.variables}

    def begin(self) -> None:
        """Start the command; what it says goes to a file."""
        self._began = time.monotonic()
        with open(self.log, "w") as file:
            self.process = subprocess.Popen(
                self.command(*self.options), env=self.environment, text=True, stdin=subprocess.DEVNULL,
                stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            )

    def until(self, line: str) -> None:
        """Wait until a line of the present run matches."""
        wait_for(
            lambda: re.search(line, self.log.read_text()) or self.process.poll() is not None,
            RUNS_WITHIN, line,
        )
        assert re.search(line, self.log.read_text()), f"no {line!r} in\n{self.log.read_text()}"

    def kill(self, number: int = signal.SIGKILL) -> int:
        """Send the driver, and it alone, a signal, unless it has ended; its exit code."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)
        return self.end()

    def end(self) -> int:
        """Wait for the end of the present run; its exit code. Notes the artifacts that are there then."""
        code = self.process.wait(RUNS_WITHIN)
        self.seconds += time.monotonic() - self._began
        self.said.append(self.log.read_text())
        for key, at in self.manifests().items():
            self.seen.setdefault(key, at)
        return code

    def finish(self) -> str:
        """The same command to its end, which is a good one; what it said."""
        self.begin()
        assert self.end() == 0, "\n--- again ---\n".join(self.said)
        assert "Traceback" not in self.said[-1], self.said[-1]
        return self.said[-1]

    # --- what is there after it ---

    @property
    def folder(self) -> Path:
        return self.storage / "sweeps" / self.name

    def results(self) -> pd.DataFrame:
        return pd.read_parquet(self.folder / "results.parquet")

    def measured(self) -> pd.DataFrame:
        """Results without what a clock says."""
        return self.results().drop(columns=MEASURED).set_index("trial").sort_index()

    def check(
        self, reference: Door, *, hit: Collection[str] = (), tolerance: float = 0.0, tracked: bool = True
    ) -> None:
        """All that holds after a fault, once the command has come to its end.

        Args:
            hit: stages of which an artifact had to be built again.
            tolerance: relative, of the metrics; 0 is bit for bit.
            tracked: whether MLflow's database is in the storage.
        """
        frame, expected = self.measured(), reference.measured()
        assert len(frame) == frame.index.nunique() == len(expected) and set(frame["status"]) == {"done"}
        pd.testing.assert_frame_equal(frame, expected, check_exact=tolerance == 0, rtol=tolerance, atol=0)
        self._check_builds(reference, hit)
        self._check_leftovers()
        if tracked:
            check_tracking(self.storage / "mlflow.db", reference)
        wait_for_the_end_of(self.processes)

    def _check_builds(self, reference: Door, hit: Collection[str]) -> None:
        there = self.manifests()
        assert set(there) == set(reference.manifests())
        again = {key.partition("/")[0] for key, at in self.seen.items() if there[key] != at}
        assert again == set(hit), f"built again: {again}"
        built = re.findall(r"\] (\w+ \w{8}).*: done in", "\n".join(self.said))
        twice = {label for label in built if built.count(label) > 1}
        assert {label.partition(" ")[0] for label in twice} <= set(hit), f"built twice: {twice}"

    def _check_leftovers(self) -> None:
        found = [p for p in self.storage.rglob(".*")]
        found += [p for name in ("work", "leases") for p in (self.storage / name).glob("*")]
        assert found == [], f"left over: {found}"


def runs(database: Path, tag: str) -> list[tuple[str, str]]:
    """(value of the tag, status) of MLflow's runs with a tag."""
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        return connection.execute(
            "SELECT t.value, r.status FROM runs r JOIN tags t ON t.run_uuid = r.run_uuid "
            "WHERE t.key = ? AND r.lifecycle_stage = 'active' ORDER BY t.value", (tag,),
        ).fetchall()


def check_runs(database: Path, tag: str, values: list[str]) -> None:
    """One finished run a value."""
    assert runs(database, tag) == [(value, "FINISHED") for value in values]


def check_tracking(database: Path, reference: Door) -> None:
    """One whole run a trial, a stage and the sweep."""
    trials = sorted(reference.measured().index)
    stages = sorted(key.partition("/")[2] for key in reference.manifests() if "classifier" not in key)
    check_runs(database, "diffult.trial", trials)
    check_runs(database, "diffult.key", stages)
    assert [status for _, status in runs(database, "diffult.sweep_id")] == ["FINISHED"]


def descendants(door: Door, title: str) -> list[int]:
    """Ids of this door's processes whose title holds a word, such as a Ray actor's."""
    return [int(line.split()[0]) for line in door.processes() if title in line]


# --- what is counted ---


@dataclass
class Tally:
    """Faults of all tests: how many there were, how many were survived, and what they cost."""

    injected: int = 0
    survived: int = 0
    lost: float = 0.0
    costed: int = 0

    @contextlib.contextmanager
    def fault(self, number: int = 1) -> Iterator[None]:
        """Survived if nothing is raised."""
        self.injected += number
        yield
        self.survived += number

    def cost(self, door: Door, reference: Door, faults: int = 1) -> None:
        """What a disturbed sweep took, in all its runs, beyond the undisturbed one."""
        self.lost += door.seconds - reference.seconds
        self.costed += faults

    def __str__(self) -> str:
        lost = f"{self.lost / max(1, self.costed):.1f} seconds lost on average"
        return f"faults: {self.injected} injected, {self.survived} survived, {lost}"


TALLY = Tally()
