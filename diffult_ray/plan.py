"""The distinct stages and trials of a sweep: what is stored, and what is to build."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from diffult_ray import config, pipeline, prefix
from diffult_ray.config import Experiment, Sweep
from diffult_ray.pipeline import Stage
from diffult_ray.progress import clock, si

if TYPE_CHECKING:
    from diffult_ray.costs import Costs, Total
    from diffult_ray.store import Store

SEEDS = ("seed", "dataset.seed", "extractor.seed", "generator.seed", "generation.seed", "classifier.seed")


@dataclass(frozen=True)
class Trial:
    """One classifier to train: its experiment and the point of the sweep that it stands for."""

    experiment: Experiment
    point: Mapping[str, Any]  # searched dotted key -> value, None where the method does not use it

    @cached_property
    def stage(self) -> Stage:
        return pipeline.classifier(self.experiment)

    @property
    def key(self) -> str:
        return self.stage.key

    @cached_property
    def upstream(self) -> list[Stage]:
        """What is built before the classifier, inputs first."""
        return [s for s in pipeline.stages(self.experiment) if s.key != self.key]

    @property
    def quality(self) -> str | None:
        """The key of what measures its generator, which is in no other key of the trial."""
        return next((s.key for s in self.upstream if s.name == "quality"), None)

    @cached_property
    def name(self) -> str:
        """The method, and whether synthetic images are added to what it is by itself."""
        return config.variant(self.experiment.method, self.experiment.synthetic)

    @cached_property
    def cell(self) -> str:
        """The same for trials that differ in seeds only."""
        setting = {k: str(v) for k, v in self.point.items() if k not in SEEDS}
        text = json.dumps([self.name, setting], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def title(self) -> str:
        """How the trial reads in a line: its method and the last parts of its other searched keys."""
        shown = {k: v for k, v in self.point.items() if v is not None and k not in config.NAMED}
        return " ".join([self.name, *(f"{k.rpartition('.')[2]}={_short(v)}" for k, v in shown.items())])


@dataclass(frozen=True)
class Plan:
    """Distinct trials, in the order of the sweep file, and the distinct stages before them."""

    sweep: Sweep
    trials: tuple[Trial, ...]

    @cached_property
    def stages(self) -> list[Stage]:
        return list({s.key: s for t in self.trials for s in t.upstream}.values())

    @cached_property
    def uses(self) -> Counter[str]:
        """How many trials use each stage's artifact."""
        return Counter(s.key for t in self.trials for s in t.upstream)

    @property
    def searched(self) -> list[str]:
        return config.searched(self.sweep)

    @cached_property
    def id(self) -> str:
        """The same for sweeps of one name with the same trials."""
        text = json.dumps([self.sweep.name, sorted(t.key for t in self.trials)])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def make_plan(sweep: Sweep) -> Plan:
    """Every distinct trial of a sweep; points that collapse to the same trial are one."""
    trials: dict[str, Trial] = {}
    keys = config.searched(sweep)
    for experiment in config.experiments(sweep):
        point = {k: experiment.at(k) if pipeline.applies(k, experiment) else None for k in keys}
        trial = Trial(experiment, point)
        trials.setdefault(trial.key, trial)
    return Plan(sweep, tuple(trials.values()))


def describe(plan: Plan, store: Store) -> list[tuple[Stage, str, int]]:
    """(stage, 'stored' | 'partly built' | 'to build', trials that use it) for every stage and trial."""
    rows = []
    for stage in [*plan.stages, *(t.stage for t in plan.trials)]:
        rows.append((stage, _status(stage, store), plan.uses.get(stage.key, 1)))
    return rows


def _status(stage: Stage, store: Store) -> str:
    if store.look(stage):
        return "stored"
    begun = store.has_work(stage) or prefix.start(stage, store) is not None
    return "partly built" if begun else "to build"


