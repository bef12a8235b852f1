"""Builds what a plan lacks: each stage once, independent ones side by side as far as they fit."""

from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import Any

from diffult_ray import files, lease
from diffult_ray.cluster import Capacity
from diffult_ray.pipeline import Stage
from diffult_ray.progress import Narrator, clock
from diffult_ray.stages import Order
from diffult_ray.store import Artifact, Store

BUILDERS = {
    "split": "diffult_ray.stages.split:build",
    "extractor": "diffult_ray.stages.classifier:build_extractor",
    "reference": "diffult_ray.stages.classifier:build_reference",
    "inception": "diffult_ray.stages.inception:build",
    "generator": "diffult_ray.stages.generator:build",
    "images": "diffult_ray.stages.images:build",
    "scores": "diffult_ray.stages.scores:build",
    "quality": "diffult_ray.stages.quality:build",
    "classifier": "diffult_ray.stages.classifier:build",
}


# Stages of these names share one pipeline when they are ready together: its start costs more than they do.
TOGETHER = frozenset({"images", "scores", "quality"})
TOGETHER_AT_MOST = 16


@dataclass
class Job:
    """Stages that are built together: a generator and its prefixes, or pools that share their actors."""

    stages: list[Stage]
    started: float = 0.0

    @property
    def stage(self) -> Stage:
        """The one whose work folder tells of progress."""
        return self.stages[-1] if self.name == "generator" else self.stages[0]

    @property
    def name(self) -> str:
        return self.stages[0].name

    @property
    def inputs(self) -> list[Stage]:
        return [i for s in self.stages for i in s.inputs.values()]

    @property
    def request(self) -> tuple[float, float]:
        """CPUs and GPUs it holds while it runs."""
        r = self.stage.resources
        return (0.0, 0.0) if r is None else (r.workers * r.cpus, r.workers * r.gpus)


def build_one(stage: Stage, store: Store) -> Artifact:
    """Build a stage whose inputs are stored, and write its manifest."""
    return build_together([stage], store)[0]


def build_together(
    stages: Sequence[Stage], store: Store, tell: Callable[[str], None] | None = None
) -> list[Artifact]:
    """Build stages of one name in one go, and write their manifests.

    What another process builds is waited for, and is then found; what a dead one has left goes on.

    Args:
        tell: told of what is waited for.

    Raises:
        RuntimeError: if a stage ended without its summary, twice.
        lease.Lost: if another process has taken this one for dead; what it builds is not touched.
    """
    with store.hold(lease.names_for(stages), tell) as held:
        found = {s.key: store.locate(s) for s in stages}
        missing = [s for s in stages if found[s.key] is None]
        if missing:
            built = _build_missing(missing, store, held)
            found.update(zip((s.key for s in missing), built, strict=True))
    return [found[s.key] for s in stages]


def _build_missing(stages: Sequence[Stage], store: Store, held: lease.Held) -> list[Artifact]:
    start = time.monotonic()
    _check_inputs(stages, store)
    module, _, function = BUILDERS[stages[0].name].partition(":")
    builder = getattr(importlib.import_module(module), function)
    orders = [_order(s, store) for s in stages]
    for attempt in (1, 2):
        _run(builder, orders, stages[0].resources)
        held.check()
        if all((order.out / "summary.json").exists() for order in orders):
            break
        # Ray Train takes a run for finished whose files are gone: only a clean start brings them back.
        for stage in stages:
            store.discard_work(stage)
        if attempt == 2:
            raise RuntimeError(f"{stages[0].label} ended without its summary")
    seconds = time.monotonic() - start
    artifacts = [store.commit(s, seconds=seconds * share) for s, share in _shares(stages)]
    for stage in stages:
        store.discard_work(stage)
    return artifacts


def _check_inputs(stages: Sequence[Stage], store: Store) -> None:
    """Raises RuntimeError unless all inputs are whole on this machine, perhaps the first to use them here."""
    for stage in {s.key: s for each in stages for s in each.inputs.values()}.values():
        if store.find(stage) is None:
            raise RuntimeError(f"{stage.label} is gone or damaged; the same command builds it again")


def _run(builder: Callable[..., None], orders: Sequence[Order], resources: Any) -> None:
    """Build; of a build that fails before its first file, no folder stays that it made."""
    folders = [folder for order in orders for folder in (order.work, order.out)]
    made = [each for folder in folders for each in (folder, *files.missing(folder.parent))]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    try:
        builder(orders, resources)
    except BaseException:
        files.remove_empty(made)  # an interrupted build goes on from what is in them
        raise


def _order(stage: Stage, store: Store) -> Order:
    return Order(
        config=dict(stage.config),
        inputs={name: store.folder(s) for name, s in stage.inputs.items()},
        out=store.folder(stage),
        work=store.work(stage),
        site=store.site,
    )


def _shares(stages: Sequence[Stage]) -> list[tuple[Stage, float]]:
    """Each stage with its share of the seconds: all for the longest of prefixes, equal for pools."""
    if stages[0].name == "generator":
        return [(s, s.config["steps"] / stages[-1].config["steps"]) for s in stages]
    return [(s, 1 / len(stages)) for s in stages]


def jobs_for(stages: Sequence[Stage]) -> list[Job]:
    """Jobs in the given order; generators of one family are one job, the longest last."""
    families: dict[str, list[Stage]] = {}
    for stage in stages:
        families.setdefault(stage.family, []).append(stage)
    return [Job(sorted(each, key=lambda s: s.config.get("steps") or 0)) for each in families.values()]


