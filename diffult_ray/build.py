"""Builds what a plan lacks: each stage once, independent ones side by side as far as they fit."""

from __future__ import annotations

import contextlib
import importlib
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, InvalidStateError, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffult_ray import fence, files, footprint, interruption, lease, prefix
from diffult_ray.budget import OverBudget, Purse
from diffult_ray.cluster import Capacity
from diffult_ray.pipeline import Stage
from diffult_ray.placement import NotPlaced, Watch, grown
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
ATTEMPTS = 3  # of a job whose machines are lost under it


@dataclass
class Job:
    """Stages that are built together: a generator and its prefixes, or pools that share a pipeline."""

    stages: list[Stage]
    started: float = 0.0
    watch: Watch | None = None

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
        """CPUs and GPUs without which it does not start."""
        r = self.stage.resources
        return (0.0, 0.0) if r is None else (r.workers * r.cpus, r.workers * r.gpus)

    @property
    def held(self) -> tuple[float, float]:
        """CPUs and GPUs that it may hold while it runs: an elastic one takes what is left."""
        r = self.stage.resources
        most = 0 if r is None else getattr(r, "most", r.workers)
        return (most * r.cpus, most * r.gpus) if most else (0.0, 0.0)


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
    for attempt in (1, 2):
        orders = _run(builder, stages, store)
        held.check()
        if all((order.out / "summary.json").exists() for order in orders):
            break
        # Ray Train takes a run for finished whose files are gone: only a clean start brings them back.
        for stage in stages:
            store.discard_work(stage)
        if attempt == 2:
            raise RuntimeError(f"{stages[0].label} ended without its summary")
    seconds = time.monotonic() - start
    peaks = footprint.collected({order.work: order.site for order in orders})
    artifacts = [
        store.commit(s, made=order.out, seconds=_whole(order.out, seconds * share), peaks=peaks)
        for (s, share), order in zip(_shares(stages), orders, strict=True)
    ]
    for stage in stages:
        store.discard_work(stage)
    return artifacts


def tidy(stages: Sequence[Stage], store: Store) -> None:
    """Remove what a driver that was killed after its last manifest has left of finished builds."""
    families: dict[str, list[Stage]] = {}
    for stage in stages:
        families.setdefault(stage.family, []).append(stage)
    for family in families.values():
        if store.has_work(family[0]) and all(store.locate(s) for s in family):
            with store.hold(lease.names_for(family)):
                store.discard_work(family[0])


def _check_inputs(stages: Sequence[Stage], store: Store) -> None:
    """Raises RuntimeError unless all inputs are whole on this machine, perhaps the first to use them here."""
    for stage in {s.key: s for each in stages for s in each.inputs.values()}.values():
        if store.find(stage) is None:
            raise RuntimeError(f"{stage.label} is gone or damaged; the same command builds it again")


def _run(builder: Callable[..., None], stages: Sequence[Stage], store: Store) -> list[Order]:
    """Build in rooms of this build's own; of one that fails before its first file, no folder stays."""
    folders = list(dict.fromkeys(map(store.work, stages)))
    made = [each for folder in folders for each in (folder, *files.missing(folder.parent))]
    rooms = {folder: store.enter(folder) for folder in folders}
    orders = [_order(s, store, rooms[store.work(s)], stages) for s in stages]
    try:
        for order in orders:
            order.out.mkdir(parents=True, exist_ok=True)
        builder(orders, stages[0].resources)
    except BaseException:
        for room in rooms.values():
            store.leave(room)
        files.remove_empty(made)  # an interrupted build goes on from what is in them
        raise
    return orders


def _whole(out: Path, seconds: float) -> float:
    """Seconds from nothing, also of a training that went on from a checkpoint or from a shorter one."""
    return max(seconds, files.read_json(out / "summary.json").get("train_seconds") or 0.0)


