"""A process of a stage is killed while the stage runs: the same driver goes on."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest

from tests.faults.door import RUNS_WITHIN, Door, Tally, descendants, wait_for

# What Ray calls the processes of a stage, and the line after which it is under way.
VICTIMS = {
    "train worker": (r"\] generator .*started", "RayTrainWorker"),
    "training task": (r"\] extractor .*started", "ray::extractor"),
    "training task of the reference": (r"\] reference .*started", "ray::reference"),
    "data task of the images": (r"\] images .*started", "SampleRows"),
    "data actor": (r"\] scores .*started", "MapWorker"),
    "data task of the quality": (r"\] quality .*started", "MeasureRows"),
    "trial": (r"quality .*done in", "ImplicitFunc"),
}


@pytest.mark.parametrize("victim", VICTIMS)
def test_a_killed_process_of_a_stage(victim: str, reference: Door, door: Door, tally: Tally):
    line, title = VICTIMS[victim]
    with tally.fault():
        door.begin()
        door.until(line)
        pid = wait_for(lambda: descendants(door, title), RUNS_WITHIN, title)[0]
        os.kill(pid, signal.SIGKILL)
        assert door.end() == 0, door.said[-1]
        assert "FAILED" not in door.said[-1]
        tally.cost(door, reference)
        door.check(reference)


def test_every_process_of_ray_is_killed(reference: Door, new_faulty: Callable[[], Door], tally: Tally):
    """The head itself: the sweep ends, and the same command goes on."""
    door = new_faulty()
    with tally.fault():
        door.begin()
        door.until(r"\] images .*started")
        for pid in descendants(door, "raylet"):
            os.kill(pid, signal.SIGKILL)
        assert door.end() not in (0, None)
        door.finish()
        tally.cost(door, reference)
        door.check(reference)
