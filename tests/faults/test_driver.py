"""The driver ends at any moment, by any signal: the same command goes on to the same results."""

from __future__ import annotations

import random
import signal
import subprocess
from collections.abc import Callable

import pytest

from tests.faults.door import Door, Tally, wait_for_the_end_of

MOMENTS = 20
SEED = 5


def moments(number: int, seed: int) -> list[float]:
    """Shares of the undisturbed run's time, one drawn from each of as many equal parts of it."""
    rng = random.Random(seed)
    return [(i + rng.random()) / number for i in range(number)]


def hit(new_faulty: Callable[[], Door], share: float, seconds: float, number: int) -> Door:
    """A sweep that is sent a signal at a share of its seconds; another, if it has ended before."""
    while True:
        at, door = 0.95 * share * seconds, new_faulty()
        door.begin()
        try:
            door.process.wait(at)
        except subprocess.TimeoutExpired:
            assert door.kill(number) == -number
            return door
        assert door.end() == 0, door.said[-1]
        seconds = door.seconds


@pytest.mark.parametrize("share", moments(MOMENTS, SEED), ids="{:.2f}".format)
def test_a_killed_driver(share: float, reference: Door, new_faulty: Callable[[], Door], tally: Tally):
    with tally.fault():
        door = hit(new_faulty, share, reference.seconds, signal.SIGKILL)
        door.finish()
        tally.cost(door, reference)
        door.check(reference)


INTERRUPTS = [
    (signal.SIGINT, r"\] sweep faults"), (signal.SIGINT, r"trial 2/"),
    (signal.SIGTERM, r"\] generator .*started"), (signal.SIGTERM, r"\] images .*started"),
]


@pytest.mark.parametrize(("number", "line"), INTERRUPTS, ids=str)
def test_an_interrupted_driver(number: int, line: str, reference: Door, door: Door, tally: Tally):
    with tally.fault():
        door.begin()
        door.until(line)
        assert door.kill(number) == 130, door.said[-1]
        assert "the same command continues" in door.said[-1] and "Traceback" not in door.said[-1]
        wait_for_the_end_of(door.processes, 10)
        assert not (door.storage / "leases").exists()
        door.finish()
        tally.cost(door, reference)
        door.check(reference)
