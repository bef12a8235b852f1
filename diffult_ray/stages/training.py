"""Ray Train around a training loop: workers, checkpoints, progress."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffult_ray import files
from diffult_ray.allotment import ALONE, Allotment
from diffult_ray.footprint import Footprint
from diffult_ray.snapshot import Snapshot
from diffult_ray.stages import SHARED, Site, held

if TYPE_CHECKING:
    import torch

    from diffult_ray.stages.update import Update

CHECKPOINT_SECONDS = 30.0  # at most this much training is lost to an interruption
DRAINING_SECONDS = 5.0  # the same, on a node that is about to go
NOTICE_SECONDS = 1.0  # between two questions whether one is
RESIZE_SECONDS = 60.0  # between two looks for room for more workers
PROGRESS_SECONDS = 1.0
STATE = "state.safetensors"
KEPT = 2  # checkpoints: the one before is used where the last one is damaged
FAILED = "failed.json"
# Train runs the loop in a thread, whose heap of its own glibc gives back to the kernel whatever mallopt says.
ONE_HEAP = {"MALLOC_ARENA_MAX": "1"}
WATCHER = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
MAX_FAILURES = 3  # of a run that is tried again
FINAL = {"FloatingPointError": FloatingPointError, "ValueError": ValueError}  # again they would end alike

Loop = Callable[["Run", Mapping[str, Any]], None]
Write = Callable[[Path], None]  # a checkpoint, into its folder


@dataclass
class Run:
    """What a training loop knows of where it runs."""

    work: Path
    device: torch.device
    rank: int = 0
    world: int = 1
    checkpoints: Path | None = None  # a folder of `checkpoint_*`, later ones by name
    report: Callable[[Write | None], Future[None]] | None = None  # has it written beside the training
    checkpoint_seconds: float = CHECKPOINT_SECONDS
    readers: int = 1
    given: Allotment = ALONE
    draining: Callable[[], frozenset[str]] = frozenset  # ids of the nodes that are about to go
    site: Site = SHARED
    _saved: float = field(default_factory=time.monotonic)
    _writing: Future[None] | None = None
    _copy: Snapshot = field(default_factory=Snapshot)
    _asked: float = 0.0
    _going: frozenset[str] = frozenset()
    _told: float = 0.0

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def distribute(self, model: torch.nn.Module, update: Update | None = None) -> torch.nn.Module:
        """DDP when several workers train, else the model itself; compiled where that was asked for.

        Args:
            update: of the model's parameters, which ranks of one machine share if they can.
        """
        from diffult_ray.method.device import compiled

        if self.world == 1:
            return compiled(model, self.given)
        from torch.nn.parallel import DistributedDataParallel

        if self.given.tuned and update is not None:
            update.share()
        ids = [self.device.index] if self.device.type == "cuda" else None
        parallel = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
        if self.given.tuned:
            from diffult_ray.stages.shared_gradients import share_gradients

            share_gradients(parallel, update and update.owners)
        return compiled(parallel, self.given)

    def parts(self, wrapped: torch.nn.Module, n: int) -> Iterator[slice]:
        """Rows whose gradients are taken one after another; DDP sums them over the ranks with the last."""
        from diffult_ray.data.batches import share

        number = max(1, min(n, self.given.accumulate))
        for part in range(number):
            rows = share(n, rank=part, world=number)
            waits = self.world > 1 and part < number - 1
            with wrapped.no_sync() if waits else contextlib.nullcontext():
                yield rows

    def restore(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """Tensors and numbers of the last checkpoint that is whole; the same one on every rank."""
        kept = sorted(self.checkpoints.glob(f"checkpoint_*/{STATE}")) if self.checkpoints else []
        if self.world == 1:
            return next(_whole(reversed(kept)), (None, None))[1]
        import torch.distributed as dist

        path = next(_whole(reversed(kept)), (None, None))[0] if self.is_first else None
        chosen = [path and path.parent.name]  # each machine has its own path
        dist.broadcast_object_list(chosen, src=0, device=self.device)
        return None if chosen[0] is None else files.read_state(self.checkpoints / chosen[0] / STATE)

    def should_save(self) -> bool:
        """Whether it is time for a checkpoint; the same answer on every rank, each of which asks.

        At once when a node of the training is about to go, and then every few seconds until it has gone.

        Raises:
            OSError: if the last one could not be written.
        """
        now = time.monotonic()
        seconds = min(self.checkpoint_seconds, DRAINING_SECONDS) if self._going else self.checkpoint_seconds
        due = now - self._saved > seconds and self._is_written()
        due, ask = self._agree(due, now - self._asked > NOTICE_SECONDS)
        if not ask:
            return due
        known, self._asked, self._going = self._going, now, self.draining()
        return due or not self._going <= known

    def _agree(self, *flags: bool) -> list[bool]:
        """What rank 0 says."""
        if self.world == 1:
            return list(flags)
        import torch
        import torch.distributed as dist

        agreed = torch.tensor(flags, dtype=torch.uint8, device=self.device)
        dist.broadcast(agreed, src=0)
        return agreed.bool().tolist()

    def average(self, value: torch.Tensor) -> float:
        """The mean of a number over the ranks; every rank calls it."""
        if self.world == 1:
            return float(value)
        import torch.distributed as dist

        value = value.detach().clone()
        dist.all_reduce(value)
        return float(value) / self.world

    def save(self, tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, Any]) -> None:
        """A checkpoint, from rank 0; every rank calls it. It is written from a copy; training goes on."""
        if not self.is_first:
            self.report(None)
        else:
            self.settle()
            copy = self._copy.take(tensors, numbers)

            def write(folder: Path) -> None:
                self.site.settle()  # what was written before the checkpoint is not written again after it
                copy.write(folder / STATE)

            self._writing = self.report(write)
        self._saved = time.monotonic()

    def _is_written(self) -> bool:
        """Whether no checkpoint is on its way. Raises what its writing raised."""
        if self._writing is not None and self._writing.done():
            self.settle()
        return self._writing is None

    def settle(self) -> None:
        """Wait for the last checkpoint. Raises what its writing raised."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def tell(self, done: int, total: int, **facts: float) -> None:
        """Progress for whoever watches the work folder; at most once a second."""
        now = time.monotonic()
        if not self.is_first or (now - self._told < PROGRESS_SECONDS and done < total):
            return
        self._told = now
        facts = {"done": done, "total": total, **facts}
        files.write_json(self.work / "progress.json", facts, lasting=False)
        self.site.publish_soon(self.work / "progress.json")


