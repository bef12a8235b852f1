"""What a run may spend, what of it is gone, and what it leaves undone: `tune.budget`.

A stage or trial starts while no limit is reached, if its estimate, on top of what was spent and of what
those that run are estimated to take, is within all of them. What runs is let to end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from diffult_ray.costs import Costs, Total
from diffult_ray.plan import figures, progress

if TYPE_CHECKING:
    from diffult_ray.pipeline import Stage
    from diffult_ray.store import Artifact

UNITS = {"hours": "hours", "gpu_hours": "GPU-hours", "cost": "of cost"}


class OverBudget(Exception):
    """Why a stage was not started."""


@dataclass
class Purse:
    """What a run may spend; used by one thread.

    Args:
        costs: the estimates.
        seconds: since the start of the command.
    """

    costs: Costs
    seconds: Callable[[], float]
    spent: Total = field(default_factory=Total)
    left: dict[str, Stage] = field(default_factory=dict)  # key -> stage or trial that was not started
    _running: dict[str, tuple[Total, float]] = field(default_factory=dict)  # key -> estimate, its start

    @property
    def limits(self) -> dict[str, float]:
        return self.costs.plan.sweep.tune.budget.limits

    def take(self, stages: Sequence[Stage]) -> bool:
        """Whether stages that are built in one go may start now; if so, their estimate is set aside."""
        estimate = self._estimate(stages)
        if self._exceeded(estimate, [each for each, _ in self._running.values()]):
            return False
        self._running[stages[0].key] = estimate, time.monotonic()
        return True

    def settle(self, stages: Sequence[Stage]) -> None:
        """Stages that were taken, and were built in one go, have ended, one way or another."""
        starts = [self._running.pop(s.key)[1] for s in stages if s.key in self._running]
        self.spent.add(stages[0], time.monotonic() - min(starts) if starts else 0.0)

    def lacks(self, stages: Sequence[Stage]) -> str | None:
        """Why these can not be started in this run, whatever those that run will take; None if they can."""
        estimate = self._estimate(stages)
        unit = self._exceeded(estimate, [])
        if unit is None:
            return None
        limit, used = self.limits[unit], self._used(unit, [])
        if used >= limit:
            return f"the budget of {limit:g} {UNITS[unit]} is reached"
        needed = self._amount(unit, estimate)
        return f"needs about {needed:.2g} of the {limit - used:.2g} {UNITS[unit]} that the budget has left"

    def leave(self, stages: Sequence[Stage]) -> None:
        self.left.update({s.key: s for s in stages})

    def learn(self, artifact: Artifact) -> None:
        """What was built just now tells of what is like it."""
        if self.limits:
            self.costs.add(artifact.manifest)

    def told(self) -> str | None:
        """What was left undone, in a line; None if nothing was."""
        if not self.left:
            return None
        trials = sum(s.name == "classifier" for s in self.left.values())
        estimate = figures(self.costs.plan, self.costs.total(self.left.values()))
        limits = " or ".join(f"{limit:g} {UNITS[unit]}" for unit, limit in self.limits.items())
        return (
            f"budget: {limits}: left {_count(len(self.left) - trials, 'stage')} and "
            f"{_count(trials, 'trial')}: {estimate}\nthe same command with a larger tune.budget continues"
        )

    # --- sums ---

    def _estimate(self, stages: Sequence[Stage]) -> Total:
        if not self.limits:
            return Total()
        return self.costs.total(stages, {s.key: progress(s, self.costs.store) for s in stages})

    def _exceeded(self, estimate: Total, running: Sequence[Total]) -> str | None:
        """The first limit that is reached already, or would be passed."""
        for unit, limit in self.limits.items():
            used = self._used(unit, running)
            if used >= limit or used + self._amount(unit, estimate) > limit:
                return unit
        return None

    def _used(self, unit: str, running: Sequence[Total]) -> float:
        if unit == "hours":
            return self.seconds() / 3600
        return sum(self._amount(unit, each) for each in (self.spent, *running))

    def _amount(self, unit: str, total: Total) -> float:
        if unit == "cost":
            return total.price(self.costs.plan.sweep.price) or 0.0
        return total.seconds / 3600 if unit == "hours" else total.gpu_hours


def _count(n: int, thing: str) -> str:
    return f"{n} {thing}" if n == 1 else f"{n} {thing}s"
