"""The time left of trials that run side by side."""

import pytest

from diffult_ray.pace import Pace


@pytest.mark.parametrize("at_once", [1, 2])
def test_after_the_first_it_is_without_the_start_of_its_process(at_once):
    pace = Pace(9, lambda: at_once, now=0.0)
    left = pace.end("a", 1000.0, seconds=20.0)
    assert left == 20.0 * (8 - (at_once - 1)) / at_once, "what runs beside it ends with it"


def test_after_more_it_is_without_those_that_ran_first():
    pace = Pace(12, lambda: 2, now=0.0)
    assert pace.end("a", 100.0, seconds=50.0) == 25.0 * 10
    assert pace.end("b", 100.0, seconds=50.0) == 25.0 * 10
    pace.end("c", 110.0, seconds=50.0)
    assert pace.end("d", 110.0, seconds=50.0) == 5.0 * 8


def test_one_that_failed_is_one_less():
    pace = Pace(3, lambda: 1, now=0.0)
    pace.end("a", 1.0, seconds=None)
    assert pace.left == 2 and pace.end("b", 100.0, seconds=60.0) == 99.0


def test_of_long_ones_it_is_by_how_far_they_are():
    pace = Pace(4, lambda: 2, now=0.0)
    assert pace.look({"a": 0.0, "b": 0.0}, 2, 10.0) is None, "no rate is known yet"
    assert pace.look({"a": 0.1, "b": 0.2}, 2, 110.0) == pytest.approx(3.7 / 0.0015 / 2)
    assert pace.look({}, 0, 120.0) is None
    left = pace.end("a", 1010.0, seconds=900.0)
    assert left == pytest.approx(1000 * (3 - 1) / 2), "the other is as good as done"
    assert pace.look({"c": 0.0}, 1, 1020.0) == pytest.approx(3 * 1000), "at the rate of the last"


def test_of_one_that_was_first_seen_late_no_rate_is_known():
    pace = Pace(3, lambda: 1, now=0.0)
    pace.look({"a": 0.9}, 1, 90.0)
    assert pace.end("a", 200.0, seconds=100.0) == 200.0
