"""What cannot be placed is given up after one deadline, with one line.

Ray waits for ever for a place. So what waits or runs is watched: as long as the machines that are up
could not hold it, were they free, its time runs. Machines that an autoscaler has still to start are not
up, so the deadline is longer than they take.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from diffult_ray import fleet
from diffult_ray.errors import BadInput

if TYPE_CHECKING:
    from diffult_ray.cluster import Capacity

VARIABLE = "DIFFULT_PLACEMENT_SECONDS"
DEFAULT = 900.0
LOOK_SECONDS = 2.0  # between two looks at the machines


class NotPlaced(RuntimeError):
    """No place was found in time."""


def patience() -> float:
    """The deadline in seconds. Raises BadInput."""
    given = os.environ.get(VARIABLE) or DEFAULT
    try:
        seconds = float(given)
    except ValueError:
        seconds = -1.0
    if not seconds > 0:
        raise BadInput(where=VARIABLE, rule="must be a number of seconds above 0", value=given)
    return seconds


def grown(capacity: Capacity) -> Capacity:
    """A joined cluster's capacity, or more where machines were added since."""
    if capacity.fleet is None:
        return capacity
    now = _up()
    return replace(
        capacity, cpus=max(capacity.cpus, now.total("cpus")), gpus=max(capacity.gpus, now.total("gpus"))
    )


def _up() -> fleet.Fleet:
    import ray

    return fleet.of_nodes(ray.nodes())


@dataclass
class Watch:
    """Of what asks for `resources`, a place for each of its workers."""

    resources: Any
    seconds: float = field(default_factory=patience)
    _lacking: float | None = None
    _looked: float = 0.0

    def refusal(self) -> str | None:
        """The line that says so, once there was no place for so long."""
        now, asked = time.monotonic(), self.resources
        if not getattr(asked, "workers", 0) or now - self._looked < LOOK_SECONDS:
            return None
        self._looked, up = now, _up()
        if up.places(asked.cpus, asked.gpus) >= asked.workers:
            self._lacking = None
            return None
        if self._lacking is None:
            self._lacking = now
        if now - self._lacking < self.seconds:
            return None
        return (
            f"no place in {self.seconds:g} s ({VARIABLE}) for {asked.workers} x {asked.cpus:g} CPUs and "
            f"{asked.gpus:g} GPUs: {up.shown('cpus')}, {up.shown('gpus')} are up; with more machines the "
            "same command continues"
        )
