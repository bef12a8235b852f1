"""What a plan will take, from the seconds of like stages in the store, and what sharing saves.

Alike are stages of one name, network, batch and kind of images; their seconds scale with the steps,
or with images times sampling steps. A stage that is like no stored one is estimated from its FLOPs, at
the rate that a stored one of a similar size reached, or that is measured here.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from diffult_ray import flops
from diffult_ray.progress import si
from diffult_ray.store import resources_of

if TYPE_CHECKING:
    from diffult_ray.config import Price
    from diffult_ray.pipeline import Stage
    from diffult_ray.plan import Plan
    from diffult_ray.store import Store

TRAINING = ("architecture", "batch_size", "augmentation", "precision")
UNET = ("channels", "blocks", "attention", "batch_size", "precision", "objective", "regulariser")
GROUPS = {  # stages whose networks reach alike many FLOPs a second
    "extractor": "classifier", "reference": "classifier", "classifier": "classifier", "scores": "scores",
    "generator": "generator", "images": "sampling", "quality": "sampling",
}
SIMILAR = 8.0  # by how much the FLOPs of two networks may differ
START = {"classifier": 1.0, "split": 0.0}  # seconds before the work begins, where none is stored
OTHERS_START = 9.0  # of other processes, on two cores


@dataclass(frozen=True, eq=False)
class Node:
    """A stored artifact in the form of a stage."""

    name: str
    key: str
    config: Mapping[str, Any]
    inputs: Mapping[str, Node]
    manifest: Mapping[str, Any]

    @property
    def label(self) -> str:
        return f"{self.name} {self.key[:8]}"


@dataclass(frozen=True)
class Estimate:
    """Seconds that a stage takes from nothing, None if unknown, how that is known, and if not, its FLOPs."""

    seconds: float | None
    basis: str
    flops: float = 0.0


@dataclass
class Total:
    """Sums over stages: of the known ones, and how many are unknown, and their FLOPs."""

    seconds: float = 0.0
    gpu_hours: float = 0.0
    cpu_hours: float = 0.0
    unknown: int = 0
    flops: float = 0.0

    def add(self, stage: Stage, seconds: float | None) -> None:
        if seconds is None:
            self.unknown += 1
            return
        held = resources_of(stage)
        self.seconds += seconds
        self.gpu_hours += seconds * held["workers"] * held["gpus"] / 3600
        self.cpu_hours += seconds * held["workers"] * held["cpus"] / 3600

    def price(self, price: Price) -> float | None:
        """What it costs; None without the prices that it needs."""
        if (price.gpu_hour is None and self.gpu_hours > 0) or price.gpu_hour is price.cpu_hour is None:
            return None
        return self.gpu_hours * (price.gpu_hour or 0.0) + self.cpu_hours * (price.cpu_hour or 0.0)


@dataclass(frozen=True)
class Rate:
    """What a stored stage took: seconds for its start and its end, and for each unit of its work."""

    fixed: float
    unit: float
    node: Node


@dataclass
class Costs:
    """Estimates for the stages of a plan.

    Args:
        counted: whether a stage that is like no stored one is estimated from its FLOPs; else it is unknown.

    Raises:
        BadInput: if a newer version wrote an artifact of the store.
    """

    plan: Plan
    store: Store
    counted: bool = False
    _made: dict[str, Estimate] = field(default_factory=dict)
    _told: dict[Any, tuple[float, float, str] | None] = field(default_factory=dict)

    def of(self, stage: Stage) -> Estimate:
        if stage.key not in self._made:
            self._made[stage.key] = self._of(stage)
        return self._made[stage.key]

    def _of(self, stage: Stage) -> Estimate:
        own = self._nodes.get(stage.key)
        if own is not None:
            return Estimate(own.manifest["seconds"], "measured")
        units = self._units(stage)
        if units == 0:
            return Estimate(0.0, "nothing to make")
        known = None if units is None else self._known(stage)
        if known is None:
            basis = f"no {stage.name} like it in the store"
            work = self._work(stage) if self.counted and units is not None else None
            if work is None:
                return Estimate(None, basis)
            flops = work.flops * units
            return Estimate(None, f"{basis} and no GPU here to try it on; {si(flops)}FLOP", flops)
        fixed, unit, basis = known
        return Estimate(fixed + unit * units, basis)

    def _known(self, stage: Stage) -> tuple[float, float, str] | None:
        """Seconds of the start and of a unit, and their basis."""
        kind, resources = shape(stage), resources_of(stage)
        told = kind, tuple(resources.values())
        if told not in self._told:
            alike = self._rates.get(kind, [])
            from_flops = self._from_flops(stage) if self.counted and not alike else None
            self._told[told] = _alike(alike, resources) if alike else from_flops
        return self._told[told]

    def _from_flops(self, stage: Stage) -> tuple[float, float, str] | None:
        """The same from FLOPs, at the rate of a stored stage of a similar size, or one measured here."""
        work, resources = self._work(stage), resources_of(stage)
        if work is None:
            return None
        known = self._nearest(stage, work)
        reached = None if known is not None and known[1] < SIMILAR else flops.here(work, resources)
        if reached is not None:
            fixed, how = START.get(stage.name, OTHERS_START), "measured here"
        elif known is not None:
            rate, _, reached = known
            fixed, how = rate.fixed, f"as {rate.node.label} reached"
        else:
            return None
        a_second = f"{si(work.forward)}FLOP an image at {si(reached)}FLOP/s"
        return fixed, work.flops / reached, f"from {a_second}, {how}"

    def _nearest(self, stage: Stage, work: flops.Work) -> tuple[Rate, float, float] | None:
        """A stored stage on the same resources, how far its network's size is off, and its FLOPs a second."""
        found = []
        for rates in self._rates.values():
            rate = min(rates, key=lambda r: abs(r.unit - _median(rates)[1]))
            same = rate.node.manifest.get("resources") == resources_of(stage)
            other = self._work(rate.node) if same and _group(rate.node) == _group(stage) else None
            if other is not None:
                off = abs(math.log(other.forward / work.forward))
                found.append((rate, math.exp(off), other.flops / rate.unit))
        return min(found, key=lambda f: (f[1], f[0].node.name != stage.name), default=None)

    def _work(self, node: Stage | Node) -> flops.Work | None:
        split = node.inputs.get("split")
        return None if split is None else flops.work_of(node, flops.facts_of(split, self.store))

    def add(self, manifest: Mapping[str, Any]) -> None:
        """Take in an artifact that was stored after the others were read."""
        rates, key = self._rates, manifest["key"]
        if key not in self._nodes:
            node = _node(key, {key: manifest}, self._nodes)
            if node is not None:
                _add_rate(rates, node, self._units(node))
        self._made.clear()
        self._told.clear()

    def left(self, stage: Stage, done: float) -> float | None:
        """Seconds until a stage that is partly built is whole."""
        seconds = self.of(stage).seconds
        return None if seconds is None else seconds * (1 - done)

    def total(self, stages: Iterable[Stage], done: Mapping[str, float] | None = None) -> Total:
        """Of distinct stages, of which those of a family come with the longest of them."""
        longest: dict[str, Stage] = {}
        for stage in stages:
            other = longest.get(stage.family)
            if other is None or stage.config["steps"] > other.config["steps"]:
                longest[stage.family] = stage
        total = Total()
        for stage in longest.values():
            far = (done or {}).get(stage.key, 0.0)
            total.add(stage, self.left(stage, far))
            total.flops += self.of(stage).flops * (1 - far)
        return total

    @cached_property
    def alone(self) -> Total:
        """Each trial with everything before it, built for itself."""
        total = Total()
        for trial in self.plan.trials:
            for stage in (*trial.upstream, trial.stage):
                total.add(stage, self.of(stage).seconds)
        return total

    @cached_property
    def shared(self) -> Total:
        """Every distinct stage once."""
        return self.total([*self.plan.stages, *(t.stage for t in self.plan.trials)])

    # --- what is known ---

    @cached_property
    def _nodes(self) -> dict[str, Node]:
        """Every stored artifact whose inputs are stored as well, by key."""
        manifests = dict(self.store.manifests())
        nodes: dict[str, Node] = {}
        for key in manifests:
            _node(key, manifests, nodes)
        return nodes

    @cached_property
    def _rates(self) -> dict[str, list[Rate]]:
        """Shape -> what each stored artifact of it took."""
        rates: dict[str, list[Rate]] = {}
        for node in self._nodes.values():
            with suppress(KeyError):  # of a version with other keys
                _add_rate(rates, node, self._units(node))
        return rates

    def _units(self, node: Stage | Node) -> float | None:
        """How much work there is in a stage, in units of its own; None if that cannot be told yet."""
        config = node.config
        if node.name in ("extractor", "reference", "classifier"):
            return config["steps"] or config["epochs"]
        if node.name == "generator":
            return config["steps"]
        if node.name == "quality":
            return config["images"] * config["generation"]["steps"]
        if node.name == "images":
            count = self._images(node)
            return None if count is None else count * config["steps"]
        return self._images(node.inputs["images"]) if node.name == "scores" else 1

    def _images(self, node: Stage | Node) -> int | None:
        """How many images a pool has, or will have; None before a split of unknown size is stored."""
        if isinstance(node, Node):
            return node.manifest["summary"].get("made_now", node.manifest["summary"].get("images"))
        return flops.facts_of(node.inputs["split"], self.store).lacking(node.config["per_class"])


