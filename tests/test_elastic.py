"""The generator on machines that come and go: as many workers as there is room for, and the same losses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from diffult_ray import files
from tests.building import Building
from tests.conftest import TINY, temporary_folder
from tests.machines import Cluster, wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

STEPS = "generator.steps=1200"
ROUNDING = {"rel": 5e-3, "abs": 2e-3}


@pytest.fixture(scope="module")
def short_folder() -> Iterator[Path]:
    yield from temporary_folder()


@pytest.fixture(scope="module")
def cluster(short_folder: Path) -> Iterator[Cluster]:
    made = Cluster(short_folder / "c")
    try:
        yield made.up()
    finally:
        made.down()


@pytest.fixture(scope="module")
def start(cluster: Cluster, short_folder: Path):
    """Starts to build a generator in a storage of that name."""
    sweep = short_folder / "tiny.yaml"
    sweep.write_text(TINY.replace("resources: {generator: {workers: 2}}", "resources: {}"))

    def make(name: str, *overrides: str) -> Building:
        return Building(cluster, str(sweep), short_folder / name, "generator", STEPS, *overrides)

    return make


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in files.read_json(folder / "history.json")]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return files.read_tensors(next((folder / "unet").glob("*.safetensors")))


def alike(one: Path, other: Path) -> None:
    """Equal but for the order in which floating-point numbers are added up."""
    assert losses(one) == pytest.approx(losses(other), **ROUNDING)
    for name, tensor in weights(one).items():
        torch.testing.assert_close(weights(other)[name], tensor, rtol=0.05, atol=2e-2, msg=name)


@pytest.fixture(scope="module")
def alone(cluster: Cluster, start) -> Path:
    """Trained by one worker, undisturbed."""
    machine, build = cluster.add(), start("alone")
    build.end()
    machine.vanish()
    return build.folder


def test_it_goes_on_with_more_and_with_fewer_workers_and_trains_the_same(cluster, start, alone):
    first = cluster.add()
    build = start("elastic", "resources.generator.max_workers=3")
    wait_for(lambda: build.done and build.workers() == 1)
    second = cluster.add(cpus=2)
    wait_for(lambda: build.workers() == 3)
    reached = build.done
    wait_for(lambda: build.done > reached)
    second.vanish()
    wait_for(lambda: build.workers() == 1)
    build.end()
    first.vanish()
    alike(alone, build.folder)


@pytest.mark.parametrize("workers", [2, 3])
def test_workers_with_uneven_shares_of_a_batch_train_what_one_does(cluster, start, alone, workers):
    machines = [cluster.add() for _ in range(workers)]
    build = start(f"of{workers}", f"resources.generator.workers={workers}")
    build.end()
    for machine in machines:
        machine.vanish()
    alike(alone, build.folder)


@pytest.mark.parametrize(("workers", "process"), [(1, "ray::generator"), (2, "RayTrainWorker")])
def test_a_drained_machines_checkpoint_is_written_before_it_goes(cluster, start, alone, workers, process):
    """And the training ends on another machine, having lost what it did in a few seconds."""
    first, notice = cluster.add(cpus=workers), 20
    build = start(f"drained{workers}", f"resources.generator.workers={workers}")
    wait_for(lambda: build.done > 50)
    second = cluster.add(cpus=workers)
    before = max(build.checkpoints.values(), default=0.0)
    cluster.drain(first, notice)
    wait_for(lambda: max(build.checkpoints.values(), default=0.0) > before, notice)
    assert first.processes(process) and not second.processes(process)
    first.vanish()
    wait_for(lambda: second.processes(process))
    build.end()
    second.vanish()
    alike(alone, build.folder)