def _whole(paths: Iterable[Path]) -> Iterator[tuple[Path, Any]]:
    """(path, state) of the checkpoints that can be read."""
    for path in paths:
        try:
            yield path, files.read_state(path)
        except Exception as error:  # safetensors has a kind of its own
            told = f"warning: checkpoint {path.parent} is damaged ({error}); the one before is used"
            print(told, file=sys.stderr, flush=True)


def train(
    loop: Loop, payload: Mapping[str, Any], *, resources: Any, work: Path, name: str, site: Site = SHARED
) -> None:
    """Run a loop on Ray: by one worker in a task, by several under TorchTrainer.

    A run of the same name and work folder that was interrupted goes on from its last checkpoint.

    Args:
        loop: a module-level function of (run, payload), called once a worker.
        payload: what the loop needs, small and picklable; see `_localised` for its paths.
        resources: workers, and CPUs and GPUs a worker. Between `workers` and `most`, as many train as
            there is room for: fewer after a node has gone, more after one has come.
        work: an absolute folder of the site.
        name: of the run; it holds the hash of its configuration.
        site: of the work folder and of the payload's.

    Raises:
        FloatingPointError: if the training has diverged.
        ValueError: from the loop.
    """
    if resources.most == 1:
        _train_alone(loop, payload, resources=resources, work=work, name=name, site=site)
    else:
        _train_together(loop, payload, resources=resources, work=work, name=name, site=site)


def _train_alone(
    loop: Loop, payload: Mapping[str, Any], *, resources: Any, work: Path, name: str, site: Site
) -> None:
    """In a task: a Train group of one has three processes more, whose start outlasts a small training."""
    import ray

    task = ray.remote(_alone).options(
        name=name, num_cpus=resources.cpus, num_gpus=resources.gpus,
        max_retries=MAX_FAILURES, retry_exceptions=True,
    )  # fmt: skip
    failed = ray.get(task.remote(loop, dict(payload), resources, str(work), site, CHECKPOINT_SECONDS))
    if failed:
        raise FINAL[failed["kind"]](failed["text"])


