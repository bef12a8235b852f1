"""Reading a sweep: the file with its base and overlay, then overrides, then all checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from diffult_ray import sweepfile
from diffult_ray.config.experiment import Experiment, Resources
from diffult_ray.config.keys import KEYS, SAME_RESULTS, known_keys, nearest, with_key
from diffult_ray.config.refusal import Source, advice_on, rule_of, validate
from diffult_ray.config.search import KINDS
from diffult_ray.config.sweep import Price, Sweep, Tracking, Tune
from diffult_ray.errors import BadInput
from diffult_ray.sweepfile import as_list, drop_axis, raw_designs

SWEEP_KEYS = ("name", "description", "baselines", *known_keys(Tune, "tune."),
              *(f"tracking.{k}" for k in Tracking.model_fields), *(f"price.{k}" for k in Price.model_fields))


def load(sweep: str = "digits", overrides: Sequence[str] = (), overlay: str | None = None) -> Sweep:
    """The sweep of a file or shipped name, under an overlay and overrides, fully checked.

    Raises:
        BadInput: for a mistake of the user's in a file or an override.
    """
    written = sweepfile.read(sweep, overlay)
    for key, place in written.axes.items():
        if key not in KEYS:
            raise BadInput(where=place, rule="no such key", advice=nearest(key, KEYS))
    values, told = written.values, {}
    for override in overrides:
        _override(values, override, told)
    _note_overrides(values, told)
    source = Source(str(written.path), told, origins=written.origins)
    built = validate(Sweep, values, source)
    built._source = source
    _ = built.cells  # each is checked now, before anything starts
    _check_expected(built)
    _check_budget(built)
    return built


def _note_overrides(values: dict[str, Any], told: Mapping[str, str]) -> None:
    """What was expected of the file's settings may not hold of others."""
    inner = {key.removeprefix("experiment."): text for key, text in told.items()
             if key.startswith("experiment.")}
    changed = [text for key, text in inner.items() if not SAME_RESULTS.fullmatch(key)]
    if changed and values.get("expected"):
        values["differs"] = [*as_list(values.get("differs")), f"with the override {', '.join(changed)}"]


def _override(values: dict[str, Any], override: str, told: dict[str, str]) -> None:
    """Set a key in the values of a sweep file, and note in `told` where the key is set."""
    key, equals, text = (part.strip() for part in override.partition("="))
    if not equals or not key or not text:
        raise BadInput(
            where=f"override {override!r}", rule="must be key=value", advice="as in generator.steps=500"
        )
    value = _override_value(override, text)
    inner = key.removeprefix("experiment.")
    if key in SWEEP_KEYS:
        _set(values, key, value)
        told[key] = override
    elif inner in KEYS:
        _set(values, f"experiment.{inner}", value)
        drop_axis(values, inner)
        told[f"experiment.{inner}"] = override
    elif key.startswith("search."):
        told.update(_set_axis(values, key.removeprefix("search."), value, override))
    else:
        advice = nearest(inner, (*KEYS, *SWEEP_KEYS))
        raise BadInput(where=f"override {override}", rule="no such key", advice=advice)


def _override_value(override: str, text: str) -> Any:
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        problem = getattr(error, "problem", None) or str(error)
        raise BadInput(
            where=f"override {override}", rule=f"the value must be YAML: {problem}", advice="correct it"
        ) from None


def _set(values: dict[str, Any], dotted: str, value: Any) -> None:
    """Set a nested key. Where something else than a mapping is in the way it stays, to be refused."""
    *path, last = dotted.split(".")
    for part in path:
        if values.get(part) is None:
            values[part] = {}
        values = values[part]
        if not isinstance(values, dict):
            return
    values[last] = value


def _set_axis(values: dict[str, Any], rest: str, value: Any, override: str) -> dict[str, str]:
    key, _, kind = rest.rpartition(".")
    holders = [(at, d) for at, d in raw_designs(values) if key in d]
    if kind not in KINDS or key not in KEYS or not holders:
        searched = [k for _, d in raw_designs(values) for k in d if k != "zip"]
        raise BadInput(
            where=f"override {override}",
            rule=f"must be search.KEY.KIND=values, with a searched KEY and KIND one of {', '.join(KINDS)}",
            advice=nearest(key or rest, searched) if searched else "this sweep searches nothing",
        )
    for _, design in holders:
        design[key] = {kind: value}
    return {f"{at}.{key}": override for at, _ in holders}


def _check_expected(sweep: Sweep) -> None:
    """Refuse a row with a value that no cell could have; what differs from the file may have none left."""
    for number, row in enumerate(() if sweep.differs else sweep.expected):
        first = None
        for refused in (_refused(cell, row.where or {}) for cell in sweep.cells):
            if refused is None:
                break
            first = first or refused
        else:
            path = [str(part) for part in first["loc"]]
            raise BadInput(
                where=sweep._source.place([f"expected.{number}.where"]),
                rule=f"no cell could have this {'.'.join(path)}: {rule_of(first)}", value=first["input"],
                advice=advice_on(first, Experiment, path),
            )


def _refused(cell: Experiment, where: Mapping[str, Any]) -> Any:
    """What pydantic says of a cell with dotted keys set, None if they are allowed there."""
    values = cell.model_dump()
    if "method" in where:
        del values["synthetic"]  # by method, unless it is named too
    for key, value in where.items():
        values = with_key(values, key, value)
    try:
        Experiment.model_validate(values)
    except ValidationError as error:
        return error.errors()[0]
    return None


def _check_budget(sweep: Sweep) -> None:
    """Refuse a limit of cost where what is to be paid has no price."""
    cost, price = sweep.tune.budget.cost, sweep.price
    sections = {id(cell.resources): cell.resources for cell in sweep.cells}.values()
    on_gpus = any(getattr(each, stage).gpus > 0 for each in sections for stage in Resources.model_fields)
    needed = "gpu_hour" if on_gpus else "cpu_hour"
    if cost is not None and getattr(price, needed) is None:
        raise BadInput(
            where=sweep._source.place(["tune.budget.cost"]),
            rule=f"needs a price, price.{needed}", value=cost,
            advice="set it, or limit tune.budget.hours or gpu_hours",
        )
