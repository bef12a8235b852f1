"""The machines of a cluster at its largest: of the running one, a launcher file or a KubeRay manifest."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from diffult_ray.errors import BadInput

PRICES = "diffult/price-per-hour"  # annotation of a manifest; in a launcher file, `metadata.price_per_hour`
UNITS = {"cpus": "CPUs", "gpus": "GPUs"}


@dataclass(frozen=True)
class Kind:
    """Machines that are alike. A price is of an hour of one."""

    name: str
    count: int
    cpus: float
    gpus: float
    is_head: bool = False
    price: float | None = None

    def places(self, cpus: float, gpus: float) -> int:
        """Workers of that size that one machine holds."""
        fits = [int(there / asked + 1e-9) for there, asked in ((self.cpus, cpus), (self.gpus, gpus)) if asked]
        return min(fits, default=0)


@dataclass(frozen=True)
class Fleet:
    """All kinds. No more than `limit` machines beside the head are ever up together."""

    kinds: tuple[Kind, ...]
    limit: int | None = None

    def largest(self, size: Any) -> list[Kind]:
        """The kinds, each with the count it has where `size` of the whole is largest."""
        left = sum(k.count for k in self.kinds) if self.limit is None else self.limit
        chosen = []
        for kind in sorted(self.kinds, key=lambda k: (k.is_head, size(k)), reverse=True):
            count = kind.count if kind.is_head else min(kind.count, left)
            left -= 0 if kind.is_head else count
            chosen.append(replace(kind, count=count))
        return [k for k in chosen if k.count and (size(k) or k.is_head)]

    def total(self, unit: str) -> float:
        """CPUs or GPUs at most."""
        return sum(k.count * getattr(k, unit) for k in self.largest(lambda k: getattr(k, unit)))

    def shown(self, unit: str) -> str:
        """The sum behind `total`.

        >>> Fleet((Kind("head", 1, 0, 0, is_head=True), Kind("node", 4, 8, 1)), limit=2).shown("cpus")
        '1 head x 0 + 2 node x 8 = 16 CPUs'
        """
        kinds = self.largest(lambda k: getattr(k, unit))
        terms = [f"{k.count} {k.name} x {getattr(k, unit):g}" for k in kinds]
        return f"{' + '.join(terms) or '0'} = {self.total(unit):g} {UNITS[unit]}"

    def places(self, cpus: float, gpus: float) -> int:
        """Workers of that size that the whole holds, each on one machine."""
        kinds = self.largest(lambda k: k.places(cpus, gpus))
        return sum(k.count * k.places(cpus, gpus) for k in kinds)

    def price(self) -> str | None:
        """The dearest hour, as a sum; None where a price is not known."""
        if any(k.price is None for k in self.kinds):
            return None
        kinds = self.largest(lambda k: k.price)
        terms = " + ".join(f"{k.count} {k.name} x {k.price:.2f}" for k in kinds)
        return f"{terms} = {sum(k.count * k.price for k in kinds):.2f}"

    def gpu_hour(self) -> float | None:
        """The least that an hour of one GPU costs, with the machine around it."""
        return min((k.price / k.gpus for k in self.kinds if k.gpus and k.price is not None), default=None)


# --- from files ---


def read(path: str | Path) -> Fleet:
    """The fleet of a launcher file or of the first KubeRay resource in a manifest.

    Raises:
        BadInput: if the file is neither, or does not say what its machines hold.
    """
    try:
        documents = list(yaml.safe_load_all(Path(path).read_text()))
    except (OSError, yaml.YAMLError) as error:
        raise BadInput(where=str(path), rule="must be a readable YAML file", value=str(error)) from error
    for document in documents:
        if isinstance(document, Mapping) and document.get("kind") in ("RayCluster", "RayJob"):
            return of_manifest(document)
        if isinstance(document, Mapping) and "provider" in document:
            return _of_launcher(document, path)
    raise BadInput(where=str(path), rule="must be a Ray launcher file, or a RayCluster or RayJob manifest")


def _of_launcher(config: Mapping[str, Any], path: str | Path) -> Fleet:
    fleet = of_autoscaling(config, (config.get("metadata") or {}).get("price_per_hour") or {})
    if fleet is None:
        raise BadInput(
            where=f"{path}: available_node_types",
            rule="must say what each machine holds (`resources`)",
            advice="of machines at hand only the running cluster can tell: give --address",
        )
    return fleet


def of_manifest(document: Mapping[str, Any]) -> Fleet:
    """As KubeRay's autoscaler reads it."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    spec = document["spec"]
    spec = spec["rayClusterSpec"] if document["kind"] == "RayJob" else spec
    metadata = {"namespace": "default", **document["metadata"]}
    prices = json.loads((metadata.get("annotations") or {}).get(PRICES, "{}"))
    config = _derive_autoscaling_config_from_ray_cr({"metadata": metadata, "spec": spec})
    return of_autoscaling(config, prices) or Fleet(())


