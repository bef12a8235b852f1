"""A node of the cluster dies, with all its processes, during each stage; another has come before."""

from __future__ import annotations

import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.door import RUNS_WITHIN, Door, Tally, descendants, wait_for, wait_for_the_end_of

TOLERANCE = 1e-6  # of the metrics: what was begun on one node may end on another
# A line that tells that a stage is under way, and what its processes are called.
STAGES = {
    "extractor": (r"\] extractor .*started", "ray::extractor"),
    "reference": (r"\] reference .*started", "ray::reference"),
    "generator": (r"\] generator .*started", "RayTrainWorker"),
    "images": (r"\] images .*started", "SampleRows"),
    "scores": (r"\] scores .*started", "ScoreRows"),
    "quality": (r"\] quality .*started", "MeasureRows"),
    "classifier": (r"quality .*done in(.|\n)*scores|scores .*done in(.|\n)*quality", "ImplicitFunc"),
}


class Nodes:
    """A head without CPUs, and nodes of two that come and go."""

    def __init__(self, door: Door) -> None:
        self.token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.nodes", str(door.ray)],
            env={**door.environment, **self.token}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2],
        )
        self.address = self._process.stdout.readline().strip()

    def do(self, what: str) -> None:
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline(), f"no answer to {what}"

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(120)


@pytest.fixture
def nodes(door: Door) -> Iterator[Nodes]:
    made = Nodes(door)
    yield made
    made.close()
    wait_for_the_end_of(door.processes)


def test_a_node_is_killed_during_each_stage(
    reference: Door, door: Door, nodes: Nodes, tally: Tally
):
    """In one sweep, one node after the other; the driver goes on, or the same command does."""
    door.variables = nodes.token
    door.options = ["--address", nodes.address]
    nodes.do("add")
    with tally.fault(len(STAGES)):
        door.begin()
        for line, title in STAGES.values():
            door.until(line)
            wait_for(lambda title=title: descendants(door, title), RUNS_WITHIN, title)
            nodes.do("add")
            nodes.do("kill")
        assert door.end() == 0, door.said[-1]
        tally.cost(door, reference, len(STAGES))
        nodes.close()
        door.check(reference, tolerance=TOLERANCE)
