"""A sweep as it is written: its YAML, the base that it builds on, and an overlay laid over it.

`base: NAME` puts another file's `experiment` under this one's. An overlay changes what a sweep runs
on (another scale, another set) and leaves what it asks: its keys are

    differs      why the results do not compare with the sweep's `expected` numbers
    replace      sections of `experiment` that take the place of the sweep's own
    experiment   keys that are set in the sweep's `experiment`
    search       axes that take the place of those of the same keys, null to fix a key

Where a sweep does not search a key, the overlay's axis of it says nothing.
"""

from __future__ import annotations

import copy
import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from diffult_ray.errors import BadInput

BASES, OVERLAYS = "bases", "overlays"  # folders of shipped files that are no sweeps
OVERLAY_KEYS = ("differs", "replace", "experiment", "search")


@dataclass
class Written:
    """The values of a sweep file, base and overlay included.

    Attributes:
        origins: dotted key -> the file that it was written in, where that is not `path`.
        axes: the keys of the overlay's axes -> where they are written.
    """

    path: Path
    values: dict[str, Any]
    origins: dict[str, str] = field(default_factory=dict)
    axes: dict[str, str] = field(default_factory=dict)


def read(sweep: str, overlay: str | None = None) -> Written:
    """The file of a path or shipped name, on its base and under an overlay.

    Raises:
        BadInput: for a file that is not there, is no YAML or no mapping, a base of which the file is
            itself the base, or a mistake in the overlay's own keys. What the keys hold is not checked.
    """
    path = _find(sweep, shipped(), "SWEEP", "a shipped sweep")
    written = _on_its_base(path, _mapping(path, SWEEP_FORM), [])
    if overlay is not None:
        found = _find(overlay, overlays(), "--overlay", "a shipped overlay")
        _lay_over(written, found, _mapping(found, OVERLAY_FORM))
    return written


# --- which files there are ----------------------------------------------------------------------


def shipped() -> dict[str, Path]:
    """Sweep files that come with the project, by name: from a checkout and from a wheel."""
    return {n: f for n, f in _files().items() if n.partition("/")[0] not in (BASES, OVERLAYS)}


def overlays() -> dict[str, Path]:
    """Overlays that come with the project, by name."""
    return _below(OVERLAYS)


def bases() -> dict[str, Path]:
    """What a shipped sweep can be built on, by name: the files that are only that, and the sweeps."""
    return {**shipped(), **_below(BASES)}


def _below(folder: str) -> dict[str, Path]:
    return {n.removeprefix(f"{folder}/"): f for n, f in _files().items() if n.startswith(f"{folder}/")}


def _files() -> dict[str, Path]:
    here = Path(__file__).resolve().parent
    for folder in (here / "shipped_sweeps", here.parent / "sweeps"):
        if folder.is_dir():
            files = sorted(folder.rglob("*.yaml"))
            return {f.relative_to(folder).with_suffix("").as_posix(): f for f in files}
    return {}


def _find(name: str, names: Mapping[str, Path], where: str, kind: str) -> Path:
    if os.path.isfile(name):
        return Path(name)
    if name in names:
        return names[name]
    near = difflib.get_close_matches(name, names, n=1)
    advice = f"did you mean {near[0]!r}?" if near else f"the shipped ones are {', '.join(names) or 'none'}"
    if os.path.isdir(name):
        rule = "must be a file, not a folder"
    elif Path(name).suffix in (".yaml", ".yml") or os.path.isabs(name):
        rule = "no such file"
    else:
        rule = f"neither a file nor {kind}"
    raise BadInput(where=where, rule=rule, value=name, advice=advice)


# --- YAML ---------------------------------------------------------------------------------------

# What a file is, and what to do where it is something else.
SWEEP_FORM = (
    "a sweep file is a mapping with `name`, `experiment` and `search`",
    "start from a copy of a shipped sweep",
)
BASE_FORM = "a base is a mapping with `experiment`", "give the keys that its sweeps share"
OVERLAY_FORM = "an overlay is a mapping with `differs` and `experiment`", "start from a copy of `smoke`"


def _mapping(path: Path, form: tuple[str, str]) -> dict[str, Any]:
    values = _parse(path)
    if not isinstance(values, dict) or not values:
        rule, advice = form
        raise BadInput(where=str(path), rule=rule, value=values or "an empty file", advice=advice)
    return values


def _parse(path: Path) -> Any:
    try:
        return OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        where, problem = f"{path}: line {line}", error.problem or error.context
    except OmegaConfBaseException as error:
        where, problem = f"{path}: {error.full_key}", str(error.msg or error).partition("\n")[0]
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        where, problem = str(path), str(error)
    advice = "write each key once" if "duplicate key" in problem else "correct it"
    raise BadInput(where=where, rule=f"is not readable as YAML: {problem}", advice=advice)


# --- the base -----------------------------------------------------------------------------------


def _on_its_base(path: Path, values: dict[str, Any], above: Sequence[Path]) -> Written:
    """The file with its base's experiment under its own; `above` are the files that build on it."""
    written = Written(path, dict(values))
    if "base" not in values:
        return written
    name = written.values.pop("base")
    chain = [*above, path.resolve()]
    found = _find_base(path, name)
    if found.resolve() in chain:
        raise BadInput(
            where=f"{path}: base", rule="leads back to a file that builds on it", value=name,
            advice="take one of the two out",
        )
    under = _on_its_base(found, _mapping(found, BASE_FORM), chain)
    shared = under.values.get("experiment")
    if not isinstance(shared, dict):
        raise BadInput(where=str(found), rule=BASE_FORM[0], value=shared, advice=BASE_FORM[1])
    own = values.get("experiment") or {}
    written.values["experiment"] = merged(shared, own)
    mine = {f"experiment.{key}" for key in leaves(own)} if isinstance(own, dict) else set()
    for key in leaves(shared, "experiment."):
        if not any(_within(key, each) or _within(each, key) for each in mine):
            written.origins[key] = under.origins.get(key, str(found))
    return written


