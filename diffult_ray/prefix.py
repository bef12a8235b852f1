"""Where a training or a pool begins: at what is stored of fewer steps, or of another number of images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from diffult_ray import flops
from diffult_ray.stages.training import STATE

if TYPE_CHECKING:
    from diffult_ray.pipeline import Stage
    from diffult_ray.store import Artifact, Store

LENGTH = {"generator": "steps", "images": "per_class"}  # the key that a shorter one differs in


def start(stage: Stage, store: Store) -> Stage | None:
    """What a stage goes on from: a generator from the longest of those that are shorter, a pool from the one
    that lacks least."""
    if stage.name not in LENGTH:
        return None
    key = LENGTH[stage.name]
    found = [s for s, artifact in _stored(stage, store) if _may_begin(stage, s, artifact)]
    enough = [s for s in found if s.config[key] >= stage.config[key]]
    return min(enough, key=lambda s: s.config[key], default=None) or max(
        found, key=lambda s: s.config[key], default=None)


def share(stage: Stage, store: Store) -> float:
    """How much of a stage is stored in what it goes on from."""
    begun = start(stage, store)
    if begun is None:
        return 0.0
    if stage.name == "generator":
        return begun.config["steps"] / stage.config["steps"]
    facts = flops.facts_of(stage.inputs["split"], store)
    there, wanted = (facts.lacking(s.config["per_class"]) for s in (begun, stage))
    return min(1.0, there / wanted) if there and wanted else 0.0


def runs(stages: Sequence[Stage], store: Store) -> Iterator[list[Stage]]:
    """Generators of one family in ascending order, apart where a stored one lies between them."""
    together: dict[str | None, list[Stage]] = {}
    for stage in stages:
        begun = start(stage, store)
        together.setdefault(begun and begun.key, []).append(stage)
    yield from together.values()


def _may_begin(stage: Stage, other: Stage, artifact: Artifact) -> bool:
    """A generator needs the state of its training, and cannot go back; a pool is taken in part."""
    if stage.name == "images":
        return True
    kept = any(entry["name"] == STATE for entry in artifact.manifest["files"])
    return kept and other.config["steps"] < stage.config["steps"]


def _stored(stage: Stage, store: Store) -> Iterator[tuple[Stage, Artifact]]:
    """The same stage of other lengths, as far as it is stored; the key tells that all else is the same."""
    for length in sorted(_lengths(stage.name, store) - {stage.config[LENGTH[stage.name]]}):
        other = replace(stage, config={**stage.config, LENGTH[stage.name]: length})
        artifact = store.look(other)
        if artifact is not None:
            yield other, artifact


def _lengths(name: str, store: Store) -> set[int]:
    """All lengths of stored stages of a name."""
    configs = (manifest.get("config", {}) for _, manifest in store.manifests(name))
    return {config[LENGTH[name]] for config in configs if LENGTH[name] in config}
