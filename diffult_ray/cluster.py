"""The Ray cluster: connecting to it quietly, and what it can hold.

    python -m diffult_ray.cluster [SWEEP] [key=value ...] [--address ADDRESS] [--fleet FILE]

checks a cluster for a sweep and starts nothing: see `preflight`.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import tempfile
from dataclasses import dataclass
from typing import Any

from diffult_ray import fleet
from diffult_ray.config import Resources, StageResources
from diffult_ray.errors import BadInput, DoesNotFit
from diffult_ray.fleet import UNITS, Fleet
from diffult_ray.plan import Plan

QUIET = {
    # At this interval Train asks its workers how they are, and the end of a training waits for it. At 0.2 its
    # controller takes 0.9% of two cores, at 1 0.4%.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    # How soon the workers of a node that is about to go are told.
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    # Elastic workers are counted before their places are known to be free: count again soon.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
    # Without it a thread that outlives an interrupted sweep would start a second cluster.
    "RAY_ENABLE_AUTO_CONNECT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "PYTHONWARNINGS": "ignore",
}

# Of a cluster that is started here and ends with the sweep, whose training has all of the machine's cores.
OWN = {
    # So long its workers look for a head that was killed. Ray's own is 60.
    "RAY_gcs_rpc_server_reconnect_timeout_s": "15",
    # Its one machine goes with all of it, and nobody asks for its metrics: 2 to 5% of two workers' rate.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_metrics_report_interval_ms": "60000",
    # The dashboard measures its own memory, and its agent looks for events, once a minute and every 5 s
    # instead of every 5 s and ten times a second: half a percent of two cores.
    "METRICS_RECORD_INTERVAL_S": "60",
    "EVENT_AGENT_REPORT_INTERVAL_SECONDS": "5",
}
# Where no log goes to the terminal, their monitor lists them every 5 s instead of ten times a second: a third
# of a percent.
UNTOLD = {"RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "0", "LOG_NAME_UPDATE_INTERVAL_S": "5"}
_set: list[str] = []


@dataclass(frozen=True)
class Capacity:
    """What the cluster can hold at its largest."""

    cpus: float
    gpus: float
    origin: str
    fleet: Fleet | None = None  # its machines, where they are known

    @classmethod
    def of(cls, fleet: Fleet, origin: str) -> Capacity:
        return cls(fleet.total("cpus"), fleet.total("gpus"), origin, fleet)

    def sum(self, unit: str) -> str:
        """How much there is, and how that comes about."""
        there = f"{getattr(self, unit):g} {UNITS[unit]}"
        return f"{self.origin} holds {self.fleet.shown(unit) if self.fleet else there}"


def here() -> Capacity:
    """This machine, if a cluster is started on it."""
    import importlib.util

    gpus = 0.0
    if os.path.exists("/dev/nvidiactl") and importlib.util.find_spec("torch"):
        import torch

        gpus = float(torch.cuda.device_count())
    return Capacity(float(len(os.sched_getaffinity(0))), gpus, "this machine")


def check_fits(plan: Plan, capacity: Capacity) -> None:
    """Refuse what the cluster can never hold, with the sum that shows it.

    Raises:
        DoesNotFit: naming the stage, its request and what there is.
    """
    for name, wanted in requests(plan):
        _check_sum(name, wanted, capacity)
        _check_placement(name, wanted, capacity)


def requests(plan: Plan) -> list[tuple[str, StageResources]]:
    """(stage, what it asks for) of all that the plan holds, each request once."""
    resources = {id(t.experiment.resources): t.experiment.resources for t in plan.trials}.values()
    used = {s.name for s in plan.stages} | {"classifier"}
    names = [name for name in Resources.model_fields if name in used]
    return list(dict.fromkeys((name, getattr(each, name)) for each in resources for name in names))


def _check_sum(name: str, wanted: StageResources, capacity: Capacity) -> None:
    for unit, label in UNITS.items():
        asked, there = getattr(wanted, unit), getattr(capacity, unit)
        if wanted.workers * asked > there + 1e-9:
            raise DoesNotFit(
                where=f"experiment.resources.{name}",
                rule=f"{wanted.workers} workers x {asked:g} {label} = {wanted.workers * asked:g} {label}, "
                f"but {capacity.sum(unit)}",
                advice="ask for fewer workers or a larger cluster",
            )


def _check_placement(name: str, wanted: StageResources, capacity: Capacity) -> None:
    """A worker is on one machine, so that a sum that fits may still not be placed."""
    if capacity.fleet is None:
        return
    places = capacity.fleet.places(wanted.cpus, wanted.gpus)
    if places < wanted.workers:
        raise DoesNotFit(
            where=f"experiment.resources.{name}",
            rule=f"{wanted.workers} workers of {wanted.cpus:g} CPUs and {wanted.gpus:g} GPUs, each on one "
            f"machine, but {capacity.origin} has place for {places}: {capacity.fleet.shown('cpus')}, "
            f"{capacity.fleet.shown('gpus')}",
            advice="ask for fewer or smaller workers, or larger machines",
        )


def connect(address: str | None, *, verbose: bool = False) -> Capacity:
    """Start a cluster on this machine, or join the one at `address` (or RAY_ADDRESS).

    Raises:
        BadInput: if the cluster at `address` cannot be joined.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    import ray

    address = address or os.environ.get("RAY_ADDRESS") or "local"
    options: dict[str, Any] = {"log_to_driver": verbose, "configure_logging": True}
    if not verbose:
        options["logging_level"] = logging.ERROR
    if address == "local":
        own = OWN if verbose else OWN | UNTOLD
        _set.extend(own.keys() - os.environ.keys())
        os.environ.update({name: own[name] for name in _set})
        options |= {
            "num_cpus": int(here().cpus),
            "include_dashboard": True,
            "dashboard_host": "127.0.0.1",
            "_temp_dir": os.environ.get("RAY_TMPDIR") or os.path.join(tempfile.gettempdir(), "ray"),
        }
    try:
        _reach(address)
        ray.init(address=address, namespace="diffult", **options)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        if address == "local":
            raise
        told = " ".join(str(error).split())[:400]
        raise BadInput(
            where="--address", rule="must be a Ray cluster that can be joined", value=address, advice=told
        ) from error
    if not verbose:
        _silence()
        _move_core_messages()
    if address == "local":
        held = ray.cluster_resources()
        return Capacity(held.get("CPU", 0.0), held.get("GPU", 0.0), "this machine")
    largest, scales = fleet.running()
    return Capacity.of(largest, f"the cluster at {address}{' at its largest' if scales else ''}")