def _add_rate(rates: dict[str, list[Rate]], node: Node, units: float | None) -> None:
    """A training's seconds scale with its steps but for its start and its end."""
    seconds = node.manifest["seconds"]
    loop = node.manifest["summary"].get("train_seconds") or seconds
    if units and seconds > 0:
        rates.setdefault(shape(node), []).append(Rate(max(0.0, seconds - loop), loop / units, node))


def _median(rates: Sequence[Rate]) -> tuple[float, float]:
    return statistics.median(r.fixed for r in rates), statistics.median(r.unit for r in rates)


def _alike(rates: Sequence[Rate], resources: Mapping[str, float]) -> tuple[float, float, str]:
    """Of stored stages of one shape: those on the same resources if there are any."""
    same = [r for r in rates if r.node.manifest.get("resources") == resources]
    chosen, where = (same, "") if same else (rates, " on other resources")
    named = chosen[0].node.label if len(chosen) == 1 else f"{len(chosen)} like stages"
    return *_median(chosen), f"from {named}{where}"


def _group(node: Stage | Node) -> str | None:
    return GROUPS.get(node.name)


def _node(key: str, manifests: Mapping[str, Any], nodes: dict[str, Node]) -> Node | None:
    if key in nodes or key not in manifests:
        return nodes.get(key)
    manifest = manifests[key]
    inputs = {name: _node(k, manifests, nodes) for name, k in manifest["inputs"].items()}
    if None in inputs.values():
        return None
    nodes[key] = Node(manifest["stage"], key, manifest["config"], inputs, manifest)
    return nodes[key]