def of_autoscaling(config: Mapping[str, Any], prices: Mapping[str, float] | None = None) -> Fleet | None:
    """The fleet of an autoscaler's configuration; None where that leaves open what a machine holds."""
    head, kinds = config.get("head_node_type"), []
    for name, each in (config.get("available_node_types") or {}).items():
        held, is_head = each.get("resources") or {}, name == head
        most = 1 if is_head else each.get("max_workers", config.get("max_workers", 0))
        if most and not held:
            return None
        price = (prices or {}).get(name)
        cpus, gpus = float(held.get("CPU", 0)), float(held.get("GPU", 0))
        kinds.append(Kind(name, most, cpus, gpus, is_head, price))
    return Fleet(tuple(kinds), config.get("max_workers")) if kinds else None


# --- from the running cluster ---


def of_nodes(nodes: Sequence[Mapping[str, Any]]) -> Fleet:
    """The machines that are up, of `ray.nodes()`."""
    counts: Counter[tuple[float, float, bool]] = Counter()
    for node in nodes:
        if node["Alive"]:
            held = node["Resources"]
            counts[(held.get("CPU", 0.0), held.get("GPU", 0.0), is_head(node))] += 1
    return Fleet(tuple(
        Kind("head" if head else "node", count, cpus, gpus, head)
        for (cpus, gpus, head), count in sorted(counts.items(), key=lambda item: not item[0][2])
    ))


def is_head(node: Mapping[str, Any]) -> bool:
    return "node:__internal_head__" in node["Resources"]


def running() -> tuple[Fleet, bool]:
    """The largest that the connected cluster becomes, and whether its autoscaler said so."""
    import ray

    config = _ask_head()
    fleet = of_autoscaling(config) if config else None
    return (of_nodes(ray.nodes()), False) if fleet is None else (fleet, True)


def _ask_head(timeout: float = 30.0) -> dict[str, Any] | None:
    """Ray keeps the autoscaler's configuration on the head only."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    gcs = ray.get_runtime_context().gcs_address
    head = next((n["NodeID"] for n in ray.nodes() if n["Alive"] and is_head(n)), None)
    if head is None or head == ray.get_runtime_context().get_node_id():
        return configured(gcs) if head else None
    here = NodeAffinitySchedulingStrategy(head, soft=False)
    asked = ray.remote(configured).options(num_cpus=0, scheduling_strategy=here).remote(gcs)
    try:
        return ray.get(asked, timeout=timeout)
    except (ray.exceptions.RayError, TimeoutError):
        return None


def configured(gcs: str) -> dict[str, Any] | None:
    """What the autoscaler on this machine may start, and nothing else of its file, which can hold secrets."""
    try:
        config = _of_kubernetes() if "RAY_CLUSTER_NAME" in os.environ else _of_monitor(gcs)
    except Exception:  # whatever the file or Kubernetes answer: then the present size is what is known
        return None
    kept = ("head_node_type", "max_workers")
    types = {
        name: {k: each[k] for k in ("resources", "max_workers") if k in each}
        for name, each in (config or {}).get("available_node_types", {}).items()
    }
    return {"available_node_types": types, **{k: config[k] for k in kept if k in config}} if types else None


def _of_kubernetes() -> dict[str, Any] | None:
    """Of the RayCluster that this head pod belongs to; its service account may read it where it scales."""
    from ray.autoscaler._private.kuberay import autoscaling_config, node_provider

    namespace = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace").read_text().strip()
    client = node_provider.KubernetesHttpApiClient(namespace=namespace)
    resource = client.get(f"rayclusters/{os.environ['RAY_CLUSTER_NAME']}")
    if not resource["spec"].get("enableInTreeAutoscaling"):
        return None
    return autoscaling_config._derive_autoscaling_config_from_ray_cr(resource)


def _of_monitor(gcs: str) -> dict[str, Any] | None:
    for words in _command_lines():
        options = dict(word.split("=", 1) for word in words if word.startswith("--") and "=" in word)
        if options.get("--gcs-address") == gcs and "--autoscaling-config" in options:
            return yaml.safe_load(Path(options["--autoscaling-config"]).expanduser().read_text())
    return None


def _command_lines() -> Iterator[list[str]]:
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            line = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        yield line.decode(errors="replace").split("\0")