def _order(stage: Stage, store: Store, room: Path, together: Sequence[Stage]) -> Order:
    inputs = {name: store.folder(s) for name, s in stage.inputs.items()}
    begun = prefix.start(together[0] if stage.name == "generator" else stage, store)
    if begun is not None and store.locate(begun) is not None:
        inputs["start"] = store.folder(begun)
    return Order(
        config=dict(stage.config),
        inputs=inputs,
        out=room / fence.OUTS / stage.key,
        work=room,
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


def _jobs(stages: Sequence[Stage], store: Store) -> list[Job]:
    """As `jobs_for`, but no job passes a stored generator that a part of it can go on from."""
    return [Job(run) for job in jobs_for(stages) for run in prefix.runs(job.stages, store)]


def build_all(
    stages: Sequence[Stage],
    store: Store,
    capacity: Capacity,
    narrator: Narrator,
    on_built: Callable[[Stage, Artifact], None],
    purse: Purse,
) -> dict[str, Exception]:
    """Build what is not stored of `stages` (inputs first), as far as the budget goes.

    Returns:
        {key of a stage that failed or could not start: its error}; the others are built. Of one that
        was left for the budget, or for lack of one that was, the error is `OverBudget`.
    """
    waiting = _jobs([s for s in stages if store.locate(s) is None], store)
    failed: dict[str, Exception] = {}
    running: dict[Future[Any], Job] = {}
    try:
        while waiting or running:
            interruption.check()
            _leave(waiting, store, purse, failed, narrator)
            _drop_hopeless(waiting, failed)
            if not running:
                _add_lost(waiting, store)
            for job in _startable(waiting, running, grown(capacity), store, purse):
                narrator.say(f"{_names(job)}: started")
                running[_start(job, store, narrator)] = job
            wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
            for future, job in list(running.items()):
                _give_up(job, future)
                if future.done():
                    purse.settle(job.stages)
                    _finish(running.pop(future), future, failed, narrator, on_built)
            for job in running.values():
                _tell(job, store, narrator)
    finally:  # of an interrupted driver, whose threads are not to try again
        for future in running:
            future.cancel()
    return failed


def _start(job: Job, store: Store, narrator: Narrator) -> Future[list[Artifact]]:
    """Build in a daemon thread: an interrupted driver does not wait for what it has given up."""
    future: Future[list[Artifact]] = Future()
    job.started, job.watch = time.monotonic(), Watch(job.stage.resources)

    def work() -> None:
        with contextlib.suppress(InvalidStateError):  # given up: nobody waits for it any more
            try:
                future.set_result(_built(job, store, narrator, future))
            except BaseException as error:  # handed to the waiting main thread, whatever it is
                future.set_exception(error)

    threading.Thread(target=work, name=job.stage.label, daemon=True).start()
    return future


def _built(job: Job, store: Store, narrator: Narrator, future: Future[Any]) -> list[Artifact]:
    """Again where a machine or a process was lost in a way that Ray gives up at; what was made is kept.

    Args:
        future: done where nobody waits for it any more.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return build_together(job.stages, store, narrator.say)
        except Exception as error:
            if attempt == ATTEMPTS or future.done() or not _is_loss(error):
                raise
            narrator.say(f"{_names(job)}: {first_line(error)}; it goes on")
    raise AssertionError("unreachable")


def _is_loss(error: BaseException | None) -> bool:
    """Whether a machine or process that went is the cause, and not what ran on it.

    An actor whose constructor raises has died, too, as Ray tells it; it would again.
    """
    from ray import exceptions

    losses = (
        exceptions.RayActorError, exceptions.NodeDiedError, exceptions.WorkerCrashedError,
        exceptions.ObjectLostError, exceptions.LocalRayletDiedError, exceptions.UnserializableException,
    )
    while error is not None:
        if isinstance(error, losses):
            return "creation task" not in str(error)
        error = error.__cause__ or error.__context__
    return False


def _give_up(job: Job, future: Future[list[Artifact]]) -> None:
    """No longer wait for what has had no place for too long: Ray would for ever."""
    refusal = None if future.done() else job.watch.refusal()
    if refusal:
        with contextlib.suppress(InvalidStateError):  # it has ended just now
            future.set_exception(NotPlaced(refusal))


def _is_ready(job: Job, store: Store) -> bool:
    return all(store.ready(s) for s in job.inputs)


def _leave(waiting: list[Job], store: Store, purse: Purse, failed: dict[str, Exception], narrator) -> None:
    """Take off `waiting` what the budget will not pay for: of generators of one family, the longest first."""
    for job in [j for j in waiting if purse.limits and _is_ready(j, store)]:
        while job.stages and (reason := purse.lacks(job.stages)):
            stage = job.stages.pop()
            failed[stage.key] = OverBudget(reason)
            narrator.say(f"{_names(Job([stage]))}: left, {reason}")
        if not job.stages:
            waiting.remove(job)


def _startable(waiting: list[Job], running, capacity: Capacity, store: Store, purse: Purse) -> list[Job]:
    """Jobs in order whose inputs are stored and which fit beside what runs; taken off `waiting`."""
    cpus = capacity.cpus - sum(j.held[0] for j in running.values())
    gpus = capacity.gpus - sum(j.held[1] for j in running.values())
    busy = {j.stage.family for j in running.values()}
    ready = [j for j in waiting if _is_ready(j, store)]
    chosen: list[Job] = []
    while ready:
        job = ready.pop(0)
        if job.request[0] > cpus + 1e-9 or job.request[1] > gpus + 1e-9:
            break  # first come, first served: nothing passes a large job for ever
        if job.stage.family in busy:
            continue  # they share a work folder
        if not purse.take(job.stages):
            continue  # until what runs has ended, perhaps sooner than was estimated
        busy.add(job.stage.family)
        cpus, gpus = cpus - job.held[0], gpus - job.held[1]
        waiting.remove(job)
        for other in list(ready):
            if _may_join(job, other) and purse.take(other.stages):
                job.stages += other.stages
                waiting.remove(other)
                ready.remove(other)
        chosen.append(job)
    return chosen


def _add_lost(waiting: list[Job], store: Store) -> None:
    """Put what was stored at the start, and was damaged or removed since, before those that wait for it."""
    known = {s.key for j in waiting for s in j.stages}
    needed = {s.key: s for j in waiting for i in j.inputs for s in i.walk() if s.key not in known}
    waiting[:0] = _jobs([s for s in needed.values() if store.locate(s) is None], store)


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
    progress, moves = store.progress(job.stage), False
    if progress is not None:
        detail = f"loss {progress['loss']:.4f}" if "loss" in progress else ""
        moves = narrator.progress(_names(job), progress["done"], progress["total"], detail)
    if not moves:
        narrator.waits(_names(job), time.monotonic() - job.started)


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
