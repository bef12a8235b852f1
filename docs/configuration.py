"""Writes docs/CONFIGURATION.md from the configuration's own classes.

    python docs/configuration.py
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from diffult_ray.config import Experiment, Measure, Price, Tracking, Tune

HEAD = """# Configuration

Made by `python docs/configuration.py` from `diffult_ray/config`. Defaults are the paper's, or those
of the public code it builds on, for CIFAR-LT; a sweep for another set states its own. The sampler is
the cheapest whose FID was within 2% of the best, of those compared on digits ([RESULTS.md](RESULTS.md)).
`per stage` resources are `workers`, and `cpus` and `gpus` a worker.

## `experiment`: one cell

Any of these keys can be overridden (`key=value`) or searched.

| key | default | values | |
|---|---|---|---|
"""

EXPERIMENT = Experiment(select="test")  # which needs no other key; its values are the defaults

TAIL = """
## `search`

One design, or a list of designs whose trials are joined. A design maps dotted keys to axes:

| axis | |
|---|---|
| `{grid: [a, b]}` | every value, crossed with the other grids |
| `{choice: [a, b]}` | one of the values, `tune.samples` draws |
| `{uniform: [low, high]}`, `{loguniform: ...}` | `tune.samples` draws; always the same ones |
| `zip: {key: [a, b], other: [c, d]}` | keys that move together |

## `base`, and overlays

`base: NAME` is a file beside this one, a shipped sweep, or a file of `sweeps/bases`: its `experiment` lies
under this one's, mapping by mapping, and lists are replaced whole. Of a sweep as base only the
`experiment` counts.

`--overlay NAME|FILE` lays a file over the sweep, before overrides, and adds its name to the sweep's:

| key | |
|---|---|
| `differs` | in words, why the results do not compare with `expected`; needed |
| `replace` | sections of `experiment` that take the place of the sweep's, such as another `dataset` |
| `experiment` | keys to set |
| `search` | `KEY: {grid: [...]}` replaces the axis of that key, where there is one; `KEY: null` fixes it |

## `expected`

Rows that the report sets beside the sweep's own results. `differs`, beside it, says in words why the
results do not compare with them; an overlay and an override add theirs.

| key of a row | |
|---|---|
| `where` | dotted keys and their values; the method is `diffult` unless `method` is among them |
| `label` | the name of the row, which one without `where` needs |
| `measure` | @MEASURES@ |
| `value` | accuracies and shares in percent |
| `standing` | `reported` by the paper, `secondary` (its readers), `code` (public code), or `ours` |
| `source` | where the number is from, and on which set |

## `name`, `description`, `baselines`, `tune`, `tracking`, `price`

`baselines` is a list of methods that are trained on D alone, beside the search, at every point whose
keys reach them. Methods with synthetic images are searched for:
`search: [{method: {grid: [diffult, reweight, mixup]}, synthetic: {grid: [true]}}]`.

| key | default | values | |
|---|---|---|---|
"""


def comments(model: type[BaseModel]) -> dict[str, str]:
    """What stands behind a field in the source, of the class and those above it."""
    found: dict[str, str] = {}
    for each in reversed([c for c in model.__mro__ if issubclass(c, BaseModel) and c is not BaseModel]):
        found |= dict(re.findall(r"^    (\w+): .*?#\s*(.*)$", inspect.getsource(each), flags=re.M))
    return found


def rows(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    notes = comments(model)
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from rows(kind, f"{prefix}{name}.")
            continue
        note = field.description or notes.get(name, "")
        yield f"| `{prefix}{name}` | `{shown(default(prefix + name, field))}` | {values(field)} | {note} |"


def default(key: str, field: FieldInfo) -> object:
    """The value that an experiment has which names no key."""
    section = key.partition(".")[0]
    return field.default if section in ("select", "tune", "tracking", "price") else EXPERIMENT.at(key)


def shown(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(list(value)) if isinstance(value, tuple) else str(value)


def values(field: FieldInfo) -> str:
    options = [a for a in get_args(field.annotation) if isinstance(a, str)]
    if options:
        return ", ".join(f"`{o}`" for o in options)
    bounds = {type(m).__name__: m for m in field.metadata}
    signs = (("Ge", "ge", ">="), ("Gt", "gt", ">"), ("Le", "le", "<="), ("Lt", "lt", "<"))
    told = [f"{sign} {getattr(bounds[n], a)}" for n, a, sign in signs if n in bounds]
    return ", ".join(told)


def page() -> str:
    experiment = "\n".join(rows(Experiment))
    sweep = "\n".join([*rows(Tune, "tune."), *rows(Tracking, "tracking."), *rows(Price, "price.")])
    measures = ", ".join(f"`{m}`" for m in get_args(Measure))
    return HEAD + experiment + "\n" + TAIL.replace("@MEASURES@", measures) + sweep + "\n"


if __name__ == "__main__":
    path = Path(__file__).with_name("CONFIGURATION.md")
    path.write_text(page())
    print(f"wrote {path}")
