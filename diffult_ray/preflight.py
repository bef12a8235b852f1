"""Is the cluster fit for the sweep? One line a finding, before anything is built.

    python -m diffult_ray.cluster cifar100_lt/weight --address ADDRESS     # asks the cluster and each node
    python -m diffult_ray.cluster cifar100_lt/weight --fleet aws.yaml      # sets the request against a file

Exit: 0 fit, warnings included; 2 something is broken; 3 the cluster can never hold the request.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffult_ray import probe
from diffult_ray.errors import BadInput, DoesNotFit, Refused, masked

if TYPE_CHECKING:
    from diffult_ray.cluster import Capacity
    from diffult_ray.fleet import Fleet
    from diffult_ray.plan import Plan

OK, WARNING, ERROR = "ok", "warning", "error"
PATIENCE = 60.0  # seconds for a node to answer
SKEW = 2.0  # seconds between two clocks beyond which times in logs and manifests mislead
TRAINERS = ("extractor", "reference", "generator", "classifier")
SHARED = "name storage that every node sees"
FREE = 0.9  # of a GPU's memory; less, and something else runs on it, or a killed process has left its own


@dataclass(frozen=True)
class Finding:
    """One line. `code` is the exit code of an error."""

    level: str
    subject: str
    text: str
    code: int = 0

    def __str__(self) -> str:
        return f"{self.level:<7} {self.subject:<9} {masked(' '.join(self.text.split()))}"


def broken(subject: str, text: str) -> Finding:
    return Finding(ERROR, subject, text, BadInput.exit_code)


class Unfit(Refused):
    """What `check` raises of the first error; the others have been told."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(where=f"cluster, {finding.subject}", rule=masked(finding.text))
        self.exit_code = finding.code


def exit_code(findings: Iterable[Finding]) -> int:
    """Of the first error; 0 without one."""
    return next((f.code for f in findings if f.level == ERROR), 0)


# --- what is asked for, against what there is ---


def request(plan: Plan, capacity: Capacity) -> Finding:
    """The largest sum asked for at a time, against the cluster at its largest."""
    from diffult_ray import cluster

    try:
        cluster.check_fits(plan, capacity)
    except DoesNotFit as error:
        return Finding(ERROR, "request", str(error), DoesNotFit.exit_code)
    asked = []
    for unit, label in cluster.UNITS.items():
        name, most = max(cluster.requests(plan), key=lambda r: r[1].workers * getattr(r[1], unit))
        each = getattr(most, unit)
        if each:
            asked.append(f"{name} {most.workers} x {each:g} = {most.workers * each:g} {label}, "
                         f"{capacity.sum(unit)}")
    return Finding(OK, "request", "at most " + "; ".join(asked))


def placement(plan: Plan, capacity: Capacity) -> Finding | None:
    """The largest trainer, whose workers must be up together, each on one machine."""
    from diffult_ray import cluster

    if capacity.fleet is None or request(plan, capacity).level == ERROR:
        return None
    trainers = [r for r in cluster.requests(plan) if r[0] in TRAINERS]
    name, most = max(trainers, key=lambda r: (r[1].most * r[1].gpus, r[1].most * r[1].cpus))
    places = capacity.fleet.places(most.cpus, most.gpus)
    workers = "worker" if most.workers == 1 else "workers"
    wished = f", wishes for {most.most}," if most.most > most.workers else ""
    return Finding(OK, "placement", f"{name} needs {most.workers} {workers}{wished} of {most.cpus:g} CPUs "
                                    f"and {most.gpus:g} GPUs, each on one machine; "
                                    f"there is place for {places}")


def price(fleet: Fleet) -> Finding | None:
    """What the cluster costs at most: all machines up, the dearest kinds first."""
    dearest, gpu_hour = fleet.price(), fleet.gpu_hour()
    if dearest is None:
        return None
    estimate = "" if gpu_hour is None else f"; for the sweep's estimate, --plan price.gpu_hour={gpu_hour:g}"
    return Finding(OK, "price", f"at most {dearest} an hour, by the file's prices{estimate}")


# --- what the nodes' answers amount to ---


