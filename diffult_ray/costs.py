"""What a plan will take, from the seconds of like stages in the store, and what sharing saves.

Alike are stages of one name, network, batch and kind of images; their seconds scale with the steps,
or with images times sampling steps. A stage that is like no stored one is unknown, and said to be.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from diffult_ray.store import resources_of

if TYPE_CHECKING:
    from diffult_ray.config import Price
    from diffult_ray.pipeline import Stage
    from diffult_ray.plan import Plan
    from diffult_ray.store import Store

TRAINING = ("architecture", "batch_size", "augmentation", "precision")
UNET = ("channels", "blocks", "attention", "batch_size", "precision", "objective")


@dataclass(frozen=True, eq=False)
class Node:
    """A stored artifact in the form of a stage."""

    name: str
    key: str
    config: Mapping[str, Any]
    inputs: Mapping[str, Node]
    manifest: Mapping[str, Any]


@dataclass(frozen=True)
class Estimate:
    """Seconds that a stage takes from nothing, None if unknown, and how that is known."""

    seconds: float | None
    basis: str


@dataclass
class Total:
    """Sums over stages: of the known ones, and how many are unknown."""

    seconds: float = 0.0
    gpu_hours: float = 0.0
    cpu_hours: float = 0.0
    unknown: int = 0

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


@dataclass
class Costs:
    """Estimates for the stages of a plan.

    Raises:
        BadInput: if a newer version wrote an artifact of the store.
    """

    plan: Plan
    store: Store
    _made: dict[str, Estimate] = field(default_factory=dict)
    _told: dict[Any, tuple[float, str] | None] = field(default_factory=dict)

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
        alike = None if units is None else self._rate(shape(stage), resources_of(stage))
        if alike is None:
            return Estimate(None, f"no {stage.name} like it in the store")
        return Estimate(alike[0] * units, alike[1])

    def _rate(self, kind: str, resources: Mapping[str, float]) -> tuple[float, str] | None:
        """Seconds a unit of the stored stages of a shape, of those on the same resources if there are any."""
        told = kind, tuple(resources.values())
        if told not in self._told:
            alike = self._rates.get(kind, [])
            same = [(rate, node) for rate, node in alike if node.manifest.get("resources") == resources]
            chosen, where = (same, "") if same else (alike, " on other resources")
            named = f"{chosen[0][1].name} {chosen[0][1].key[:8]}" if len(chosen) == 1 else (
                f"{len(chosen)} like stages")
            rate = statistics.median(rate for rate, _ in chosen) if chosen else None
            self._told[told] = None if rate is None else (rate, f"from {named}{where}")
        return self._told[told]

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
            total.add(stage, self.left(stage, (done or {}).get(stage.key, 0.0)))
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
    def _rates(self) -> dict[str, list[tuple[float, Node]]]:
        """Shape -> (seconds a unit, artifact) of each stored artifact of it."""
        rates: dict[str, list[tuple[float, Node]]] = {}
        for node in self._nodes.values():
            try:
                units, kind = self._units(node), shape(node)
            except KeyError:  # of a version with other keys
                continue
            if units and node.manifest["seconds"] > 0:
                rates.setdefault(kind, []).append((node.manifest["seconds"] / units, node))
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
        """How many images a pool has, or will have; None before its split is stored."""
        if isinstance(node, Node):
            return node.manifest["summary"].get("made_now", node.manifest["summary"].get("images"))
        try:
            counts = self.store.read_json(node.inputs["split"], "split.json")["class_counts"]
        except (OSError, ValueError, KeyError):
            return None
        return sum(max(0, node.config["per_class"] - n) for n in counts)


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