def _alone(
    loop: Loop, payload: dict[str, Any], resources: Any, work: str, site: Site, checkpoint_seconds: float
) -> dict[str, str] | None:
    """The kind and text of an error with which it would end again; Ray tries it again after any other."""
    try:
        run_here(
            loop, _localised(payload, site), resources=resources, work=site.here(work), site=site.moved(),
            checkpoint_seconds=checkpoint_seconds,
        )
    except tuple(FINAL.values()) as error:
        return _told(error)
    return None


def _told(error: Exception) -> dict[str, str]:
    kind = "FloatingPointError" if isinstance(error, FloatingPointError) else "ValueError"
    return {"kind": kind, "text": str(error)}


def _train_together(
    loop: Loop, payload: Mapping[str, Any], *, resources: Any, work: Path, name: str, site: Site
) -> None:
    """Under TorchTrainer, in or outside of a Tune trial."""
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.tune.trainable.trainable_fn_utils import _in_tune_session

    callbacks = []
    if _in_tune_session():
        from ray.tune.integration.ray_train import TuneReportCallback

        callbacks.append(TuneReportCallback())
    if site.is_shared:
        _drop_half_written(work / name)  # an object of a storage is whole or not there
    per_worker = {"CPU": resources.cpus}
    if resources.gpus:
        per_worker["GPU"] = resources.gpus
    place, system = site.storage(work)
    TorchTrainer(
        _worker,
        train_loop_config={
            "loop": loop, "payload": dict(payload), "work": str(work), "name": name, "site": site,
            "given": Allotment.of(resources), "readers": resources.readers,
            "checkpoint_seconds": CHECKPOINT_SECONDS,
        },
        scaling_config=ScalingConfig(
            num_workers=_workers(resources),
            elastic_resize_monitor_interval_s=RESIZE_SECONDS,
            use_gpu=resources.gpus > 0,
            resources_per_worker=per_worker,
        ),
        run_config=RunConfig(
            name=name,
            storage_path=place,
            storage_filesystem=system,
            failure_config=FailureConfig(max_failures=MAX_FAILURES),
            checkpoint_config=CheckpointConfig(num_to_keep=KEPT),
            callbacks=callbacks,
            worker_runtime_env={"env_vars": ONE_HEAP} if resources.keep_memory else {},
        ),
    ).fit()
    if site.fetch(work / FAILED).exists():
        told = files.read_json(work / FAILED)
        site.remove(work)  # what Train takes for a finished run
        raise FINAL[told["kind"]](told["text"])


def _drop_half_written(run: Path) -> None:
    """Train does not start over its own list of checkpoints unless that is whole, and writes it in place."""
    path = run / "checkpoint_manager_snapshot.json"
    try:
        listed = [each["checkpoint_dir_name"] for each in files.read_json(path)["checkpoint_results"]]
    except FileNotFoundError:
        return
    except (ValueError, TypeError, KeyError):
        listed = [""]
    if not all(name and (run / name).exists() for name in listed):
        path.unlink()


def _workers(resources: Any) -> int | tuple[int, int]:
    fixed = resources.most == resources.workers
    return resources.workers if fixed else (resources.workers, resources.most)


def _draining() -> frozenset[str]:
    """Nodes of the training that are about to go; every rank asks, and gets rank 0's answer."""
    import ray.train

    if os.environ.get(WATCHER) == "0":  # nobody would know, and to ask takes 4 ms
        return frozenset()
    info = ray.train.get_preemption_info()
    return frozenset(info.preempted_node_ids if info else ())


def _worker(config: dict[str, Any]) -> None:
    import ray.train

    from diffult_ray.method import device

    given: Allotment = config["given"]
    context, site = ray.train.get_context(), config["site"]
    run = Run(
        work=site.here(config["work"]),
        device=device.prepare(given),
        given=given,
        rank=context.get_world_rank(),
        world=context.get_world_size(),
        checkpoints=site.fetch(Path(config["work"]) / config["name"]),
        report=_report,
        checkpoint_seconds=config["checkpoint_seconds"],
        readers=config["readers"],
        draining=_draining,
        site=site.moved(),
    )
    try:
        config["loop"](run, _localised(config["payload"], site))
    except tuple(FINAL.values()) as error:  # Train would try it three times more, to the same end
        if run.is_first:
            files.write_json(run.work / FAILED, _told(error))
            run.site.publish(run.work / FAILED)
    Footprint(run.site, run.work).note()
    run.site.settle()


