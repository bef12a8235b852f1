"""Which cells of a sweep an expected number is about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffult_ray import config, pipeline
from diffult_ray.config import Expected, Experiment
from diffult_ray.plan import Plan


def matched(plan: Plan) -> list[tuple[Expected, list[str]]]:
    """Each row with the cells that have its values, in the order of the sweep."""
    cells = {t.cell: t.experiment for t in reversed(plan.trials)}
    order: Sequence[str] = list(dict.fromkeys(t.cell for t in plan.trials))
    return [
        (row, [c for c in order if row.where and has(cells[c], row.where)]) for row in plan.sweep.expected
    ]


def has(e: Experiment, where: Mapping[str, Any]) -> bool:
    """Whether an experiment has these values, and its method uses them.

    Unless named, `method` is diffult, and `synthetic` what is usual for the method.
    """
    method = where.get("method", "diffult")
    if e.method != method or e.synthetic != where.get("synthetic", method == "diffult"):
        return False
    return all(
        key == "method" or pipeline.applies(key, e) and config.has_value(e, key, value)
        for key, value in where.items()
    )
