"""Builds what a plan lacks: each stage once, independent ones side by side as far as they fit."""

from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from typing import Any

from diffult_ray import files
from diffult_ray.cluster import Capacity
from diffult_ray.pipeline import Stage
from diffult_ray.progress import Narrator, clock
from diffult_ray.store import Artifact, Store

BUILDERS = {
    "split": "diffult_ray.stages.split:build",
    "extractor": "diffult_ray.stages.classifier:build_extractor",
    "reference": "diffult_ray.stages.classifier:build_reference",
    "generator": "diffult_ray.stages.generator:build",
    "images": "diffult_ray.stages.images:build",
    "scores": "diffult_ray.stages.scores:build",
    "quality": "diffult_ray.stages.quality:build",
    "classifier": "diffult_ray.stages.classifier:build",
}


@dataclass
class Job:
    """One stage to build, and the shorter ones of its family that it passes on the way."""

    stage: Stage
    milestones: list[Stage] = field(default_factory=list)
    started: float = 0.0

    @property
    def built(self) -> list[Stage]:
        return [*self.milestones, self.stage]

    @property
    def request(self) -> tuple[float, float]:
        """CPUs and GPUs it holds while it runs."""
        r = self.stage.resources
        return (0.0, 0.0) if r is None else (r.workers * r.cpus, r.workers * r.gpus)


def build_one(stage: Stage, store: Store, milestones: Sequence[Stage] = ()) -> list[Artifact]:
    """Build a stage whose inputs are stored, and write its manifest.

    Returns:
        the artifacts of the milestones and of the stage.
    """
    start = time.monotonic()
    module, _, function = BUILDERS[stage.name].partition(":")
    builder = getattr(importlib.import_module(module), function)
    store.work(stage).mkdir(parents=True, exist_ok=True)
    more = {"milestones": {s.config["steps"]: store.folder(s) for s in milestones}} if milestones else {}
    inputs = {name: store.folder(s) for name, s in stage.inputs.items()}
    built = [*milestones, stage]
    for attempt in range(2):
        for s in built:
            store.folder(s).mkdir(parents=True, exist_ok=True)
        builder(
            dict(stage.config), inputs, store.folder(stage),
            resources=stage.resources, work=store.work(stage), **more,
        )
        if all((store.folder(s) / "summary.json").exists() for s in built):
            break
        # Ray Train takes a run for finished whose files are gone: only a clean start brings them back.
        store.discard_work(stage)
        store.work(stage).mkdir(parents=True)
        if attempt:
            raise RuntimeError(f"{stage.label} ended without its summary")
    seconds = time.monotonic() - start
    artifacts = [store.commit(s, seconds=_share(store, s, stage, seconds)) for s in built]
    store.discard_work(stage)
    return artifacts


def _share(store: Store, part: Stage, whole: Stage, seconds: float) -> float:
    """A milestone's seconds: its share of the steps of the run that passed it."""
    return seconds * part.config["steps"] / whole.config["steps"] if part is not whole else seconds


def jobs_for(stages: Sequence[Stage]) -> list[Job]:
    """Jobs in the given order; stages of one family are one job, the longest with milestones."""
    families: dict[str, list[Stage]] = {}
    for stage in stages:
        families.setdefault(stage.family, []).append(stage)
    jobs = []
    for members in families.values():
        *shorter, longest = sorted(members, key=lambda s: s.config.get("steps") or 0)
        jobs.append(Job(longest, shorter))
    return jobs


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
    waiting = jobs_for([s for s in stages if store.find(s) is None])
    failed: dict[str, Exception] = {}
    running: dict[Future[Any], Job] = {}
    while waiting or running:
        _drop_hopeless(waiting, failed)
        for job in _startable(waiting, running, capacity, store):
            waiting.remove(job)
            narrator.say(f"{_names(job)}: started")
            running[_start(job, store)] = job
        done, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
        for future in done:
            _finish(running.pop(future), future, failed, narrator, on_built)
        for job in running.values():
            _tell(job, store, narrator)
    return failed


def _start(job: Job, store: Store) -> Future[list[Artifact]]:
    """Build in a daemon thread: an interrupted driver does not wait for what it has given up."""
    future: Future[list[Artifact]] = Future()
    job.started = time.monotonic()

    def work() -> None:
        try:
            future.set_result(build_one(job.stage, store, job.milestones))
        except BaseException as error:  # handed to the waiting main thread, whatever it is
            future.set_exception(error)

    threading.Thread(target=work, name=job.stage.label, daemon=True).start()
    return future


def _startable(waiting, running, capacity: Capacity, store: Store) -> list[Job]:
    """Jobs in order whose inputs are stored and which fit beside what runs."""
    cpus = capacity.cpus - sum(j.request[0] for j in running.values())
    gpus = capacity.gpus - sum(j.request[1] for j in running.values())
    ready = []
    for job in waiting:
        if any(store.find(s) is None for s in job.stage.inputs.values()):
            continue
        if job.request[0] > cpus + 1e-9 or job.request[1] > gpus + 1e-9:
            break  # first come, first served: nothing passes a large job for ever
        cpus, gpus = cpus - job.request[0], gpus - job.request[1]
        ready.append(job)
    return ready


def _drop_hopeless(waiting: list[Job], failed: dict[str, Exception]) -> None:
    for job in list(waiting):
        causes = [failed[s.key] for s in job.stage.walk() if s.key in failed]
        if causes:
            waiting.remove(job)
            failed.update({s.key: causes[0] for s in job.built})


def _finish(job: Job, future, failed, narrator: Narrator, on_built) -> None:
    error = future.exception()
    if error is not None:
        failed.update({s.key: error for s in job.built})
        narrator.say(f"{_names(job)}: FAILED, {first_line(error)}")
        return
    took = time.monotonic() - job.started
    for stage, artifact in zip(job.built, future.result(), strict=True):
        on_built(stage, artifact)
    narrator.say(f"{_names(job)}: done in {clock(took)}{_figures(future.result()[-1].summary)}")


def _tell(job: Job, store: Store, narrator: Narrator) -> None:
    try:
        progress = files.read_json(store.work(job.stage) / "progress.json")
    except (OSError, ValueError):
        return
    detail = f"loss {progress['loss']:.4f}" if "loss" in progress else ""
    narrator.progress(_names(job), progress["done"], progress["total"], job.started, detail)


def _names(job: Job) -> str:
    steps = [str(s.config["steps"]) for s in job.built if s.name == "generator"]
    return job.stage.label + (f" ({', '.join(steps)} steps)" if steps else "")


FIGURES = (
    ("accuracy", "accuracy {:.1f}%"), ("loss", "loss {:.4f}"), ("images", "{} images"),
    ("fid", "FID {:.2f}"), ("inception_score", "IS {:.2f}"), ("p_ood", "OOD {:.1%}"),
    ("images_per_second", "{:.0f} images/s"),
)


def _figures(summary: dict[str, Any]) -> str:
    told = [text.format(summary[k]) for k, text in FIGURES if summary.get(k) is not None]
    return f" ({', '.join(told)})" if told else ""


def first_line(error: BaseException) -> str:
    """The last line of an error's text: in a Ray error, the cause in the worker."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:300]