def _report(write: Write | None) -> Future[None]:
    """Train's report of a checkpoint, which is written while the training goes on."""
    import ray.train
    from pyarrow.fs import LocalFileSystem
    from ray.train import Checkpoint, CheckpointUploadMode

    storage = ray.train.get_context().get_storage()
    written: Future[None] = Future()

    def upload(made: Checkpoint, name: str) -> Checkpoint:
        """Into the run's folder; where that is a storage's, by way of `made`."""
        try:
            if isinstance(storage.storage_filesystem, LocalFileSystem):
                path = Path(storage.experiment_fs_path) / name
                write(path)
                return Checkpoint(str(path), filesystem=storage.storage_filesystem)
            write(Path(made.path))
            return storage.persist_current_checkpoint(made, name)
        finally:
            written.set_result(None)  # an error is raised by Train

    ray.train.report(
        {}, checkpoint=Checkpoint(tempfile.mkdtemp()) if write else None,
        checkpoint_upload_mode=CheckpointUploadMode.ASYNC, checkpoint_upload_fn=upload,
        delete_local_checkpoint_after_upload=True,
    )
    return written


def _localised(payload: Mapping[str, Any], site: Site) -> dict[str, Any]:
    """The payload with this machine's paths: its inputs are there, and it can write to the others."""
    if site.is_shared:
        return dict(payload)
    moved: dict[str, Any] = {"inputs": {k: str(site.fetch(v)) for k, v in payload["inputs"].items()}}
    for key in {"out", "packed_pool"} & set(payload):
        moved[key] = str(site.here(payload[key]))
    if "outs" in payload:
        moved["outs"] = {steps: str(site.here(out)) for steps, out in payload["outs"].items()}
    return {**payload, **moved}


def run_here(
    loop: Loop, payload: Mapping[str, Any], *, resources: Any, work: Path, site: Site = SHARED,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
) -> None:
    """The same loop in the calling process; its checkpoints are kept in the work folder."""
    from diffult_ray.method import device

    given = Allotment.of(resources)
    held.drop()
    kept = site.fetch(work / "checkpoints")

    def report(write: Write) -> Future[None]:
        return writer.submit(_keep, write, kept, site)

    with ThreadPoolExecutor(1, "checkpoint") as writer:
        run = Run(
            work=work,
            device=device.prepare(given),
            given=given,
            checkpoints=kept,
            checkpoint_seconds=checkpoint_seconds,
            report=report,
            readers=resources.readers,
            draining=_draining_here,
            site=site,
        )
        loop(run, payload)
        run.settle()
    Footprint(site, work).note()
    site.settle()


def _keep(write: Write, kept: Path, site: Site) -> None:
    """A checkpoint more, and no more than `KEPT`."""
    before = sorted(kept.glob("checkpoint_*"))
    number = int(before[-1].name.partition("_")[2]) + 1 if before else 0
    made = kept / f"checkpoint_{number:06d}"
    write(made)
    site.publish_soon(made)
    whole = sorted(path.parent for path in kept.glob(f"checkpoint_*/{STATE}"))
    for old in set(before) - set(whole[-KEPT:]):
        site.remove(old)


def _draining_here() -> frozenset[str]:
    """The id of this machine, if it is about to go; Train, which tells its workers, is not there."""
    import ray
    from ray._private.state import state

    if not ray.is_initialized():
        return frozenset()
    return frozenset(state.get_draining_nodes()) & {ray.get_runtime_context().get_node_id()}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """An optimizer's state as flat tensors, e.g. `optimizer.3.exp_avg`; no pickle is needed."""
    import torch

    state = optimizer.state_dict()["state"]
    return {
        f"optimizer.{index}.{name}": torch.as_tensor(value)
        for index, values in state.items()
        for name, value in values.items()
        if value is not None
    }


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put back what `optimizer_tensors` took."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = laid_out_as(parameters[int(index)], value)
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def laid_out_as(parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A file's tensor, which is contiguous, in the parameter's memory format, if it has its shape.

    A fused optimizer step goes through both in the order of their memory: on a CPU it would take another
    format for the same numbers, and a GPU's refuses it.
    """
    import torch

    if value.shape != parameter.shape:
        return value
    return torch.empty_like(parameter, dtype=value.dtype, device=value.device).copy_(value)


def prefixed(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{prefix}.{k}": v for k, v in tensors.items()}


def unprefixed(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k[len(prefix) + 1 :]: v for k, v in tensors.items() if k.startswith(prefix + ".")}
