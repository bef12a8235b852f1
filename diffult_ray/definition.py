"""A sweep's name stands for one definition in a storage folder: what may change of it, and what may not.

More of the same goes on: other searched values, axes, baselines and seeds, more generator steps, more
images a class, and what makes no other trial (resources, places, measures). Another value of a key that
was not searched would put the results of two experiments under one name, and is refused once there
are results.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from diffult_ray import config, files, pipeline
from diffult_ray.config import Sweep
from diffult_ray.errors import BadInput

GROWS = re.compile(r"(.*\.)?seed|generator\.steps|generation\.per_class")
SHOWN = 3


def check(sweep: Sweep, folder: Path, place: str | None = None) -> None:
    """Compare a sweep with the one of its name, where that has results.

    Args:
        folder: of the sweep's name in the storage.
        place: how a person finds it, if not by its path.

    Raises:
        BadInput: if they differ in more than may change.
    """
    stored = _stored(folder / "sweep.yaml")
    if stored is None or not _has_results(folder):
        return
    changes = list(_differences(stored, sweep))
    if not changes:
        return
    shown = "; ".join(changes[:SHOWN]) + (f"; and {len(changes) - SHOWN} more" if changes[SHOWN:] else "")
    raise BadInput(
        where="name", value=sweep.name,
        rule=f"has results of another definition in this storage: {shown}",
        advice=f"give this one another with name=NAME, or remove {place or folder}; "
        "artifacts are shared either way",
    )


def tracked_at(folder: Path) -> str | None:
    """The MLflow store that the sweep in a folder names, as it was last started."""
    stored = _stored(folder / "sweep.yaml")
    return stored.tracking.uri if stored else None


def _stored(path: Path) -> Sweep | None:
    """The definition as it was resolved, if this version can read it."""
    try:
        return Sweep.model_validate(yaml.safe_load(path.read_text()))
    except (OSError, ValueError, ValidationError, yaml.YAMLError):
        return None


def _has_results(folder: Path) -> bool:
    for path in (folder / "trials").glob("*.json"):
        try:
            if files.read_json(path)["status"] == "done":
                return True
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return False


def _differences(stored: Sweep, now: Sweep) -> Iterator[str]:
    try:
        before, after = config.first(stored), config.first(now)
        searched = {*config.searched(stored), *config.searched(now)}
    except BadInput:  # of a version with other rules; its trials are told apart by their keys
        return
    for key in config.KEYS:
        if key in searched or GROWS.fullmatch(key) or config.NOT_SEARCHED.fullmatch(key):
            continue
        old, new = before.at(key), after.at(key)
        if old != new and (pipeline.applies(key, before) or pipeline.applies(key, after)):
            yield f"{key} was {_shown(old)}, is {_shown(new)}"


def _shown(value: Any) -> str:
    """As in a sweep file."""
    return str(value) if isinstance(value, float) else json.dumps(value)
