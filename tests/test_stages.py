"""Stages on a real Ray cluster: what workers, pools, batches and killed processes do not change."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from diffult_ray import config, files, pipeline
from diffult_ray.build import build_one, build_together
from diffult_ray.stages import pool as pool_module
from diffult_ray.store import Store
from tests.conftest import TINY

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    path = tmp_path_factory.mktemp("sweep") / "tiny.yaml"
    path.write_text(TINY)

    def make(*overrides: str) -> config.Experiment:
        sweep = config.load(str(path), ["search.filter.threshold.grid=[2]", *overrides])
        return next(e for e in config.experiments(sweep) if e.method == "diffult")

    return make


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return Store(tmp_path_factory.mktemp("storage"))


def build(stage: pipeline.Stage, store: Store) -> Path:
    for each in stage.walk():
        if store.find(each) is None:
            build_one(each, store)
    return store.folder(stage)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return files.read_tensors(next((folder / "unet").glob("*.safetensors")))


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in files.read_json(folder / "history.json")]


def wait_for(condition: Callable[[], object], seconds: float = 120) -> object:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError("the condition did not come true")


def processes_called(name: str) -> list[int]:
    """Ids of this user's processes whose title holds a name."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            title = (entry / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if name in title and f"RAY_TMPDIR={os.environ['RAY_TMPDIR']}" in _environment(entry):
            found.append(int(entry.name))
    return found


def _environment(entry: Path) -> str:
    try:
        return (entry / "environ").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def progress(store: Store, stage: pipeline.Stage) -> int:
    return (store.progress(stage) or {"done": 0})["done"]


def build_and_kill(
    stage: pipeline.Stage, store: Store, victim: str, has_checkpoint: Callable[[], object]
) -> None:
    """Build, and once there is a checkpoint, kill the processes whose title holds the victim's name."""
    failed: list[BaseException] = []

    def work() -> None:
        try:
            build(stage, store)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    wait_for(has_checkpoint)
    wait_for(lambda: progress(store, stage) > 100)
    victims = wait_for(lambda: processes_called(victim))
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    thread.join()
    assert failed == []


@pytest.mark.parametrize("overrides", [
    ["generator.regulariser=none"],
    ["generator.regulariser=cbdm"],
    ["generator.regulariser=cbdm", "generator.label_drop_scope=sample", "generator.balanced_batches=true"],
    ["generator.objective=edm", "generation.sampler=heun"],
], ids=["ddpm", "cbdm", "by sample", "edm"])
def test_two_ddp_workers_train_what_one_does(cluster, experiment, tmp_path, overrides):
    one, two = Store(tmp_path / "one"), Store(tmp_path / "two")
    overrides = [*overrides, "generator.steps=60"]
    alone = build(pipeline.generator(experiment(*overrides, "resources.generator.workers=1")), one)
    shared = build(pipeline.generator(experiment(*overrides, "resources.generator.workers=2")), two)
    assert losses(shared) == pytest.approx(losses(alone), rel=2e-3)
    assert losses(alone)[-1] < 0.6 * losses(alone)[0]
    for name, tensor in weights(alone).items():
        torch.testing.assert_close(weights(shared)[name], tensor, rtol=0.05, atol=5e-3, msg=name)


def test_switches_change_no_result(cluster, experiment, tmp_path):
    short = ["generator.steps=40", "resources.generator.workers=1"]
    usual = build(pipeline.generator(experiment(*short)), Store(tmp_path / "usual"))
    off = build(pipeline.generator(experiment(*short, "resources.generator.keep_memory=false")),
                Store(tmp_path / "off"))
    assert losses(off) == losses(usual)
    for workers in (1, 2):
        parts = ["resources.generator.accumulate=3", f"resources.generator.workers={workers}"]
        stage = pipeline.generator(experiment("generator.steps=40", *parts))
        accumulated = build(stage, Store(tmp_path / f"accumulated-{workers}"))
        assert losses(accumulated) == pytest.approx(losses(usual), rel=2e-3)
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler on a CPU")
    compiled = build(pipeline.generator(experiment(*short, "resources.generator.compile=true")),
                     Store(tmp_path / "compiled"))
    assert losses(compiled) == pytest.approx(losses(usual), rel=2e-3)
    assert weights(compiled).keys() == weights(usual).keys()


@pytest.mark.parametrize(("overrides", "samplers"), [
    (["generator.aid_weight=0.1"], ["ddpm", "ddim", "dpmsolver++"]),
    (["generator.objective=edm", "generator.aid_weight=0.1", "generator.augment=0.1"],
     ["heun", "dpmsolver++"]),
], ids=["ddpm", "edm"])
def test_a_guided_generator_is_trained_beside_its_extractor_and_sampled(
    cluster, experiment, store, overrides, samplers
):
    """Two workers, and every sampler of the objective."""
    pools = []
    for sampler in samplers:
        stage = pipeline.images(experiment(*overrides, f"generation.sampler={sampler}", "generation.steps=8"))
        pools.append(pool_of(build(stage, store)))
    assert "extractor" in stage.inputs["generator"].inputs
    found = losses(store.folder(stage.inputs["generator"]))
    assert found[-1] < 0.7 * found[0]
    for pool in pools:
        pixels = pool_module.decode(pool["image"].to_pylist())
        assert len(pixels) == pools[0].num_rows > 0 and pixels.std() > 20


