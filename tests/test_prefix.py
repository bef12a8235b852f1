"""What is stored of fewer steps or images is not made again: by keys, and by counts of what was made."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from diffult_ray import files, prefix
from diffult_ray.build import jobs_for
from diffult_ray.costs import Costs
from diffult_ray.plan import text
from diffult_ray.stages.training import STATE
from diffult_ray.store import Store
from tests.conftest import TINY, FrontDoor
from tests.test_costs import plan, store_all

CHANNELS = {"channels": [8]}


def stage(name: str, *, steps: int = 100, per_class: int = 10, **generator):
    made = plan(generator={"steps": steps, **CHANNELS, **generator}, generation={"per_class": per_class})
    return next(s for s in made.stages if s.name == name)


def put(store: Store, made, *, state: bool = True) -> None:
    folder = store.folder(made)
    files.write_json(folder / "summary.json", {"images": made.config.get("per_class")})
    if state and made.name == "generator":
        files.write_bytes(folder / STATE, b"of the training")
    store.commit(made, seconds=10)


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "storage")


# --- what a stage goes on from --------------------------------------------------------------------


def test_a_generator_goes_on_from_the_longest_that_is_shorter(store):
    for steps in (50, 100, 400):
        put(store, stage("generator", steps=steps))
    assert prefix.start(stage("generator", steps=300), store).key == stage("generator", steps=100).key
    assert prefix.start(stage("generator", steps=40), store) is None
    assert prefix.share(stage("generator", steps=400), store) == 0.25


@pytest.mark.parametrize("other", [{"seed": 3}, {"ema": 0.5}, {"batch_size": 8}, {"regulariser": "cbdm"}])
def test_another_training_is_no_beginning(store, other):
    put(store, stage("generator", steps=50))
    assert prefix.start(stage("generator", steps=100, **other), store) is None


def test_one_without_the_state_of_its_training_is_none(store):
    """As versions before this one stored it."""
    put(store, stage("generator", steps=50), state=False)
    assert prefix.start(stage("generator", steps=100), store) is None


def test_a_pool_takes_from_a_smaller_and_from_a_larger_one(store):
    store_all(store, plan(generator={"steps": 100, **CHANNELS}, generation={"per_class": 4}))
    put(store, stage("images", per_class=8))
    assert prefix.start(stage("images", per_class=20), store).config["per_class"] == 8
    assert prefix.start(stage("images", per_class=6), store).config["per_class"] == 8
    assert prefix.start(stage("images", per_class=3), store).config["per_class"] == 4
    assert prefix.share(stage("images", per_class=6), store) == 1
    wanted, there = 12 + 14 + 16 + 18 + 20 + 10, 0 + 0 + 2 + 4 + 6 + 8
    assert prefix.share(stage("images", per_class=20), store) == pytest.approx(there / wanted)


def test_no_job_passes_a_stored_generator_that_a_part_of_it_can_go_on_from(store):
    put(store, stage("generator", steps=200))
    made = [stage("generator", steps=n) for n in (50, 100, 300, 900)]
    (job,) = jobs_for(made)
    runs = [[s.config["steps"] for s in run] for run in prefix.runs(job.stages, store)]
    assert runs == [[50, 100], [300, 900]]


def test_the_plan_counts_only_what_is_missing(store):
    store_all(store, plan(generator={"steps": 100, **CHANNELS}))
    put(store, stage("generator", steps=100))
    made = plan(generator={"steps": 400, **CHANNELS})
    told = next(line for line in text(made, store) if line.startswith("  generator"))
    assert "partly built, 25%" in told
    (generator,) = (s for s in made.stages if s.name == "generator")
    assert Costs(made, store).left(generator, prefix.share(generator, store)) == pytest.approx(30)


# --- from end to end ------------------------------------------------------------------------------

ONE = re.sub(r"baselines:.*", "search: {classifier.seed: {grid: [0]}}\n", TINY, flags=re.S)


def summaries(door: FrontDoor, name: str) -> list[dict]:
    """Of the stored stages of a name, the last one made first."""
    paths = sorted((door.storage / "artifacts" / name).glob("*/summary.json"),
                   key=lambda p: -p.stat().st_mtime_ns)
    return [files.read_json(p) for p in paths]


def folder_of(door: FrontDoor, name: str, key: str, value: int) -> Path:
    manifests = (door.storage / "artifacts" / name).glob("*/manifest.json")
    return next(p.parent for p in manifests if files.read_json(p)["config"][key] == value)


def run(door: FrontDoor, *overrides: str) -> None:
    done = door.run(*overrides)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_steps_images_and_seeds_add_to_what_is_stored(new_door):
    door, whole = new_door(ONE), new_door(ONE)
    run(door, "generator.steps=30", "generation.per_class=20")
    run(door, "generator.steps=70", "generation.per_class=20")
    long, short = summaries(door, "generator")
    assert (short["steps"], short["trained_now"]) == (30, 30)
    assert (long["steps"], long["trained_now"]) == (70, 40)
    images = summaries(door, "images")[0]["images"]
    before = door.manifests()
    run(door, "generator.steps=70", "generation.per_class=30", "search.classifier.seed.grid=[0,1]")
    added = [k.split("/")[0] for k in door.manifests() if k not in before]
    assert sorted(added) == ["classifier", "classifier", "images", "scores"]
    larger = summaries(door, "images")[0]
    assert larger["made_now"] == larger["images"] - images > 0
    run(door, "generator.steps=70", "generation.per_class=25")
    assert summaries(door, "images")[0]["made_now"] == 0
    run(whole, "generator.steps=70", "generation.per_class=30")
    _assert_equal(door, whole)


def _assert_equal(one: FrontDoor, two: FrontDoor) -> None:
    """The same weights, and the same pool."""
    states = [
        files.read_state(folder_of(d, "generator", "steps", 70) / STATE)[0] for d in (one, two)
    ]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    pools = [pq.read_table(folder_of(d, "images", "per_class", 30) / "pool") for d in (one, two)]
    assert pools[0].equals(pools[1])
