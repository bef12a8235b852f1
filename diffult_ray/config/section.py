"""What sections of the configuration are made of: strict numbers, rules, and what is frozen."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from diffult_ray.errors import UNTOLD


class Rule(ValueError):
    """A rule that pydantic does not know, for the keys of a section that it is about.

    Args:
        rule: what must hold.
        keys: the keys to point at, in the section that is validated; the first one, unless another was
            searched or overridden.
        value: what was received.
        advice: what to do.
    """

    def __init__(self, rule: str, *keys: str, value: object = UNTOLD, advice: str = "") -> None:
        super().__init__(rule)
        self.keys, self.value, self.advice = keys, value, advice


def _no_bool(value: object) -> object:
    if isinstance(value, bool):
        raise Rule("must be a number, not true or false", value=value)
    return value


def _number(value: object) -> object:
    """YAML has no plain `inf`, and says null for none; a string of digits is a number already."""
    if isinstance(value, str):
        return math.inf if value.lower() in ("none", "inf", ".inf") else value
    return _no_bool(value)


Int = Annotated[int, BeforeValidator(_no_bool)]
Float = Annotated[float, Field(allow_inf_nan=False), BeforeValidator(_number)]
Threshold = Annotated[float, Field(ge=0, allow_inf_nan=True), BeforeValidator(_number)]
Seed = Annotated[
    int, Field(ge=0, lt=2**32, description="any whole number below 2**32"), BeforeValidator(_no_bool)
]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), ser_json_inf_nan="constants"
    )
