"""What of a stage's time is Ray's: the demo's stages on Ray, and the same stage functions without it.

    python tests/benchmarks/ray_share.py [--repeats 3]

Whole stages in turns, on one worker of one CPU, with Ray started before: as they run by default, through a
task that trains or a Ray Data pipeline in tasks, whose processes are there from the turn before; through the
other way, a Ray Train group of one or a pool of actors; and `plain`, with their loops and mappers called in
this process. What is between them is the start of processes, their imports, and what Ray does while they
work. Last a Ray Tune run of one trial that only imports what a classifier's needs.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from measure import summary, tell

from diffult_ray import build, cluster, config, pipeline
from diffult_ray.allotment import Allotment
from diffult_ray.stages import classifier, generator, images, training
from diffult_ray.store import Store

WAYS = {  # by default, the other one, and without Ray
    "extractor": ("task", "train", "plain"),
    "generator": ("task", "train", "plain"),
    "images": ("tasks", "actors", "plain"),
}


def here(loop: Any, payload: Any, *, resources: Any, work: Path, name: str, site: Any) -> None:
    training.run_here(loop, payload, resources=resources, work=work, site=site)


def mapped(tables: Any, mapper: type, arguments: Any, *, resources: Any, order: Any) -> Iterator[Any]:
    made = mapper(**arguments, given=Allotment.of(resources))
    yield from map(made, tables)


def numbered(tables: Any, **blocks: int) -> list[Any]:
    return [table.append_column("target", [[n] * len(table)]) for n, table in enumerate(tables)]


@contextmanager
def without_ray() -> Iterator[None]:
    changes = [
        (classifier, "train", here), (generator, "train", here), (images, "map_rows", mapped),
        (images, "from_tables", numbered), (images, "count", lambda done, total, order: len(list(done))),
    ]
    with ExitStack() as stack:
        for module, name, own in changes:
            stack.enter_context(mock.patch.object(module, name, own))
        yield


def run(stage: pipeline.Stage, store: Store, way: str) -> float:
    """Seconds."""
    with ExitStack() as stack:
        if way == "plain":
            stack.enter_context(without_ray())
        if way == "train":
            stack.enter_context(mock.patch.object(training, "_train_alone", training._train_together))
        if way == "actors":
            own = stage.resources.model_copy(update={"compute": "actors"})
            stage = replace(stage, resources=own)
        start = time.perf_counter()
        build.build_one(stage, store)
        return time.perf_counter() - start


def trial_of_nothing(config: dict[str, Any]) -> None:
    import torch._dynamo  # which any optimizer imports
    from ray import tune

    from diffult_ray.stages import classifier  # noqa: F401

    tune.report({"accuracy": torch.zeros(1).item()})


def start_of_a_trial(folder: Path) -> float:
    from ray import tune

    start = time.perf_counter()
    tune.Tuner(
        tune.with_resources(trial_of_nothing, {"CPU": 1}),
        run_config=tune.RunConfig(storage_path=str(folder / "tune"), verbose=0),
    ).fit()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="rs-"))
    os.environ["RAY_TMPDIR"] = str(folder / "ray")
    os.environ.pop("RAY_ADDRESS", None)
    one = [f"resources.{name}.{key}=1" for name in WAYS for key in ("workers", "cpus")]
    sweep = config.load("digits", one)
    trial = next(e for e in config.experiments(sweep) if e.method == "diffult")
    wanted = {s.name: s for s in pipeline.stages(trial) if s.name in ("split", *WAYS)}
    seconds: dict[str, dict[str, list[float]]] = {name: {w: [] for w in ways} for name, ways in WAYS.items()}
    trials: list[float] = []
    try:
        cluster.connect("local")
        for turn in range(given.repeats + 1):
            for number in range(3):
                store = Store(folder / f"{turn}-{number}")
                build.build_one(wanted["split"], store)
                for name, ways in WAYS.items():
                    taken = run(wanted[name], store, ways[number])
                    if turn:  # the first turn's imports are this process's own
                        seconds[name][ways[number]].append(taken)
            trials += [start_of_a_trial(folder / str(turn))] if turn else []
    finally:
        cluster.disconnect()
        shutil.rmtree(folder, ignore_errors=True)
    for name, taken in seconds.items():
        usual, other, plain = taken.values()
        between = [a - b for a, b in zip(usual, plain, strict=True)]
        tell(
            f"Ray's share of the demo's {name}", packages=("ray", "torch"),
            seconds={way: summary(each, 2) for way, each in taken.items()}, of_ray=summary(between, 2),
            share=summary([b / a for a, b in zip(usual, between, strict=True)]),
            other_way_more_seconds=summary([a - b for a, b in zip(other, usual, strict=True)], 2),
        )
    tell("start of Ray Tune and of a trial's process", packages=("ray", "torch"), seconds=summary(trials, 2))


if __name__ == "__main__":
    main()
