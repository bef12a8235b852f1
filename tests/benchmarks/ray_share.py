"""What of a stage's time is Ray's: the demo's stages on Ray, and the same stage functions without it.

    python tests/benchmarks/ray_share.py [--repeats 3]

Whole stages in turns, on one worker of one CPU, with Ray started before: `ray` through a task that trains or
a Ray Data pipeline, `plain` with their loops and mappers called in this process. What
is between them is the start of processes, their imports, and what Ray does while they work.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from measure import summary, tell

from diffult_ray import build, cluster, config, pipeline
from diffult_ray.allotment import Allotment
from diffult_ray.stages import classifier, generator, images, training
from diffult_ray.store import Store

STAGES = ("extractor", "generator", "images")


def here(loop: Any, payload: Any, *, resources: Any, work: Path, name: str, site: Any) -> None:
    training.run_here(loop, payload, resources=resources, work=work, site=site)


def mapped(tables: Any, mapper: type, arguments: Any, *, resources: Any, order: Any) -> Iterator[Any]:
    made = mapper(**arguments, given=Allotment.of(resources))
    yield from map(made, tables)


def numbered(tables: Any) -> list[Any]:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="rs-"))
    os.environ["RAY_TMPDIR"] = str(folder / "ray")
    os.environ.pop("RAY_ADDRESS", None)
    one = [f"resources.{name}.{key}=1" for name in STAGES for key in ("workers", "cpus")]
    sweep = config.load("digits", one)
    trial = next(e for e in config.experiments(sweep) if e.method == "diffult")
    wanted = {s.name: s for s in pipeline.stages(trial) if s.name in ("split", *STAGES)}
    seconds: dict[str, dict[str, list[float]]] = {name: {"ray": [], "plain": []} for name in STAGES}
    try:
        cluster.connect("local")
        for turn in range(given.repeats + 1):
            for way in ("ray", "plain"):
                store = Store(folder / f"{turn}-{way}")
                build.build_one(wanted["split"], store)
                for name in STAGES:
                    start = time.perf_counter()
                    if way == "ray":
                        build.build_one(wanted[name], store)
                    else:
                        with without_ray():
                            build.build_one(wanted[name], store)
                    if turn:  # the first turn's imports are this process's own
                        seconds[name][way].append(time.perf_counter() - start)
    finally:
        cluster.disconnect()
        shutil.rmtree(folder, ignore_errors=True)
    for name, taken in seconds.items():
        between = [a - b for a, b in zip(taken["ray"], taken["plain"], strict=True)]
        tell(
            f"Ray's share of the demo's {name}", packages=("ray", "torch"),
            seconds={way: summary(each, 2) for way, each in taken.items()}, of_ray=summary(between, 2),
            share=summary([b / a for a, b in zip(taken["ray"], between, strict=True)]),
        )


if __name__ == "__main__":
    main()
