"""What a sweep says while it runs: one line a stage and trial, with progress and time left."""

from __future__ import annotations

import sys
import threading
import time
from typing import TextIO

INTERVAL = 10.0  # least seconds between two lines about the same thing
QUIET = 20.0  # between two that nothing is done yet, or of trials of which none has ended
LINES = 30  # what takes long says less often: each time a thirtieth of the time that it has taken


class Narrator:
    """Lines with the time since the start; safe from several threads."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._start = time.monotonic()
        self._lock = threading.Lock()
        self._told: dict[str, float] = {}
        self._first: dict[str, tuple[float, int]] = {}
        self._waits: dict[str, float] = {}
        self._moved: set[str] = set()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def say(self, text: str) -> None:
        with self._lock:
            print(f"[{clock(self.seconds)}] {text}", file=self._stream, flush=True)

    def waits(self, label: str, seconds: float) -> None:
        """That nothing is done yet of what was started so many seconds ago, at most once in a while."""
        if label not in self._moved and due(seconds, self._waits.get(label, 0.0), QUIET):
            self._waits[label] = seconds
            self.say(f"{label}: nothing done yet {clock(seconds)} after its start")

    def progress(self, label: str, done: int, total: int, detail: str = "") -> bool:
        """How far something is, now and then; the time left is by the rate seen so far.

        Returns:
            whether more is done than when this was called first.
        """
        now = time.monotonic()
        began, before = self._first.setdefault(label, (now, done))
        if done <= before:
            return False
        self._moved.add(label)
        if done >= total or not due(now - began, self._told.get(label, began) - began, INTERVAL):
            return True
        self._told[label] = now
        left = (now - began) * (total - done) / (done - before)
        parts = [f"{label}: {done}/{total} ({100 * done // total}%)", detail, f"about {clock(left)} left"]
        self.say(", ".join(p for p in parts if p))
        return True

    def trial(self, text: str, left: float, *, failed: bool) -> None:
        """A trial that has ended, with the time left for the others."""
        self.say(text if failed or left < 1 else f"{text}, about {clock(left)} left")


def due(seconds: float, told: float, least: float) -> bool:
    """Whether it is time for another line.

    Args:
        seconds: that it has taken, and `told` when the last line was, on the same clock.

    >>> due(30, told=19, least=10), due(30, told=21, least=10), due(3600, told=3500, least=10)
    (True, False, False)
    """
    return seconds - told >= max(least, seconds / LINES)


def clock(seconds: float) -> str:
    """Minutes and seconds, or hours and minutes.

    >>> clock(75), clock(7500)
    ('1:15', '2h05')
    """
    whole = int(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}"
    return f"{whole // 60}:{whole % 60:02d}"


def si(number: float) -> str:
    """Three digits and the prefix of a unit.

    >>> si(12_400_000_000), si(461), si(2.14e19)
    ('12.4 G', '461 ', '21.4 E')
    """
    for prefix, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {prefix}"
    return f"{number:.3g} "
