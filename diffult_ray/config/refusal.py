"""A mistake in one line: where it was written, the rule, the value, and what to do."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from diffult_ray.config.experiment import Experiment
from diffult_ray.config.keys import KEYS, SECTIONS, info_of, is_section, known_keys, nearest
from diffult_ray.config.section import Rule, Section
from diffult_ray.errors import UNTOLD, BadInput, masked

LIST_ITEM = re.compile(r"\.(\d+)(?=\.|$)")


@dataclass(frozen=True)
class Source:
    """Where the user wrote a key: in the file, its base or overlay, on an axis, or in an override."""

    file: str = "sweep"
    overrides: Mapping[str, str] = field(default_factory=dict)  # key -> the override's text
    axes: Mapping[str, str] = field(default_factory=dict)  # key of the experiment -> key of its axis
    origins: Mapping[str, str] = field(default_factory=dict)  # key -> the base or overlay it is from

    def place(self, keys: Sequence[str]) -> str:
        """The first of the keys that was overridden or searched; else the first, in the file."""
        for key in keys:
            for known in _with_parents(key):
                if known in self.overrides:
                    return f"override {masked(self.overrides[known])}"
                if known in self.axes:
                    return self.place([self.axes[known]])
        file = next((self.origins[k] for k in _with_parents(keys[0]) if k in self.origins), self.file)
        return f"{file}: {_as_written(keys[0]) or 'the whole file'}"


def _with_parents(key: str) -> list[str]:
    """The key, and the keys of the sections that it is in, nearest first."""
    parts = key.split(".")
    return [".".join(parts[:n]) for n in range(len(parts), 0, -1)]


def _as_written(key: str) -> str:
    """Items of a list have their number in brackets."""
    return LIST_ITEM.sub(r"[\1]", key)


def validate(model: type[Section], values: Any, source: Source, at: str = "") -> Any:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise refusal(error.errors()[0], model, source, at) from None


def refusal(first: Mapping[str, Any], model: type[Section], source: Source, at: str) -> BadInput:
    """A mistake in one line: where it was written, the rule, the value, and what to do."""
    path = [str(part) for part in first["loc"] if part != "[key]"]
    keys = [".".join(filter(None, [at, *path]))]
    value, advice = first["input"], advice_on(first, model, path)
    broken = broken_rule(first)
    if broken is not None:
        keys = [".".join(filter(None, [at, *path, key])) for key in broken.keys] or keys
        value, advice = broken.value, broken.advice or advice
    elif first["type"] in ("extra_forbidden", "missing"):
        value = UNTOLD
    return BadInput(where=source.place(keys), rule=rule_of(first), value=value, advice=advice)


def broken_rule(error: Mapping[str, Any]) -> Rule | None:
    """The rule of ours that was broken, if it was not one of pydantic's."""
    rule = error.get("ctx", {}).get("error")
    return rule if isinstance(rule, Rule) else None


SAID = (("Value error, ", ""), ("Input should be ", "must be "), ("a valid tuple", "a list"),
        ("Tuple should have", "must have"), ("after validation, ", ""), ("Field required", "is missing"),
        ("Extra inputs are not permitted", "no such key"))


def rule_of(error: Mapping[str, Any]) -> str:
    """Pydantic's message in the words of a sweep file."""
    if error["type"] == "model_type":
        return "must be a mapping of keys to values"
    message = error["msg"].replace("a valid dictionary", "a mapping")
    for theirs, ours in SAID:
        message = message.replace(theirs, ours)
    return message


def advice_on(error: Mapping[str, Any], model: type[Section], path: Sequence[str]) -> str:
    if error["type"] == "extra_forbidden":
        return _advice_on_unknown(model, path)
    info = info_of(model, path)
    if error["type"] == "missing" and len(path) == 1:
        return "add it"
    if error["type"] == "int_from_float":
        return "give a whole number; an axis of whole numbers is a grid or a choice"
    if info is None:
        return f"its keys are {', '.join(model.model_fields)}"
    if is_section(info):
        return f"its keys are {', '.join(info.annotation.model_fields)}"
    if error["type"] == "literal_error" and isinstance(error["input"], str):
        near = difflib.get_close_matches(error["input"], re.findall(r"'(.*?)'", error["msg"]), n=1)
        if near:
            return f"did you mean {near[0]!r}?"
    if info.description:
        return info.description
    return "leave it out" if info.default is None else f"the default is {json.dumps(info.default)}"


def _advice_on_unknown(model: type[Section], path: Sequence[str]) -> str:
    if model is Experiment and path[-1] in KEYS:
        section, _, key = path[-1].partition(".")
        return f"nest it, as in {section}: {{{key}: ...}}"
    if model is Experiment:
        return nearest(".".join(path), KEYS) if len(path) > 1 else nearest(path[0], [*SECTIONS, *KEYS])
    if path[0] in Experiment.model_fields:
        return "put it under `experiment`"
    return nearest(".".join(path), [*model.model_fields, *known_keys(model)])
