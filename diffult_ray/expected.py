"""Which cells of a sweep an expected number is about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

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
    """Whether an experiment has these values, and its method uses them; `method` is diffult unless named.

    Values are compared as the configuration reads them: 1 and 1.0, or null and an infinite threshold.
    """
    if e.method != where.get("method", "diffult"):
        return False
    if not all(key == "method" or pipeline.applies(key, e) for key in where):
        return False
    try:
        return config.having(e, where) == e
    except ValidationError:
        return False
