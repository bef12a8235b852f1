"""What a sweep says while it runs."""

import io

from diffult_ray import progress
from diffult_ray.progress import Narrator, clock


def test_progress_is_told_with_the_time_left_and_not_once_all_is_done(monkeypatch):
    monkeypatch.setattr(progress, "INTERVAL", 0.0)
    said = io.StringIO()
    narrator = Narrator(said)
    for done in (0, 5, 10, 10):
        narrator.progress("images", done, 10, "loss 0.5")
    lines = said.getvalue().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("[0:00] images: 5/10 (50%), loss 0.5, about 0:0")


def test_that_nothing_is_done_yet_is_told_now_and_then_and_no_more_once_something_is():
    said = io.StringIO()
    narrator = Narrator(said)
    for seconds in (1, 19, 20, 25, 41, 59, 75):
        narrator.waits("generator", seconds)
    lines = said.getvalue().splitlines()
    assert [line.split("yet ")[1].split()[0] for line in lines] == ["0:20", "0:41", "1:15"]
    assert all("generator: nothing done yet" in line for line in lines)
    assert [narrator.progress("images", done, 10) for done in (3, 3, 4, 10)] == [False, False, True, True]
    told = len(said.getvalue().splitlines())
    narrator.waits("images", 300)  # how far it was has gone with its work folder
    assert len(said.getvalue().splitlines()) == told


def test_the_clock():
    assert [clock(s) for s in (0, 59.9, 61, 3599, 7500)] == ["0:00", "0:59", "1:01", "59:59", "2h05"]
