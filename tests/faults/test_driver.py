"""The driver ends at any moment, by any signal: the same command goes on to the same results."""

from __future__ import annotations

import random
import signal
import subprocess
from collections.abc import Callable

import pytest

from tests.faults.door import Door, Tally, wait_for

MOMENTS = 20
SEED = 5


def moments(number: int, seed: int) -> list[float]:
    """Shares of the undisturbed run's time, one drawn from each of as many equal parts of it."""
    rng = random.Random(seed)
    return [(i + rng.random()) / number for i in range(number)]


def hit(door: Door, at: float, number: int) -> int:
    """Start, and send the signal after some seconds; the exit code. One that ends before was not hit."""
    door.begin()
    try:
        door.process.wait(at)
    except subprocess.TimeoutExpired:
        return door.kill(number)
    pytest.fail(f"ended within {at:.1f} seconds\n{door.log.read_text()}")


@pytest.mark.parametrize("share", moments(MOMENTS, SEED), ids="{:.2f}".format)
def test_a_killed_driver(share: float, reference: Door, new_faulty: Callable[[], Door], tally: Tally):
    door = new_faulty()
    with tally.fault():
        assert hit(door, 0.95 * share * reference.seconds, signal.SIGKILL) == -signal.SIGKILL
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
        wait_for(lambda: not door.processes(), 10, "processes of an interrupted driver")
        assert not (door.storage / "leases").exists()
        door.finish()
        tally.cost(door, reference)
        door.check(reference)