def build_all(
    stages: Sequence[Stage],
    store: Store,
    capacity: Capacity,
    narrator: Narrator,
    on_built: Callable[[Stage, Artifact], None],
) -> dict[str, Exception]:
    """Build what is not stored of `stages` (inputs first).

    Returns:
        {key of a stage that failed or could not start: its error}; the others are built.
    """
    waiting = jobs_for([s for s in stages if store.locate(s) is None])
    failed: dict[str, Exception] = {}
    running: dict[Future[Any], Job] = {}
    while waiting or running:
        _drop_hopeless(waiting, failed)
        if not running:
            _add_lost(waiting, store)
        for job in _startable(waiting, running, capacity, store):
            narrator.say(f"{_names(job)}: started")
            running[_start(job, store, narrator)] = job
        done, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
        for future in done:
            _finish(running.pop(future), future, failed, narrator, on_built)
        for job in running.values():
            _tell(job, store, narrator)
    return failed


def _start(job: Job, store: Store, narrator: Narrator) -> Future[list[Artifact]]:
    """Build in a daemon thread: an interrupted driver does not wait for what it has given up."""
    future: Future[list[Artifact]] = Future()
    job.started = time.monotonic()

    def work() -> None:
        try:
            future.set_result(build_together(job.stages, store, narrator.say))
        except BaseException as error:  # handed to the waiting main thread, whatever it is
            future.set_exception(error)

    threading.Thread(target=work, name=job.stage.label, daemon=True).start()
    return future


def _startable(waiting: list[Job], running, capacity: Capacity, store: Store) -> list[Job]:
    """Jobs in order whose inputs are stored and which fit beside what runs; taken off `waiting`."""
    cpus = capacity.cpus - sum(j.request[0] for j in running.values())
    gpus = capacity.gpus - sum(j.request[1] for j in running.values())
    ready = [j for j in waiting if all(store.ready(s) for s in j.inputs)]
    chosen: list[Job] = []
    while ready:
        job = ready.pop(0)
        if job.request[0] > cpus + 1e-9 or job.request[1] > gpus + 1e-9:
            break  # first come, first served: nothing passes a large job for ever
        cpus, gpus = cpus - job.request[0], gpus - job.request[1]
        waiting.remove(job)
        for other in [o for o in ready if _may_join(job, o)]:
            job.stages += other.stages
            waiting.remove(other)
            ready.remove(other)
        chosen.append(job)
    return chosen


def _add_lost(waiting: list[Job], store: Store) -> None:
    """Put what was stored at the start, and was damaged or removed since, before those that wait for it."""
    known = {s.key for j in waiting for s in j.stages}
    needed = {s.key: s for j in waiting for i in j.inputs for s in i.walk() if s.key not in known}
    waiting[:0] = jobs_for([s for s in needed.values() if store.locate(s) is None])


def _may_join(job: Job, other: Job) -> bool:
    alike = job.name == other.name and job.stage.resources == other.stage.resources
    return alike and job.name in TOGETHER and len(job.stages) < TOGETHER_AT_MOST


def _drop_hopeless(waiting: list[Job], failed: dict[str, Exception]) -> None:
    for job in list(waiting):
        causes = [failed[i.key] for s in job.stages for i in s.walk() if i.key in failed]
        if causes:
            waiting.remove(job)
            failed.update({s.key: causes[0] for s in job.stages})


def _finish(job: Job, future, failed, narrator: Narrator, on_built) -> None:
    error = future.exception()
    if error is not None:
        failed.update({s.key: error for s in job.stages})
        narrator.say(f"{_names(job)}: FAILED, {first_line(error)}")
        return
    took = time.monotonic() - job.started
    for stage, artifact in zip(job.stages, future.result(), strict=True):
        on_built(stage, artifact)
    narrator.say(f"{_names(job)}: done in {clock(took)}{_figures(future.result()[-1].summary)}")


def _tell(job: Job, store: Store, narrator: Narrator) -> None:
    progress = store.progress(job.stage)
    if progress is None:
        return
    detail = f"loss {progress['loss']:.4f}" if "loss" in progress else ""
    narrator.progress(_names(job), progress["done"], progress["total"], detail)


def _names(job: Job) -> str:
    if job.name == "generator":
        return f"{job.stage.label} ({', '.join(str(s.config['steps']) for s in job.stages)} steps)"
    return ", ".join([job.stages[0].label, *(s.key[:8] for s in job.stages[1:])])


FIGURES = (
    ("accuracy", "accuracy {:.1f}%"), ("loss", "loss {:.4f}"), ("images", "{} images"),
    ("fid", "FID {:.2f}"), ("inception_score", "IS {:.2f}"), ("kid", "KID {:.4f}"),
    ("memorised", "memorised {:.1%}"), ("p_ood", "OOD {:.1%}"),
    ("images_per_second", "{:.0f} images/s"),
)


def _figures(summary: dict[str, Any]) -> str:
    told = [text.format(summary[k]) for k, text in FIGURES if summary.get(k) is not None]
    return f" ({', '.join(told)})" if told else ""


def first_line(error: BaseException) -> str:
    """The last line of an error's text: in a Ray error, the cause in the worker."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:300]
