"""Ray Train around a training loop: workers, checkpoints, progress."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffult_ray import files
from diffult_ray.stages import SHARED, Site

if TYPE_CHECKING:
    import torch

CHECKPOINT_SECONDS = 30.0  # at most this much training is lost to an interruption
PROGRESS_SECONDS = 1.0
STATE = "state.safetensors"

Loop = Callable[["Run", Mapping[str, Any]], None]


@dataclass
class Run:
    """What a training loop knows of where it runs."""

    work: Path
    device: torch.device
    rank: int = 0
    world: int = 1
    resume: Path | None = None
    report: Callable[[Path], None] | None = None
    checkpoint_seconds: float = CHECKPOINT_SECONDS
    readers: int = 1
    site: Site = SHARED
    _saved: float = field(default_factory=time.monotonic)
    _told: float = 0.0

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def distribute(self, model: torch.nn.Module) -> torch.nn.Module:
        """DDP when several workers train, else the model itself."""
        if self.world == 1:
            return model
        from torch.nn.parallel import DistributedDataParallel

        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)

    def restore(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """Tensors and numbers of the last checkpoint."""
        if self.resume is None:
            return None
        return files.read_state(self.resume / STATE)

    def should_save(self) -> bool:
        """Whether it is time for a checkpoint; the same answer on every rank."""
        due = time.monotonic() - self._saved > self.checkpoint_seconds
        return self._agree(due)

    def _agree(self, due: bool) -> bool:
        if self.world == 1:
            return due
        import torch
        import torch.distributed as dist

        flag = torch.tensor([int(due)], device=self.device)
        dist.broadcast(flag, src=0)
        return bool(flag.item())

    def average(self, value: torch.Tensor) -> float:
        """The mean of a number over the ranks; every rank calls it."""
        if self.world == 1:
            return float(value)
        import torch.distributed as dist

        value = value.detach().clone()
        dist.all_reduce(value)
        return float(value) / self.world

    def save(self, tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, Any]) -> None:
        """A checkpoint, from rank 0; every rank calls it."""
        with tempfile.TemporaryDirectory() as folder:
            if self.is_first:
                files.write_state(Path(folder) / STATE, tensors, numbers)
                self.site.settle()  # what was written before the checkpoint is not written again after it
            self.report(Path(folder))
        self._saved = time.monotonic()

    def tell(self, done: int, total: int, **facts: float) -> None:
        """Progress for whoever watches the work folder; at most once a second."""
        now = time.monotonic()
        if not self.is_first or (now - self._told < PROGRESS_SECONDS and done < total):
            return
        self._told = now
        files.write_json(self.work / "progress.json", {"done": done, "total": total, **facts})
        self.site.publish_soon(self.work / "progress.json")


def train(
    loop: Loop, payload: Mapping[str, Any], *, resources: Any, work: Path, name: str, site: Site = SHARED
) -> None:
    """Run a loop under TorchTrainer, in or outside of a Tune trial.

    A run of the same name and work folder that was interrupted goes on from its last checkpoint.

    Args:
        loop: a module-level function of (run, payload), called once a worker.
        payload: what the loop needs, small and picklable; see `_localised` for its paths.
        resources: workers, and CPUs and GPUs a worker.
        work: an absolute folder of the site.
        name: of the run; it holds the hash of its configuration.
        site: of the work folder and of the payload's.
    """
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.tune.trainable.trainable_fn_utils import _in_tune_session

    callbacks = []
    if _in_tune_session():
        from ray.tune.integration.ray_train import TuneReportCallback

        callbacks.append(TuneReportCallback())
    per_worker = {"CPU": resources.cpus}
    if resources.gpus:
        per_worker["GPU"] = resources.gpus
    place, system = site.storage(work)
    TorchTrainer(
        _worker,
        train_loop_config={
            "loop": loop, "payload": dict(payload), "work": str(work), "site": site,
            "cpus": resources.cpus, "gpus": resources.gpus, "readers": resources.readers,
            "checkpoint_seconds": CHECKPOINT_SECONDS,
        },
        scaling_config=ScalingConfig(
            num_workers=resources.workers,
            use_gpu=resources.gpus > 0,
            resources_per_worker=per_worker,
        ),
        run_config=RunConfig(
            name=name,
            storage_path=place,
            storage_filesystem=system,
            failure_config=FailureConfig(max_failures=3),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            callbacks=callbacks,
        ),
    ).fit()


def _worker(config: dict[str, Any]) -> None:
    import ray.train
    import torch

    torch.set_num_threads(max(1, int(config["cpus"])))
    context, site = ray.train.get_context(), config["site"]
    from diffult_ray.method import device

    with _last_checkpoint() as resume:
        run = Run(
            work=site.here(config["work"]),
            device=device.pick(config["gpus"]),
            rank=context.get_world_rank(),
            world=context.get_world_size(),
            resume=resume,
            report=_report if site.is_shared else _report_soon,
            checkpoint_seconds=config["checkpoint_seconds"],
            readers=config["readers"],
            site=site.moved(),
        )
        config["loop"](run, _localised(config["payload"], site))
    run.site.settle()


@contextmanager
def _last_checkpoint() -> Iterator[Path | None]:
    """Where it lies in shared storage, or a copy that goes afterwards."""
    import ray.train

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        yield None
        return
    with checkpoint.as_directory() as folder:
        yield Path(folder)


def _report(folder: Path) -> None:
    import ray.train

    first = ray.train.get_context().get_world_rank() == 0
    ray.train.report({}, checkpoint=ray.train.Checkpoint.from_directory(folder) if first else None)


def _report_soon(folder: Path) -> None:
    """The same, but the training goes on while the checkpoint is uploaded."""
    import ray.train
    from ray.train import CheckpointUploadMode

    made = None
    if ray.train.get_context().get_world_rank() == 0:
        kept = tempfile.mkdtemp()
        shutil.move(folder / STATE, kept)
        made = ray.train.Checkpoint.from_directory(kept)
    ray.train.report(
        {}, checkpoint=made, checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
        delete_local_checkpoint_after_upload=True,
    )


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
    loop: Loop, payload: Mapping[str, Any], *, resources: Any, work: Path, site: Site = SHARED
) -> None:
    """The same loop in the calling process; its checkpoints are kept in the work folder."""
    import torch

    from diffult_ray.method import device

    torch.set_num_threads(max(1, int(resources.cpus)))
    kept = site.fetch(work / "checkpoint")

    def report(folder: Path) -> None:
        files.write_bytes(kept / STATE, (folder / STATE).read_bytes())
        site.publish_soon(kept)

    run = Run(
        work=work,
        device=device.pick(resources.gpus),
        resume=kept if (kept / STATE).exists() else None,
        report=report,
        readers=resources.readers,
        site=site,
    )
    loop(run, payload)
    site.settle()


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
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def prefixed(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{prefix}.{k}": v for k, v in tensors.items()}


def unprefixed(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k[len(prefix) + 1 :]: v for k, v in tensors.items() if k.startswith(prefix + ".")}
