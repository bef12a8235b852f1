"""What `--plan` says that a sweep will take, with the basis of every figure, and what sharing saves."""

from __future__ import annotations

import pytest

from diffult_ray import config, fence, files
from diffult_ray.costs import Costs
from diffult_ray.plan import Plan, make_plan, text
from diffult_ray.store import Store

SECONDS = {"split": 1, "extractor": 10, "reference": 20, "generator": 100, "images": 30, "scores": 3,
           "quality": 40, "classifier": 5}


def plan(search=(), price=None, **experiment) -> Plan:
    values = {
        "select": "test", "generator": {"steps": 100, "channels": [8]},
        "extractor": {"steps": 50}, "classifier": {"steps": 50}, "quality": {"reference": {"steps": 50}},
        "generation": {"per_class": 10, "steps": 20}, **experiment,
    }
    return make_plan(config.Sweep(name="s", experiment=values, search=search, price=price or {}))


def store_all(store: Store, made: Plan) -> None:
    for stage in [*made.stages, *(t.stage for t in made.trials)]:
        if store.look(stage):
            continue
        folder = store.folder(stage)
        files.write_json(folder / "summary.json", {"images": 60, "accuracy": 50.0})
        if stage.name == "split":
            files.write_json(folder / "split.json", {
                "class_counts": [10, 8, 6, 4, 2, 0], "class_names": list("abcdef"), "image_size": 8,
                "channels": 1, "parts": {"balanced": 60},
            })
        store.commit(stage, seconds=SECONDS[stage.name])


@pytest.fixture
def store(tmp_path) -> Store:
    """Where one trial is stored."""
    made = Store(tmp_path / "storage")
    store_all(made, plan())
    return made


def of(made: Plan, store: Store, name: str):
    (stage,) = (s for s in [*made.stages, made.trials[0].stage] if s.name == name)
    return Costs(made, store).of(stage)


def test_what_is_stored_is_told_as_measured(store):
    for name, seconds in SECONDS.items():
        assert (of(plan(), store, name).seconds, of(plan(), store, name).basis) == (seconds, "measured")


def test_training_scales_with_its_steps(store):
    longer = plan(generator={"steps": 250, "channels": [8]}, classifier={"steps": 100, "seed": 3})
    assert of(longer, store, "generator").seconds == 250
    assert of(longer, store, "generator").basis.startswith("from generator ")
    assert of(longer, store, "classifier").seconds == 10


def test_pools_scale_with_images_and_steps(store):
    other = plan(generation={"per_class": 12, "steps": 40})
    # 2 + 4 + 6 + 8 + 10 + 12 = 42 images to make where 60 were, in twice the steps
    assert of(other, store, "images").seconds == pytest.approx(30 * 42 / 60 * 2)
    assert of(other, store, "scores").seconds == pytest.approx(3 * 42 / 60)
    half = plan(quality={"images": 25_000, "reference": {"steps": 50}})
    assert of(half, store, "quality").seconds == pytest.approx(20)


def test_another_network_is_not_alike(store):
    other = plan(generator={"steps": 100, "channels": [16]}, classifier={"steps": 50, "architecture": "cnn"})
    for name in ("generator", "images", "quality", "classifier"):
        assert of(other, store, name).seconds is None
        assert of(other, store, name).basis == f"no {name} like it in the store"


def test_the_rate_of_several_is_their_median(store):
    for steps, seconds in ((200, 300), (400, 1200)):
        generator = next(s for s in plan(generator={"steps": steps, "channels": [8]}).stages
                         if s.name == "generator")
        files.write_json(store.folder(generator) / "summary.json", {})
        store.commit(generator, seconds=seconds)
    found = of(plan(generator={"steps": 1000, "channels": [8]}), store, "generator")
    assert found.seconds == 1500 and found.basis == "from 3 like stages"


def test_what_ran_on_the_same_resources_is_preferred(store):
    wide = {"resources": {"generator": {"workers": 2}}}
    longer = plan(generator={"steps": 200, "channels": [8]}, **wide)
    found = of(longer, store, "generator")
    assert found.seconds == 200 and found.basis.endswith(" on other resources")
    other = next(s for s in plan(generator={"steps": 300, "channels": [8]}, **wide).stages
                 if s.name == "generator")
    files.write_json(store.folder(other) / "summary.json", {})
    store.commit(other, seconds=150)
    found = of(longer, store, "generator")
    assert (found.seconds, found.basis) == (100, f"from generator {other.key[:8]}")


