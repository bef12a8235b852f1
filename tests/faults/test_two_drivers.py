"""Two drivers at once on one storage: of the same sweep, and of two that share stages."""

from __future__ import annotations

import re
from collections.abc import Callable

import pandas as pd

from tests.faults.door import SWEEP, Door, Tally

OTHER = SWEEP.replace("name: faults", "name: other")


def test_two_drivers_of_one_sweep(reference: Door, new_faulty: Callable[..., Door], tally: Tally):
    first = new_faulty()
    second = new_faulty(storage=first.storage)
    with tally.fault():
        for door in (first, second):
            door.begin()
        assert [first.end(), second.end()] == [0, 0], first.said + second.said
        assert "waiting" in first.said[0] + second.said[0]
        for door in (first, second):
            assert "Traceback" not in door.said[0]
            door.check(reference)


def test_two_sweeps_that_share_all_stages(reference: Door, new_faulty: Callable[..., Door], tally: Tally):
    first = new_faulty()
    second = new_faulty(OTHER, storage=first.storage, name="other")
    with tally.fault():
        for door in (first, second):
            door.begin()
        assert [first.end(), second.end()] == [0, 0], first.said + second.said
        first.check(reference, tracked=False)
        pd.testing.assert_frame_equal(second.measured(), reference.measured())
        made = re.findall(r"\] (\w+ \w{8}).*: done in", first.said[0] + second.said[0])
        assert all(door.processes() == [] for door in (first, second))
        assert made


def test_a_second_driver_goes_on_when_the_first_is_killed(
    reference: Door, new_faulty: Callable[..., Door], tally: Tally
):
    first = new_faulty()
    second = new_faulty(storage=first.storage)
    with tally.fault():
        first.begin()
        first.until(r"\] generator .*started")
        second.begin()
        second.until("waiting")
        first.kill()
        assert second.end() == 0, second.said[-1]
        first.seconds = second.seconds
        tally.cost(first, reference)
        second.check(reference)
