"""The dotted keys of the configuration, and advice on those that do not exist."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from diffult_ray.config.experiment import Experiment
from diffult_ray.config.section import Section


def known_keys(model: type[BaseModel] = Experiment, prefix: str = "") -> list[str]:
    """Every dotted key of an experiment that holds a value, in the order of definition."""
    keys = []
    for name, info in model.model_fields.items():
        if is_section(info):
            keys += known_keys(info.annotation, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


def is_section(info: FieldInfo) -> bool:
    return isinstance(info.annotation, type) and issubclass(info.annotation, Section)


SECTIONS = {name: info.annotation for name, info in Experiment.model_fields.items() if is_section(info)}
KEYS = tuple(known_keys())

# How fast a stage runs, how results are measured, and which images choose: they make no other trial.
NOT_SEARCHED = re.compile(r"resources\..*|quality\..*|dataset\.(root|download|loading)|select")

# Other images or other luck, of which an expected number holds as well.
SAME_RESULTS = re.compile(
    r"resources\..*|dataset\.(root|download|loading)|quality\.(network|inception_weights)|(.*\.)?seed"
)


def nearest(key: str, keys: Sequence[str]) -> str:
    """Advice on a key that does not exist: of the keys with its last part, or nearly so, the most alike."""
    below = [k.removeprefix(f"{key}.") for k in keys if k.startswith(f"{key}.")]
    if below:
        return f"name one of its keys: {', '.join(below)}"
    tails = {k: k.rpartition(".")[2] for k in keys}
    tail = difflib.get_close_matches(key.rpartition(".")[2], sorted(set(tails.values())), n=1, cutoff=0.7)
    namesakes = [k for k in keys if tails[k] in tail]
    near = difflib.get_close_matches(key, namesakes or keys, n=1, cutoff=0.0 if namesakes else 0.5)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"they begin with {', '.join(dict.fromkeys(k.partition('.')[0] for k in keys))}"


def info_of(model: type[Section], path: Sequence[str]) -> FieldInfo | None:
    """The field that a path leads to, or into."""
    info = None
    for part in path:
        info = model.model_fields.get(part)
        if info is None or not is_section(info):
            return info
        model = info.annotation
    return info


def with_key(values: Mapping[str, Any], dotted: str, value: Any) -> Any:
    """Nested mappings with one key set, as copies along its path."""
    if not isinstance(values, Mapping):
        return values
    head, _, rest = dotted.partition(".")
    inner = with_key(values.get(head) or {}, rest, value) if rest else value
    return {**values, head: inner}