def progress(stage: Stage, store: Store) -> float:
    """The share of a partly built stage that is done, as it last told, or as it is stored."""
    return max(_told(stage, store), prefix.share(stage, store))


def _told(stage: Stage, store: Store) -> float:
    found = store.progress(stage) or {"done": 0, "total": 0}
    done, total = found["done"], found["total"]
    if stage.name == "generator":
        total = stage.config["steps"]  # of its family's work, which may be on the way to more
    return min(1.0, done / total) if total else 0.0


def text(plan: Plan, store: Store) -> Iterator[str]:
    """What `--plan` prints: each distinct stage, the trials, what is left to do and what sharing saves.

    Raises:
        BadInput: if a newer version wrote an artifact of the store.
    """
    from diffult_ray.costs import Costs

    costs, rows = Costs(plan, store, counted=True), describe(plan, store)
    done = {s.key: progress(s, store) for s, status, _ in rows if status == "partly built"}
    yield f"sweep {plan.sweep.name}: {len(plan.trials)} trials, {len(plan.stages)} stages before them"
    for stage, status, uses in rows[: len(plan.stages)]:
        far = f"{status}, {done[stage.key]:.0%}" if stage.key in done else status
        estimate = costs.of(stage)
        took = "" if status == "stored" else "about "
        told = "unknown" if estimate.seconds is None else f"{took}{clock(estimate.seconds)}"
        yield (f"  {stage.name:<10} {stage.key}  {far:<17}  used by {uses} trials  {told}, {estimate.basis}")
    for status in ("stored", "partly built", "to build"):
        trials = [s for s, found, _ in rows[len(plan.stages) :] if found == status]
        told = f", {figures(plan, costs.total(trials))}" if trials and status != "stored" else ""
        yield f"  trials {status}: {len(trials)}{told}"
    left = [s for s, status, _ in rows if status != "stored"]
    total = costs.total(left, done)
    yield f"left to do: {figures(plan, total)}"
    yield from _budget(plan, total)
    yield _saved(costs)


def figures(plan: Plan, total: Total) -> str:
    """Seconds, hours and cost of stages one after another; side by side they end earlier."""
    flops = f", {si(total.flops)}FLOP" if total.flops else ""
    if total.unknown and not total.seconds:
        return f"unknown, nothing like it is stored{flops}"
    parts = [f"about {clock(total.seconds)} of work"]
    parts += [f"{total.gpu_hours:.2f} GPU-hours"] if total.gpu_hours else []
    parts += [f"{total.cpu_hours:.2f} CPU-hours"]
    cost = total.price(plan.sweep.price)
    parts += [f"cost {cost:.2f}"] if cost is not None else []
    parts += [f"and {total.unknown} stages of which no time is known{flops}"] if total.unknown else []
    return ", ".join(parts)


def _budget(plan: Plan, total: Total) -> Iterator[str]:
    """Each limit of the sweep beside what is left to do; of wall time, as if nothing ran side by side."""
    amounts = {
        "hours": ("hours", total.seconds / 3600), "gpu_hours": ("GPU-hours", total.gpu_hours),
        "cost": ("of cost", total.price(plan.sweep.price)),
    }
    for key, limit in plan.sweep.tune.budget.limits.items():
        unit, amount = amounts[key]
        share = "" if not amount else f", of about {amount:.3g} that are left to do"
        yield f"budget: {limit:g} {unit}{share}"


def _saved(costs: Costs) -> str:
    alone, shared = costs.alone, costs.shared
    if not alone.seconds:
        return "sharing saves: unknown, nothing like these stages is stored"
    known = " where stages are known" if alone.unknown else ""
    return (
        f"sharing saves about {clock(alone.seconds - shared.seconds)}{known}: {clock(alone.seconds)} if each "
        f"trial built its own stages, {clock(shared.seconds)} as each is built once"
    )


def _short(value: Any) -> str:
    if isinstance(value, tuple):
        return "+".join(map(_short, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
