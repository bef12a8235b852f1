"""A sweep, and the experiment at every point of its search."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

from pydantic import Field, PrivateAttr, ValidationError, model_validator

from diffult_ray.config.experiment import Experiment, Method, has_synthetic, seeded
from diffult_ray.config.keys import KEYS, SECTIONS, nearest, with_key
from diffult_ray.config.refusal import Source, broken_rule, refusal, validate
from diffult_ray.config.search import Design, design_of
from diffult_ray.config.section import Float, Int, Rule, Section, Seed
from diffult_ray.sweepfile import design_place

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}(/[A-Za-z0-9][A-Za-z0-9_.-]{0,99})*")


class Budget(Section):
    """What one command may spend. It then starts nothing more, and what runs is let to end."""

    hours: Float | None = Field(None, gt=0)  # of wall time
    gpu_hours: Float | None = Field(None, gt=0)  # of the GPUs that its stages and trials hold
    cost: Float | None = Field(None, gt=0)  # of these and their CPUs, by `price`

    @property
    def limits(self) -> dict[str, float]:
        return {k: v for k, v in self if v is not None}


class Tune(Section):
    samples: Int = Field(1, ge=1)  # draws of the uniform, loguniform and choice axes
    concurrency: Int | None = Field(None, ge=1)  # trials at a time; None: what fits the cluster
    seed: Seed = 0
    budget: Budget = Budget()


class Tracking(Section):
    enabled: bool = True
    uri: str | None = None  # None: sqlite in the storage folder


class Price(Section):
    """What an hour costs, for the estimate of `--plan`, in whatever money."""

    gpu_hour: Float | None = Field(None, ge=0)  # of one GPU, with the processors beside it if they are free
    cpu_hour: Float | None = Field(None, ge=0)  # of one CPU


Measure = Literal[
    "accuracy", "balanced_accuracy", "accuracy_many", "accuracy_medium", "accuracy_few", "generated", "kept",
    "p_id", "p_aid", "p_ood", "fid", "inception_score",
]


class Expected(Section):
    """A number to set beside the sweep's own: what was measured of which cell, and who says so.

    Without `where` it belongs to no cell that can be run here, such as a method that is only cited.
    """

    where: dict[str, Any] | None = Field(
        None, description="dotted keys and their values, as in where: {generator.tau: 1}"
    )
    label: str | None = Field(None, description="the name of the row; needed without `where`")
    measure: Measure = "accuracy"
    value: Float = Field(description="as the measure is shown: accuracies and shares in percent")
    # reported: by the paper; secondary: readers of it; code: public code; ours: measured here
    standing: Literal["reported", "secondary", "code", "ours"]
    source: str = Field(min_length=1, description="say where the number is from, and on which set")

    @model_validator(mode="after")
    def _is_of_something(self) -> Expected:
        if not self.where and not self.label:
            raise Rule("is needed without `label`", "where", value=self.where, advice="name the cell's keys")
        for key in self.where or {}:
            if key not in KEYS:
                raise Rule("names no such key", "where", value=key, advice=nearest(key, KEYS))
        return self


class Sweep(Section):
    """A sweep file. `search` is one design, or a list of designs whose trials are joined."""

    name: str = Field(description="write text; a number in quotes")
    description: str = Field("", description="write text; a number in quotes")
    experiment: dict[str, Any] = Field({}, description="as in experiment: {seed: 0}")
    search: tuple[dict[str, Any], ...] = Field((), description="write a mapping of dotted keys to axes")
    baselines: tuple[Method, ...] = Field((), description="write a list of methods, as in [ce, oversample]")
    tune: Tune = Tune()
    tracking: Tracking = Tracking()
    price: Price = Price()
    expected: tuple[Expected, ...] = Field((), description="write a list of rows, as in the shipped sweeps")
    differs: tuple[str, ...] = Field((), description="why results do not compare with `expected`, in words")
    _source: Source = PrivateAttr(default_factory=Source)

    @model_validator(mode="before")
    @classmethod
    def _one_is_a_list_of_one(cls, values: Any) -> Any:
        for key, kind in (("search", Mapping), ("differs", str)):
            if isinstance(values, Mapping) and isinstance(values.get(key), kind):
                values = {**values, key: (values[key],)}
        return values

    @model_validator(mode="after")
    def _has_a_name(self) -> Sweep:
        if not NAME.fullmatch(self.name):
            raise Rule(
                "must be letters, digits, '-', '_' and '.', in parts joined by '/'", "name",
                value=self.name, advice="as in digits/weights",
            )
        return self

    @cached_property
    def cells(self) -> list[Experiment]:
        """The experiment at every point of the search, checked; equal sections are one object."""
        return list(_cells(self))

    @cached_property
    def designs(self) -> list[Design]:
        """`search`, checked; without one, a design of one point."""
        return [
            design_of(spec, design_place(number, len(self.search)), self._source)
            for number, spec in enumerate(self.search or ({},))
        ]


def _check_unsearched(sweep: Sweep) -> None:
    """Refuse a value that is wrong by itself, though the search should set another at every point."""
    try:
        Experiment.model_validate(sweep.experiment)
    except ValidationError as error:
        for each in error.errors():
            broken = broken_rule(each)
            if broken is None or not broken.keys:
                raise refusal(each, Experiment, sweep._source, "experiment") from None


def _cells(sweep: Sweep) -> Iterator[Experiment]:
    _check_unsearched(sweep)
    made: dict[Any, Section] = {}
    for design in sweep.designs:
        axes = {f"experiment.{key}": place for key, place in design.places.items()}
        source = replace(sweep._source, axes=axes)
        for point in design.edges():
            _experiment(sweep, point, source, made)
        for point in design.points(sweep.tune.samples, sweep.tune.seed):
            yield _experiment(sweep, point, source, made)


def _experiment(sweep: Sweep, point: Mapping[str, Any], source: Source, made: dict) -> Experiment:
    values: dict[str, Any] = sweep.experiment
    for key, value in point.items():
        values = with_key(values, key, value)
    try:
        return _assembled(values, made)
    except ValidationError:  # told by the whole, where the keys are whole and in order
        return validate(Experiment, values, source, "experiment")


def _assembled(values: Mapping[str, Any], made: dict[Any, Section]) -> Experiment:
    """An experiment of sections from `made`: pydantic takes what is validated as it is."""
    values = seeded(values)
    sections = {}
    for name, kind in SECTIONS.items():
        raw = values.get(name, {})
        key = kind, repr(raw)
        if key not in made:
            made[key] = kind.model_validate(raw)
        sections[name] = made[key]
    return Experiment.model_validate({**values, **sections})


def experiments(sweep: Sweep) -> Iterator[Experiment]:
    """The experiment of every cell of a sweep, baselines first.

    A baseline is on D alone. It is asked for at each point, and collapses to one trial wherever the
    searched keys do not touch its stages: the caller keeps one a distinct key.
    """
    for method in sweep.baselines:
        for cell in sweep.cells:
            yield cell.model_copy(update={"method": method, "synthetic": has_synthetic(method)})
    yield from sweep.cells


def first(sweep: Sweep) -> Experiment:
    """The experiment of the first cell, without those of the others. Raises BadInput if it is none."""
    return next(_cells(sweep))


def searched(sweep: Sweep) -> list[str]:
    """The dotted keys that vary, in the order of the file."""
    return list(dict.fromkeys(key for design in sweep.designs for key in design.places))


def has_value(e: Experiment, key: str, value: Any) -> bool:
    """Whether a dotted key has a value, as the configuration reads it: 1 is 1.0, null no threshold."""
    name, _, inner = key.partition(".")
    if not inner:
        return getattr(e, name) == value
    section = getattr(e, name)
    try:
        return type(section).model_validate(with_key(section.model_dump(), inner, value)) == section
    except ValidationError:
        return False
