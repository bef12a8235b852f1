"""How long the trials that are left will take, while trials of about the same length run side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping


class Pace:
    """Where trials are long, by how far they are; where they end before anyone looks, by how many have ended.

    Times are seconds of one clock that never goes back, shares of a trial's steps between 0 and 1.

    Args:
        trials: all of them.
        at_once: how many run at a time.
        now: when they begin.
    """

    def __init__(self, trials: int, at_once: Callable[[], int], now: float) -> None:
        self.trials, self.ended = trials, 0
        self._at_once, self._start = at_once, now
        self._first: tuple[float, int] | None = None  # when those that ran first had ended, and how many
        self._seen: dict[str, tuple[float, float]] = {}  # first look at a trial: when, and its share
        self._rate = 0.0  # share a second of the last trial whose rate is known

    @property
    def left(self) -> int:
        return self.trials - self.ended

    def look(self, shares: Mapping[str, float], running: int, now: float) -> float | None:
        """The seconds left, by the rates of the trials that were looked at.

        Args:
            shares: of some of those at work, by name.
            running: how many are at work.

        Returns:
            None where none is at work, or no rate is known yet.
        """
        rates = []
        for name, share in shares.items():
            since, before = self._seen.setdefault(name, (now, share))
            if share > before:
                rates.append((share - before) / (now - since))
        rates = rates or [self._rate]
        if not shares or not any(rates):
            return None
        begun = running * sum(shares.values()) / len(shares)
        return (self.left - begun) * len(rates) / sum(rates) / running

    def end(self, name: str, now: float, *, seconds: float | None) -> float:
        """The seconds left when a trial has ended.

        Args:
            seconds: of its training without the start of its process; None if it failed.
        """
        self.ended += 1
        since, before = self._seen.pop(name, (now, 1.0))
        # Of one that was first seen late, the seconds after its steps would be much of the rate.
        if seconds is not None and now > since and before < 0.5:
            self._rate = (1 - before) / (now - since)
            return self._by_rate(now)
        return self._by_ends(now, seconds)

    def _by_rate(self, now: float) -> float:
        """All that are left at the rate of the one that ended, also those that ran beside it."""
        together = max(1, min(self._at_once(), self.left))
        shares = [min(1.0, before + self._rate * (now - since)) for since, before in self._seen.values()]
        beside = min(self._at_once() - 1, self.left)
        begun = beside * sum(shares) / len(shares) if shares else 0.0
        return (self.left - begun) / self._rate / together

    def _by_ends(self, now: float, seconds: float | None) -> float:
        """At the rate of the ends so far: at first by the training alone of the one that ended first, whose
        process had to start, and later without those that ran first.
        """
        together = max(1, min(self._at_once(), self.trials))
        if self.ended == 1 and seconds is not None:
            self._start = max(self._start, now - seconds)
        if self.ended >= together and self._first is None:
            self._first = now, self.ended
        if self._first is not None and self.ended >= 2 * self._first[1]:
            since, before = self._first
            return (now - since) * self.left / (self.ended - before)
        with_it = max(0, together - self.ended)  # those that ran beside the first end with it
        return (now - self._start) * max(0, self.left - with_it) / max(self.ended, together)