def _find_base(path: Path, name: Any) -> Path:
    """Relative to the file that builds on it, or by shipped name."""
    if isinstance(name, str) and name:
        beside = path.parent / name
        if beside.is_file():
            return beside
        if name in bases():
            return bases()[name]
        near = difflib.get_close_matches(name, bases(), n=1)
        advice = f"did you mean {near[0]!r}?" if near else f"the shipped ones are {', '.join(bases())}"
    else:
        advice = "write the name of a file, as in base: digits"
    raise BadInput(
        where=f"{path}: base", rule="neither a file beside this one nor a shipped base", value=name,
        advice=advice,
    )


def merged(under: Any, over: Any) -> Any:
    """Mappings joined key by key, what is over winning; anything else is replaced whole.

    >>> merged({"a": {"b": 1, "c": 2}, "d": [1, 2]}, {"a": {"c": 3}, "d": [4]})
    {'a': {'b': 1, 'c': 3}, 'd': [4]}
    """
    if not isinstance(under, dict) or not isinstance(over, dict):
        return copy.deepcopy(over)
    return {
        **copy.deepcopy(under),
        **{k: merged(under[k], v) if k in under else copy.deepcopy(v) for k, v in over.items()},
    }


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted keys of nested mappings."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _within(key: str, other: str) -> bool:
    return key == other or key.startswith(f"{other}.")


# --- the overlay --------------------------------------------------------------------------------


def _lay_over(written: Written, path: Path, overlay: Mapping[str, Any]) -> None:
    _check_overlay(path, overlay)
    values = written.values
    if isinstance(values.get("name"), str):
        values["name"] = f"{values['name']}-{path.stem}"
        written.origins["name"] = str(path)
    values["differs"] = [*as_list(values.get("differs")), overlay["differs"]]
    experiment = values.get("experiment") or {}
    if isinstance(experiment, dict):
        replaced, changed = overlay.get("replace") or {}, overlay.get("experiment") or {}
        values["experiment"] = merged({**experiment, **copy.deepcopy(replaced)}, changed)
        for key in (*replaced, *leaves(replaced), *leaves(changed)):
            written.origins[f"experiment.{key}"] = str(path)
    for key, axis in (overlay.get("search") or {}).items():
        written.axes[key] = f"{path}: search.{key}"
        if axis is None:
            drop_axis(values, key)
        else:
            _replace_axis(written, key, axis, str(path))


def _check_overlay(path: Path, overlay: Mapping[str, Any]) -> None:
    for key, value in overlay.items():
        if key not in OVERLAY_KEYS:
            advice = f"an overlay has {', '.join(OVERLAY_KEYS)}"
            raise BadInput(where=f"{path}: {key}", rule="no such key", advice=advice)
        if key != "differs" and not isinstance(value, dict):
            raise BadInput(where=f"{path}: {key}", rule="must be a mapping", value=value, advice="correct it")
    differs = overlay.get("differs")
    if not isinstance(differs, str) or not differs.strip():
        raise BadInput(
            where=f"{path}: differs", rule="must say why the results do not compare with a sweep's own",
            value=differs, advice="as in differs: smoke scale on digits",
        )


def _replace_axis(written: Written, key: str, axis: Any, file: str) -> None:
    """In every design that searches the key; one that moves together with others keeps their number."""
    for place, design in raw_designs(written.values):
        if key in design:
            design[key] = copy.deepcopy(axis)
            written.origins[f"{place}.{key}"] = file
        for group in _groups(design.get("zip")):
            if key not in group:
                continue
            given = axis.get("grid") if isinstance(axis, dict) else None
            if not isinstance(given, list) or len(given) != len(as_list(group[key])):
                raise BadInput(
                    where=f"{file}: search.{key}",
                    rule=f"must be a grid of {len(as_list(group[key]))} values, as it moves together with "
                         f"{', '.join(k for k in group if k != key)}",
                    value=axis, advice="or null, which takes the key out of the search",
                )
            group[key] = list(given)


def as_list(value: Any) -> list[Any]:
    """A list as it is, nothing as an empty one, anything else as a list of it."""
    return value if isinstance(value, list) else [] if value is None else [value]


# --- the search of a file that is not validated yet -----------------------------------------------


def raw_designs(values: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(place, design) of `search`."""
    search = values.get("search")
    designs = search if isinstance(search, list) else [search]
    return [(design_place(n, len(designs)), d) for n, d in enumerate(designs) if isinstance(d, dict)]


def design_place(number: int, designs: int) -> str:
    return "search" if designs == 1 else f"search[{number}]"


def drop_axis(values: Mapping[str, Any], key: str) -> None:
    """Take a key out of every design, so that it is fixed."""
    for _, design in raw_designs(values):
        design.pop(key, None)
        design["zip"] = _without(design.get("zip"), key)
        if not design["zip"]:
            del design["zip"]


def _groups(zipped: Any) -> list[dict[str, Any]]:
    return [g for g in (zipped if isinstance(zipped, list) else [zipped]) if isinstance(g, dict)]


def _without(groups: Any, key: str) -> Any:
    """One `zip` group or a list of them, less a key and what is empty without it."""
    if isinstance(groups, list):
        return [g for g in (_without(group, key) for group in groups) if g]
    return {k: v for k, v in groups.items() if k != key} if isinstance(groups, dict) else groups