@pytest.mark.parametrize("dropout", [0, 0.2])
def test_a_killed_training_worker_goes_on_from_its_checkpoint(
    cluster, experiment, store, tmp_path, monkeypatch, dropout
):
    """The run that was hit ends with the weights of the run that was not."""
    overrides = ["generator.steps=600", "resources.generator.workers=1", f"generator.dropout={dropout}"]
    undisturbed = build(pipeline.generator(experiment(*overrides)), store)
    hit = Store(tmp_path)
    stage = pipeline.generator(experiment(*overrides, "tune.seed=0"))
    monkeypatch.setattr("diffult_ray.stages.training.CHECKPOINT_SECONDS", 0.5)
    build_and_kill(
        stage, hit, "ray::generator", lambda: list(hit.work(stage).glob("**/checkpoint*/state.safetensors"))
    )
    assert losses(hit.folder(stage)) == losses(undisturbed)
    for name, tensor in weights(undisturbed).items():
        assert torch.equal(weights(hit.folder(stage))[name], tensor), name


def pool_of(folder: Path):
    return pq.read_table(folder / "pool").sort_by([("label", "ascending"), ("id", "ascending")])


def test_a_pool_depends_neither_on_workers_nor_on_batches(cluster, experiment, store, tmp_path, monkeypatch):
    stage = pipeline.images(experiment("resources.images.workers=1"))
    expected = pool_of(build(stage, store))
    other = Store(tmp_path)
    (tmp_path / "artifacts").mkdir()
    for needed in ("split", "generator"):
        (tmp_path / "artifacts" / needed).symlink_to(store.root / "artifacts" / needed)
    monkeypatch.setattr("diffult_ray.stages.dataflow.BLOCK_ROWS", 37)
    two = pipeline.images(experiment("resources.images.workers=2", "resources.images.cpus=0.8"))
    assert two.key == stage.key
    assert pool_of(build(two, other)).equals(expected)


@pytest.mark.parametrize("compute", ["actors", "tasks"])
def test_a_killed_sampler_changes_nothing(cluster, experiment, store, tmp_path, monkeypatch, compute):
    slowly = ("generation.steps=60", "generation.sampler=ddim")
    stage = pipeline.images(experiment(*slowly, f"resources.images.compute={compute}"))
    expected = pool_of(build(stage, store))
    other = Store(tmp_path)
    (tmp_path / "artifacts").mkdir()
    for needed in ("split", "generator"):
        (tmp_path / "artifacts" / needed).symlink_to(store.root / "artifacts" / needed)
    monkeypatch.setattr("diffult_ray.stages.dataflow.BLOCK_ROWS", 16)
    thread = threading.Thread(target=build, args=(stage, other))
    thread.start()
    wait_for(lambda: list(other.work(stage).glob("*/parts/*.parquet")))
    victims = wait_for(lambda: processes_called("SampleRows"))
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    thread.join()
    assert pool_of(other.folder(stage)).equals(expected)


def test_more_images_a_class_begin_with_those_of_fewer(cluster, experiment, store):
    few = pool_of(build(pipeline.images(experiment("generation.per_class=25")), store)).to_pylist()
    many = pool_of(build(pipeline.images(experiment("generation.per_class=30")), store)).to_pylist()
    known = {(row["label"], row["id"]): row["image"]["bytes"] for row in many}
    assert 0 < len(few) < len(many)
    assert all(known[row["label"], row["id"]] == row["image"]["bytes"] for row in few)


def test_a_generator_of_fewer_steps_is_a_prefix(cluster, experiment, tmp_path):
    """Also where the longer goes on from what is stored of the shorter, with dropout."""
    short, long = (
        pipeline.generator(experiment(f"generator.steps={n}", "generator.dropout=0.3")) for n in (30, 60)
    )
    together, alone = Store(tmp_path / "together"), Store(tmp_path / "alone")
    build(short.inputs["split"], together)
    build_together([short, long], together)
    for stage, trained in ((short, 30), (long, 30)):
        folder = build(stage, alone)
        assert files.read_json(folder / "summary.json")["trained_now"] == trained
        expected, found = weights(folder), weights(together.folder(stage))
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_same_classifier_in_its_own_process_and_in_a_task(cluster, experiment, store, tmp_path):
    """One loop: the two ways end with the same weights."""
    from diffult_ray.stages import Order, classifier, training

    stage = pipeline.classifier(experiment())
    here = build(stage, store)
    inputs = {name: store.folder(s) for name, s in stage.inputs.items()}
    order = Order(dict(stage.config), inputs, tmp_path / "out", tmp_path / "work")
    (tmp_path / "out").mkdir(), (tmp_path / "work").mkdir()
    training.train(
        classifier._loop, classifier._payload(order, part=None),
        resources=config.StageResources(), work=order.work, name="in-a-task",
    )
    expected = files.read_tensors(here / "model.safetensors")
    found = files.read_tensors(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_scores_of_one_pool_in_several_ways_are_those_of_each_alone(experiment, store, tmp_path):
    """Orders that share a pool are built by one pipeline, and none takes the rows of another."""
    ways = ["filter.scope=global", "filter.distance=nearest", "filter.normalise=true"]
    wanted = [pipeline.scores(experiment(f"experiment.{way}")) for way in ways]
    build(wanted[0].inputs["images"], store)
    build(wanted[0].inputs["extractor"], store)
    build_together(wanted, store)
    together = [pool_module.read_pool(store.folder(stage)).table for stage in wanted]
    alone = Store(tmp_path)
    shutil.copytree(store.root / "artifacts", alone.root / "artifacts")
    for stage, found in zip(wanted, together, strict=True):
        shutil.rmtree(alone.folder(stage))
        build_one(stage, alone)
        assert pool_module.read_pool(alone.folder(stage)).table.equals(found)
    distances = {tuple(found["distance"].to_pylist()) for found in together}
    assert len(distances) == len(ways)
