"""The driver ends at any moment, by any signal: the same command goes on to the same results."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable

import pytest

from tests.conftest import driver_of
from tests.faults.door import Door, Tally, wait_for_the_end_of

MOMENTS = 20
SEED = 5
INTERRUPTS = (signal.SIGINT, signal.SIGTERM)  # in turns


def moments(number: int, seed: int) -> list[float]:
    """Shares of the undisturbed run's time, one drawn from each of as many equal parts of it."""
    rng = random.Random(seed)
    return [(i + rng.random()) / number for i in range(number)]


def hit(new_faulty: Callable[[], Door], share: float, seconds: float, number: int, code: int) -> Door:
    """A sweep that ends by a signal, with a code, at a share of its seconds; another, if it was done before.

    What can be caught is not sent before the first line is said: until then Python's imports would catch it.
    """
    while True:
        at, door = time.monotonic() + 0.95 * share * seconds, new_faulty()
        door.begin()
        if number != signal.SIGKILL:
            door.until(r"\S")
        try:
            door.process.wait(max(0.0, at - time.monotonic()))
        except subprocess.TimeoutExpired:
            if "\nresults:" not in door.log.read_text():
                assert door.kill(number) == code, door.said[-1]
                return door
        assert door.end() == 0, door.said[-1]
        seconds = door.seconds


def check_interrupted(door: Door, ends_within: float) -> None:
    """It said how to go on, and left nothing behind."""
    assert "the same command continues" in door.said[-1] and "Traceback" not in door.said[-1], door.said[-1]
    wait_for_the_end_of(door.processes, ends_within)
    assert not (door.storage / "leases").exists()


@pytest.mark.parametrize("share", moments(MOMENTS, SEED), ids="{:.2f}".format)
def test_a_killed_driver(share: float, reference: Door, new_faulty: Callable[[], Door], tally: Tally):
    with tally.fault():
        door = hit(new_faulty, share, reference.seconds, signal.SIGKILL, -signal.SIGKILL)
        door.finish()
        tally.cost(door, reference)
        door.check(reference)


@pytest.mark.parametrize(
    ("number", "share"), list(zip(itertools.cycle(INTERRUPTS), moments(MOMENTS, SEED + 1), strict=False)),
    ids=lambda value: value.name if isinstance(value, signal.Signals) else f"{value:.2f}",
)
def test_an_interrupted_driver(
    number: int, share: float, reference: Door, new_faulty: Callable[[], Door], tally: Tally
):
    with tally.fault():
        door = hit(new_faulty, share, reference.seconds, number, 130)
        check_interrupted(door, ends_within=1)
        door.finish()
        tally.cost(door, reference)
        door.check(reference)


AT_LINES = [
    (signal.SIGINT, r"\] sweep faults"), (signal.SIGINT, r"trial 2/"),
    (signal.SIGTERM, r"\] generator .*started"), (signal.SIGTERM, r"\] images .*started"),
]


@pytest.mark.parametrize(("number", "line"), AT_LINES, ids=str)
def test_a_driver_that_is_interrupted_at_a_line(
    number: int, line: str, reference: Door, door: Door, tally: Tally
):
    with tally.fault():
        door.begin()
        door.until(line)
        assert door.kill(number) == 130, door.said[-1]
        check_interrupted(door, ends_within=1)
        door.finish()
        tally.cost(door, reference)
        door.check(reference)


def test_a_driver_that_is_killed_alone_as_for_want_of_memory(reference: Door, door: Door, tally: Tally):
    with tally.fault():
        door.begin()
        door.until(r"\] generator .*started")
        os.kill(driver_of(door.process), signal.SIGKILL)
        assert door.end() == 128 + signal.SIGKILL, door.said[-1]
        check_interrupted(door, ends_within=1)
        door.finish()
        tally.cost(door, reference)
        door.check(reference)
