"""The axes of a search, and the points of a design."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import Field, model_validator

from diffult_ray.config.keys import KEYS, NOT_SEARCHED, nearest
from diffult_ray.config.refusal import Source, validate
from diffult_ray.config.section import Float, Rule, Section
from diffult_ray.errors import BadInput

KINDS = ("grid", "choice", "uniform", "loguniform")


class Axis(Section):
    """How one dotted key is searched: exactly one of the four."""

    grid: tuple[Any, ...] | None = Field(None, description="write a list of values")
    choice: tuple[Any, ...] | None = Field(None, description="write a list of values")
    uniform: tuple[Float, Float] | None = Field(None, description="write [low, high]")
    loguniform: tuple[Float, Float] | None = Field(None, description="write [low, high]")

    @model_validator(mode="after")
    def _one_kind(self) -> Axis:
        kinds = [k for k in KINDS if getattr(self, k) is not None]
        if len(kinds) != 1:
            raise Rule(
                "must have exactly one of grid, choice, uniform, loguniform", value=kinds,
                advice="as in {grid: [1, 2]}",
            )
        return self

    @model_validator(mode="after")
    def _has_values(self) -> Axis:
        values = self.values
        if self.kind in ("grid", "choice"):
            if not values:
                raise Rule("must not be empty", self.kind, value=[], advice="give at least one value")
            if len({repr(v) for v in values}) < len(values):
                raise Rule("must not hold a value twice", self.kind, value=list(values), advice="take it out")
        elif not values[0] < values[1]:
            raise Rule("must be [low, high] with low below high", self.kind, value=list(values))
        elif self.kind == "loguniform" and values[0] <= 0:
            raise Rule("must start above 0", self.kind, value=list(values), advice="or take uniform")
        return self

    @property
    def kind(self) -> str:
        return next(k for k in KINDS if getattr(self, k) is not None)

    @property
    def values(self) -> tuple[Any, ...]:
        return getattr(self, self.kind)

    def draw(self, rng: random.Random) -> Any:
        if self.choice is not None:
            return rng.choice(self.choice)
        low, high = self.values
        if self.uniform is not None:
            return rng.uniform(low, high)
        return min(max(math.exp(rng.uniform(math.log(low), math.log(high))), low), high)


@dataclass
class Design:
    """One mapping of `search`: at each point of the product of its grids, draws of its random axes."""

    grids: list[list[dict[str, Any]]] = field(default_factory=list)
    drawn: dict[str, Axis] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)  # searched key -> where its axis is

    def claim(self, key: str, place: str, source: Source) -> None:
        """Take a key for an axis."""
        if key not in KEYS:
            raise BadInput(where=source.place([place]), rule="no such key", advice=nearest(key, KEYS))
        if NOT_SEARCHED.fullmatch(key):
            raise BadInput(
                where=source.place([place]), rule="makes no other trial, so it cannot be searched",
                advice="set it under `experiment`",
            )
        if key in self.places:
            raise BadInput(
                where=source.place([place]), rule=f"a second axis of one key, beside {self.places[key]}",
                advice="take one of the two out",
            )
        self.places[key] = place

    def add_axis(self, key: str, spec: Any, place: str, source: Source) -> None:
        self.claim(key, place, source)
        axis = validate(Axis, spec, source, place)
        if axis.kind == "grid":
            self.grids.append([{key: value} for value in axis.values])
        else:
            self.drawn[key] = axis

    def add_zip(self, group: Any, place: str, source: Source) -> None:
        """Keys whose values move together."""
        lists = list(group.values()) if isinstance(group, Mapping) else []
        lengths = {len(v) if isinstance(v, list) else 0 for v in lists}
        if len(lengths) != 1 or 0 in lengths:
            raise BadInput(
                where=source.place([place]), rule="must be a mapping of keys to lists of one length",
                value=group, advice="as in zip: {generator.steps: [10, 20], generator.seed: [0, 1]}",
            )
        for key in group:
            self.claim(key, f"{place}.{key}", source)
        self.grids.append([dict(zip(group, row, strict=True)) for row in zip(*lists, strict=True)])

    def points(self, samples: int, seed: int) -> Iterator[dict[str, Any]]:
        """Every point as {dotted key: value}; the n-th draw is the same however many there are."""
        draws = [
            {k: a.draw(random.Random(f"{seed}/{k}/{n}")) for k, a in self.drawn.items()}
            for n in range(samples if self.drawn else 1)
        ]
        for parts in itertools.product(*self.grids, draws):
            yield {key: value for part in parts for key, value in part.items()}

    def edges(self) -> Iterator[dict[str, Any]]:
        """Points that are no trials, but have to be allowed: the values and bounds of random axes."""
        for key, axis in self.drawn.items():
            for value in axis.values:
                others = {k: a.values[0] for k, a in self.drawn.items()}
                yield {**{k: v for grid in self.grids for k, v in grid[0].items()}, **others, key: value}


def design_of(spec: Mapping[str, Any], at: str, source: Source) -> Design:
    design = Design()
    for key, value in spec.items():
        place = f"{at}.{key}"
        if key != "zip":
            design.add_axis(key, value, place, source)
        elif isinstance(value, list) and value:
            for number, group in enumerate(value):
                design.add_zip(group, f"{place}[{number}]", source)
        else:
            design.add_zip(value, place, source)
    return design