def shape(node: Stage | Node) -> str:
    """The same for stages whose seconds a unit are alike."""
    return json.dumps([node.name, *_shape(node)], default=list)


def _shape(node: Any) -> Sequence[Any]:
    config, inputs = node.config, node.inputs
    if node.name == "split":
        return [config.get("content"), config["name"]]
    kind = [inputs["split"].config.get(k) for k in ("name", "image_size", "channels")]
    if node.name in ("extractor", "reference", "classifier"):
        per_epoch = [] if config["steps"] else [_of_an_epoch(node)]
        return [*kind, *(config.get(k) for k in TRAINING), *per_epoch]
    if node.name == "generator":
        return [*kind, *(config.get(k) for k in UNET), config.get("aid_weight", 0) > 0]
    if node.name == "images":
        return [*_shape(inputs["generator"]), config["sampler"], config["guidance"] > 0]
    if node.name == "quality":
        sampler, guided = config["generation"]["sampler"], config["generation"]["guidance"] > 0
        return [*_shape(inputs["generator"]), config["network"], sampler, guided]
    if node.name == "scores":
        return [*kind, inputs["extractor"].config["architecture"]]
    return kind


def _of_an_epoch(node: Any) -> Any:
    """How long an epoch is: by the split, and the images that are added to it."""
    scores = node.inputs.get("scores")
    added = scores.inputs["images"].config["per_class"] if scores is not None else None
    return [node.inputs["split"].key, added, node.config.get("per_class")]