def versions(ours: Mapping[str, str], answers: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """Every node must run what the driver runs."""
    found = []
    for name, answer in answers.items():
        other = [f"{k} {v} (here {ours[k]})" for k, v in answer["versions"].items() if v != ours[k]]
        if other:
            found.append(broken("versions", f"{name} has {', '.join(other)}"))
    listed = ", ".join(f"{k} {v}" for k, v in ours.items())
    return found or [Finding(OK, "versions", f"{listed} on {_nodes(len(answers))}")]


def storage(root: str, nonce: str, answers: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """Each node must read what the driver wrote, and the driver what each node wrote."""
    found = []
    for name, answer in answers.items():
        if answer["storage"] != nonce:
            found.append(broken("storage", f"{name} cannot use {root}: {answer['storage']}; {SHARED}"))
            continue
        try:
            back = probe.read(root, nonce, name)
        except OSError as error:
            back = str(error)
        if back != nonce:
            found.append(broken("storage", f"what {name} wrote to {root} is not seen here: {back}; {SHARED}"))
    return found or [Finding(OK, "storage", f"{root} is written and read by {_nodes(len(answers))}")]


def clocks(skews: Mapping[str, tuple[float, float]]) -> list[Finding]:
    """Of each node: seconds ahead of this machine, and how far that may be off."""
    found = [
        Finding(WARNING, "clock", f"{name} is {abs(ahead):.1f} s {'ahead' if ahead > 0 else 'behind'} "
                                  f"(+-{off:.1f} s): set its clock, times in logs and manifests mislead")
        for name, (ahead, off) in skews.items() if abs(ahead) - off > SKEW
    ]
    most = max((max(0.0, abs(ahead) - off) for ahead, off in skews.values()), default=0.0)
    return found or [Finding(OK, "clock", f"within {most:.1f} s on {_nodes(len(skews))}")]


def gpus(
    answers: Mapping[str, Mapping[str, Any]], offered: Mapping[str, float], wanted: bool
) -> list[Finding]:
    """GPUs that Ray offers must be there and free."""
    found, seen = [], defaultdict(list)
    for name, answer in answers.items():
        if not offered.get(name):
            continue
        if offered[name] > len(answer["gpus"]):
            shown = f"{offered[name]:g} GPUs to Ray, nvidia-smi shows {len(answer['gpus'])}"
            found.append(broken("gpus", f"{name} offers {shown}"))
        if "+cpu" in answer["versions"]["torch"]:
            found.append(broken("gpus", f"{name} has GPUs, and a torch without CUDA"))
        for number, gpu in enumerate(answer["gpus"]):
            seen[(gpu["name"], gpu["total"])].append(gpu["free"])
            if gpu["free"] < FREE * gpu["total"]:
                text = f"{name}, GPU {number}: {_memory(gpu['free'], gpu['total'])}: something else is on it"
                found.append(Finding(WARNING, "gpus", text))
    for (name, total), free in seen.items():
        found.append(Finding(OK, "gpus", f"{len(free)} x {name}, at least {_memory(min(free), total)}"))
    none = "none is up yet: the autoscaler starts them when work waits" if wanted else "none asked for"
    return found or [Finding(OK, "gpus", none)]


def _memory(free: float, total: float) -> str:
    return f"{free / 1024:.1f} of {total / 1024:.1f} GiB free"


def _nodes(count: int) -> str:
    return "1 node" if count == 1 else f"{count} nodes"


# --- the running cluster ---


def findings(plan: Plan, root: str, capacity: Capacity) -> list[Finding]:
    """All of them; the cluster is connected."""
    first = [request(plan, capacity), placement(plan, capacity)]
    return [*(f for f in first if f is not None), *_of_nodes(plan, root)]


def _of_nodes(plan: Plan, root: str) -> list[Finding]:
    import ray

    from diffult_ray import cluster, files

    nodes = {_name(n): n for n in ray.nodes() if n["Alive"]}
    nonce = uuid.uuid4().hex
    missing = [] if "://" in root else files.missing(Path(root).expanduser())
    try:
        probe.prepare(root, nonce)
    except Exception as error:  # as in `probe.run`
        return [broken("storage", f"{root} cannot be written from here: {type(error).__name__}: {error}")]
    try:
        answers, skews, silent = _ask(nodes, root, nonce)
        shared = storage(root, nonce, answers)
    finally:
        probe.clear(root, nonce)
        files.remove_empty(missing)
    wanted = any(r.gpus for _, r in cluster.requests(plan))
    offered = {name: node["Resources"].get("GPU", 0.0) for name, node in nodes.items()}
    told = [*versions(probe.facts()["versions"], answers), *shared, *gpus(answers, offered, wanted)]
    return [*silent, *told, *clocks(skews)] if answers else silent


def _name(node: Mapping[str, Any]) -> str:
    return f"{node['NodeManagerHostname']}-{node['NodeID'][-8:]}"


def _ask(nodes: Mapping[str, Any], root: str, nonce: str) -> tuple[dict, dict, list[Finding]]:
    """Each node's answer, its clock against ours, and a finding for each that gave none."""
    import ray

    answers, skews, silent = {}, {}, []
    asked = {_on(node, probe.run).remote(root, nonce, name): name for name, node in nodes.items()}
    ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=PATIENCE)
    for each, name in asked.items():
        if each not in ready:
            silent.append(broken("nodes", f"{name} did not answer in {PATIENCE:g} s"))
            continue
        try:
            answer, skew = ray.get(each), _skew(nodes[name])
        except Exception as error:  # a node without this package, or one that has just gone
            silent.append(_silence(name, nodes[name], error))
        else:
            answers[name], skews[name] = answer, skew
    return answers, skews, silent


def _silence(name: str, node: Mapping[str, Any], error: Exception) -> Finding:
    import ray

    if node["NodeID"] not in {n["NodeID"] for n in ray.nodes() if n["Alive"]}:
        return Finding(WARNING, "nodes", f"{name} has gone while it was asked")
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return broken("nodes", f"{name}: {lines[-1]}")


def _on(node: Mapping[str, Any], function: Callable[..., Any]) -> Any:
    """A task that runs on that node, beside whatever runs there."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    return ray.remote(function).options(num_cpus=0, max_retries=0, scheduling_strategy=where)


def _skew(node: Mapping[str, Any], times: int = 3) -> tuple[float, float]:
    """Seconds that a node's clock is ahead, and half the shortest way there and back."""
    import ray

    clock, best = _on(node, probe.clock), (0.0, float("inf"))
    for _ in range(times):
        before = time.time()
        there = ray.get(clock.remote(), timeout=PATIENCE)
        after = time.time()
        best = min(best, (there - (before + after) / 2, (after - before) / 2), key=lambda pair: pair[1])
    return best


def check(plan: Plan, root: str, capacity: Capacity, say: Callable[[str], None]) -> None:
    """In a sweep: say what is not sound, and refuse what is broken.

    Raises:
        Unfit: of the first error.
    """
    found = [f for f in findings(plan, root, capacity) if f.level != OK]
    for finding in found:
        say(f"preflight: {finding}")
    if exit_code(found):
        raise Unfit(next(f for f in found if f.level == ERROR))


# --- the command ---


def main(argv: Sequence[str] | None = None) -> int:
    from diffult_ray import cluster

    arguments = _parser().parse_intermixed_args(argv)
    try:
        return _report(_found(arguments))
    except Refused as refused:
        print(f"error: {refused}", file=sys.stderr)
        return refused.exit_code
    finally:
        if "ray" in sys.modules:
            cluster.disconnect()


def _found(arguments: argparse.Namespace) -> list[Finding]:
    from diffult_ray import cluster, config, fleet
    from diffult_ray.plan import make_plan

    name, overrides = arguments.sweep, list(arguments.overrides)
    if "=" in name and not os.path.exists(name):
        name, overrides = "digits", [name, *overrides]
    plan = make_plan(config.load(name, overrides, arguments.overlay))
    if arguments.fleet:
        machines = fleet.read(arguments.fleet)
        capacity = cluster.Capacity.of(machines, f"the cluster of {arguments.fleet}")
        found = [request(plan, capacity), placement(plan, capacity), price(machines)]
        return [f for f in found if f is not None]
    root = arguments.storage or os.environ.get("DIFFULT_STORAGE") or "~/diffult"
    return findings(plan, root, cluster.connect(arguments.address))


def _report(found: Sequence[Finding]) -> int:
    for finding in found:
        print(finding)
    return exit_code(found)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m diffult_ray.cluster",
        description="Check a cluster for a sweep; build nothing.",
        epilog="exit: 0 fit, 2 broken, 3 does not fit",
    )
    parser.add_argument("sweep", nargs="?", default="digits", help="a file or the name of a shipped sweep")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted keys to override")
    parser.add_argument("--overlay", metavar="NAME|FILE", help="another scale or set, such as smoke")
    parser.add_argument("--storage", help="folder of all results (DIFFULT_STORAGE, else ~/diffult)")
    parser.add_argument("--address", help="Ray cluster to join (RAY_ADDRESS, else one is started here)")
    parser.add_argument("--fleet", metavar="FILE", help="a launcher file or manifest, instead of a cluster")
    return parser
