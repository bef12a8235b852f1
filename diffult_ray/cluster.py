"""The Ray cluster: connecting to it quietly, and what it can hold."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from dataclasses import dataclass
from typing import Any

from diffult_ray.config import Resources
from diffult_ray.errors import DoesNotFit
from diffult_ray.plan import Plan

QUIET = {
    # Train polls its workers at this interval, and every report waits for the next poll.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
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


@dataclass(frozen=True)
class Capacity:
    """What the cluster can hold at its largest."""

    cpus: float
    gpus: float
    origin: str


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
    resources = {id(t.experiment.resources): t.experiment.resources for t in plan.trials}.values()
    used = {s.name for s in plan.stages} | {"classifier"}
    for each in resources:
        for name in Resources.model_fields:
            if name in used:
                _check(name, getattr(each, name), capacity)


def _check(name: str, wanted: Any, capacity: Capacity) -> None:
    for unit, asked, there in (
        ("CPUs", wanted.cpus, capacity.cpus),
        ("GPUs", wanted.gpus, capacity.gpus),
    ):
        if wanted.workers * asked > there + 1e-9:
            raise DoesNotFit(
                where=f"experiment.resources.{name}",
                rule=f"{wanted.workers} workers x {asked:g} {unit} = {wanted.workers * asked:g} {unit}, "
                f"but {capacity.origin} holds {there:g}",
                advice="ask for fewer workers or a larger cluster",
            )


def connect(address: str | None, *, verbose: bool = False) -> Capacity:
    """Start a cluster on this machine, or join the one at `address` (or RAY_ADDRESS)."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    import ray

    address = address or os.environ.get("RAY_ADDRESS") or "local"
    options: dict[str, Any] = {"log_to_driver": verbose, "configure_logging": True}
    if not verbose:
        options["logging_level"] = logging.ERROR
    if address == "local":
        options |= {
            "num_cpus": int(here().cpus),
            "include_dashboard": True,
            "dashboard_host": "127.0.0.1",
            "_temp_dir": os.environ.get("RAY_TMPDIR") or os.path.join(tempfile.gettempdir(), "ray"),
        }
    ray.init(address=address, namespace="diffult", **options)
    if not verbose:
        _silence()
        _move_core_messages()
    held = ray.cluster_resources()
    origin = "this machine" if address == "local" else f"the cluster at {address}"
    return Capacity(held.get("CPU", 0.0), held.get("GPU", 0.0), origin)


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