def test_a_familys_total_is_that_of_its_longest_and_what_is_done_is_off(store):
    made = plan({"generator.steps": {"grid": [200, 400]}})
    costs = Costs(made, store)
    generators = [s for s in made.stages if s.name == "generator"]
    assert costs.total(generators).seconds == 400
    assert costs.total(generators, {generators[1].key: 0.75}).seconds == 100


def test_hours_and_cost_are_of_all_workers(store):
    made = plan({"generator.steps": {"grid": [3600]}}, price={"gpu_hour": 2.0},
                resources={"generator": {"workers": 2, "gpus": 0.5, "cpus": 3}})
    costs = Costs(made, store)
    total = costs.total([s for s in made.stages if s.name == "generator"])
    assert (total.gpu_hours, total.cpu_hours) == (1, 6)
    assert total.price(made.sweep.price) == 2
    assert total.price(config.Price(cpu_hour=1.0)) is None  # what a GPU costs is not known
    assert total.price(config.Price(cpu_hour=1.0, gpu_hour=0.0)) == 6


def test_the_plan_says_what_is_left_and_what_sharing_saves(store):
    made = plan({"classifier.seed": {"grid": [0, 1, 2]}}, price={"cpu_hour": 360.0})
    told = list(text(made, store))
    assert any(line.startswith("  generator ") and "stored" in line and "1:40, measured" in line
               for line in told)
    assert "  trials stored: 1" in told
    # at one CPU, 0.1 a second
    assert "  trials to build: 2, about 0:10 of work, 0.00 CPU-hours, cost 1.00" in told
    assert told[-2] == "left to do: about 0:10 of work, 0.00 CPU-hours, cost 1.00"
    alone, shared = 3 * sum(SECONDS.values()), sum(SECONDS.values()) + 2 * 5
    assert (alone - shared, alone, shared) == (408, 627, 219)
    assert told[-1] == ("sharing saves about 6:48: 10:27 if each trial built its own stages, "
                        "3:39 as each is built once")


def test_a_partly_built_stage_says_how_far_it_is(store):
    made = plan(generator={"steps": 400, "channels": [8]})
    generator = next(s for s in made.stages if s.name == "generator")
    files.write_json(fence.enter(store.work(generator)) / "progress.json", {"done": 100, "total": 800})
    told = [line for line in text(made, store) if generator.key in line]
    assert "partly built, 25%" in told[0] and "about 6:40, from generator" in told[0]


def test_a_regulariser_takes_longer(store):
    regularised = plan(generator={"steps": 100, "channels": [8], "regulariser": "cbdm"})
    assert of(regularised, store, "generator").seconds is None


def test_the_start_of_a_training_does_not_scale(store):
    """Of 100 seconds, the loop took 80."""
    made = plan(generator={"steps": 100, "channels": [16]})
    generator = next(s for s in made.stages if s.name == "generator")
    files.write_json(store.folder(generator) / "summary.json", {"train_seconds": 80.0})
    store.commit(generator, seconds=100)
    longer = plan(generator={"steps": 1000, "channels": [16]})
    assert of(longer, store, "generator").seconds == 20 + 800


def test_a_pool_of_a_known_set_is_counted_before_its_split_is_stored(store, tmp_path):
    """10, 5, 3, 2, 1 images of IF 10 in digits' profile."""
    made = plan(dataset={"imbalance_factor": 10, "max_per_class": 10})
    lacking = sum(10 - n for n in (10, 7, 5, 4, 3, 2, 2, 1, 1, 1))
    assert of(made, store, "images").seconds == pytest.approx(30 / 60 * lacking)


def test_an_empty_store_is_measured_and_stays_empty(tmp_path):
    told = list(text(plan(), Store(tmp_path / "none")))
    assert sum("measured here" in line for line in told) == 6
    assert told[-2].startswith("left to do: about ") and told[-1].startswith("sharing saves about 0:00")
    assert not (tmp_path / "none").exists()