def _reach(address: str, patience: float = 5.0) -> None:
    """Ray tries for two minutes where nothing listens. Raises OSError."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "://" not in address:
        socket.create_connection((host.strip("[]"), int(port)), patience).close()


def _silence() -> None:
    import warnings

    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    warnings.filterwarnings("ignore", module=r"ray\.")
    for name in ("ray", "ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _move_core_messages() -> None:
    """What Ray's C++ core writes to the terminal's descriptor goes to Ray's log folder instead.

    It warns there of what Ray's own libraries do (#53727), whatever Python's loggers are set to.
    """
    from ray._private.worker import _global_node

    if _global_node is None or sys.stderr is not sys.__stderr__:
        return
    sys.stderr.flush()
    ours = os.dup(2)
    with open(os.path.join(_global_node.get_logs_dir_path(), f"diffult-core-{os.getpid()}.err"), "ab") as log:
        os.dup2(log.fileno(), 2)
    sys.stderr = os.fdopen(ours, "w", buffering=1, errors="backslashreplace")


def disconnect() -> None:
    """Leave the cluster; one that `connect` started ends with all its processes."""
    import ray

    ray.shutdown()
    while _set:
        os.environ.pop(_set.pop(), None)


if __name__ == "__main__":
    from diffult_ray.preflight import main

    sys.exit(main())
