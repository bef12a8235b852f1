"""`tune.budget`: a sweep starts nothing that it cannot pay for, says what is left, and goes on with more."""

from __future__ import annotations

import re

import pandas as pd
import pytest

from diffult_ray import config, definition, files
from diffult_ray.budget import Purse
from diffult_ray.costs import Costs
from diffult_ray.errors import BadInput
from diffult_ray.plan import Plan, make_plan, text
from diffult_ray.store import Store
from tests.conftest import TINY, FrontDoor
from tests.test_bad_input import one_line, tree
from tests.test_costs import store_all

SMALL = """
name: small
experiment:
  select: test
  generator: {steps: 100, channels: [8]}
  extractor: {steps: 50}
  classifier: {steps: 50}
  quality: {reference: {steps: 50}}
  generation: {per_class: 10, steps: 20}
search: {classifier.seed: {grid: [0, 1, 2]}}
"""
ON_GPUS = "resources.classifier.gpus=1"


@pytest.fixture
def load(tmp_path):
    (tmp_path / "small.yaml").write_text(SMALL)
    return lambda *overrides: config.load(str(tmp_path / "small.yaml"), overrides)


@pytest.fixture
def store(tmp_path, load) -> Store:
    """Where the first of the trials is stored, each of which takes 5 seconds."""
    made = Store(tmp_path / "storage")
    store_all(made, make_plan(load("classifier.seed=0")))
    return made


# --- the key --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("overrides", "told"), [
    (["tune.budget.hours=0"], "override tune.budget.hours=0: must be greater than 0"),
    (["tune.budget.cost=-1"], "override tune.budget.cost=-1: must be greater than 0"),
    (["tune.budget.gpu_hours=inf"], "override tune.budget.gpu_hours=inf: must be a finite number"),
    (["tune.budget.hours=true"], "override tune.budget.hours=true: must be a number"),
    (["tune.budget.minutes=3"], "override tune.budget.minutes=3: no such key"),
    (["tune.budget.cost=1"], "override tune.budget.cost=1: needs a price, price.cpu_hour"),
    (["tune.budget.cost=1", "price.gpu_hour=2"], "override tune.budget.cost=1: needs a price, price.cpu"),
    (["tune.budget.cost=1", "price.cpu_hour=2", ON_GPUS],
     "override tune.budget.cost=1: needs a price, price.gpu_hour"),
])
def test_a_budget_that_cannot_be_held_is_refused_in_a_line(load, overrides, told):
    with pytest.raises(BadInput) as refused:
        load(*overrides)
    assert str(refused.value).startswith(told) and "\n" not in str(refused.value)


def test_the_front_door_refuses_it_and_writes_nothing(tmp_path, load, capsys):
    from diffult_ray import sweep

    load()
    before = tree(tmp_path)
    arguments = [str(tmp_path / "small.yaml"), "tune.budget.cost=1", "--storage", str(tmp_path / "none")]
    assert sweep.main(arguments) == 2
    assert "needs a price" in one_line(capsys.readouterr().err)
    assert tree(tmp_path) == before


def test_a_budget_is_in_no_key_and_may_change_under_one_name(tmp_path, load):
    limited = load("tune.budget.hours=1", "tune.budget.gpu_hours=2", "tune.budget.cost=3", "price.cpu_hour=1")
    one, two = make_plan(load()), make_plan(limited)
    assert [s.key for s in one.stages] == [s.key for s in two.stages] and one.id == two.id
    files.write_json(tmp_path / "trials" / "a.json", {"status": "done"})
    files.write_json(tmp_path / "sweep.yaml", limited.model_dump(mode="json"))
    definition.check(load("tune.budget.hours=5"), tmp_path)


# --- what may start -------------------------------------------------------------------------------


class Run:
    """A purse with its own clock."""

    def __init__(self, sweep: config.Sweep, store: Store) -> None:
        self.plan: Plan = make_plan(sweep)
        self.now = 0.0
        self.purse = Purse(Costs(self.plan, store), lambda: self.now)

    @property
    def trials(self) -> list:
        return [[t.stage] for t in self.plan.trials]


def test_without_a_budget_everything_starts(load, store):
    run = Run(load(), store)
    assert all(run.purse.take(t) for t in run.trials)
    run.now = 1e9
    assert run.purse.lacks(run.trials[0]) is None and run.purse.told() is None


def test_wall_time_is_that_of_the_command_whatever_runs(load, store):
    run = Run(load("tune.budget.hours=0.01"), store)  # 36 seconds
    _, one, two = run.trials
    run.now = 30.9
    assert run.purse.take(one)
    run.now = 31.1
    assert not run.purse.take(two)
    assert run.purse.lacks(two) == "needs about 0.0014 of the 0.0014 hours that the budget has left"
    run.now = 36
    assert run.purse.lacks(two) == "the budget of 0.01 hours is reached"


@pytest.mark.parametrize("limits", [
    ["tune.budget.gpu_hours=0.002", ON_GPUS],  # 7.2 seconds
    ["tune.budget.cost=0.72", "price.cpu_hour=360"],
    ["tune.budget.cost=7.2", "price.cpu_hour=0", "price.gpu_hour=3600", ON_GPUS],
])
def test_what_runs_is_set_aside_and_what_it_leaves_is_for_others(load, store, limits):
    run = Run(load(*limits), store)
    _, one, two = run.trials
    assert run.purse.take(one) and not run.purse.take(two)
    assert run.purse.lacks(two) is None  # the one that runs may take less than is thought
    run.purse.settle(one)
    assert run.purse.take(two)


def test_what_nothing_is_known_of_starts_until_the_budget_is_reached(load, tmp_path):
    run = Run(load("tune.budget.hours=1"), Store(tmp_path / "none"))
    run.now = 3599
    assert run.purse.take(run.trials[0])
    run.now = 3600
    assert not run.purse.take(run.trials[1]) and "is reached" in run.purse.lacks(run.trials[1])


def test_what_was_built_in_the_run_tells_of_what_is_like_it(load, tmp_path):
    run, store = Run(load("tune.budget.hours=0.001"), Store(tmp_path / "new")), Store(tmp_path / "new")
    assert run.purse.lacks(run.trials[1]) is None
    store_all(store, make_plan(load("classifier.seed=0")))
    for stage in (*run.plan.stages, run.plan.trials[0].stage):
        run.purse.learn(store.look(stage))
    assert run.purse.lacks(run.trials[1]).startswith("needs about 0.0014 of the 0.001 hours")


def test_what_was_left_is_counted_with_its_estimate(load, store):
    run = Run(load("tune.budget.cost=0.1", "price.cpu_hour=360"), store)
    run.purse.leave([stage for (stage,) in run.trials[1:]])
    assert run.purse.told().splitlines() == [
        "budget: 0.1 of cost: left 0 stages and 2 trials: about 0:10 of work, 0.00 CPU-hours, cost 1.00",
        "the same command with a larger tune.budget continues",
    ]


def test_the_plan_shows_the_budget_beside_the_estimate(load, store):
    sweep = load("tune.budget.hours=1", "tune.budget.cost=0.5", "price.cpu_hour=360")
    told = list(text(make_plan(sweep), store))
    at = next(i for i, line in enumerate(told) if line.startswith("left to do"))
    assert told[at + 1 : at + 3] == [
        "budget: 1 hours, of about 0.00278 that are left to do",
        "budget: 0.5 of cost, of about 1 that are left to do",
    ]


# --- from end to end ------------------------------------------------------------------------------


def results(door: FrontDoor) -> pd.DataFrame:
    return pd.read_parquet(door.storage / "sweeps" / "tiny" / "results.parquet")


@pytest.mark.slow
def test_a_sweep_stops_at_its_budget_and_goes_on_with_a_larger_one(new_door):
    """The cost of a few seconds: what is like nothing stored starts until it is reached."""
    door = new_door(TINY)
    price = "price.cpu_hour=3600"  # 1 a second of one CPU
    first = door.run("tune.budget.cost=1", price)
    assert first.returncode == 4, first.stdout + first.stderr
    frame = results(door)
    assert len(frame) == 9 and set(frame["status"]) == {"left"} and frame["error"].isna().all()
    assert not list((door.storage / "sweeps" / "tiny").glob("trials/*"))
    assert re.search(r"left \d+ stages and 9 trials", first.stdout)
    assert "the same command with a larger tune.budget continues" in first.stdout
    assert "9 of 9 trials were left for the budget" in first.stdout and "FAILED" not in first.stdout
    built = door.manifests()
    assert 1 < len(built) < 8
    again = door.run("tune.budget.cost=100000", price)
    assert again.returncode == 0, again.stdout + again.stderr
    assert {k: v for k, v in door.manifests().items() if k in built} == built
    assert set(results(door)["status"]) == {"done"} and "budget" not in again.stdout


@pytest.mark.slow
def test_trials_that_the_budget_has_no_room_for_are_left(new_door):
    """Of trials of which one is stored, so that all have an estimate."""
    door = new_door(TINY)
    assert door.run("search.classifier.seed.grid=[0]").returncode == 0
    trials = [files.read_json(p) for p in door.storage.glob("artifacts/classifier/*/manifest.json")]
    limit = 1.5 * max(t["seconds"] for t in trials)  # of one or two trials, at 1 a second
    more = "search.classifier.seed.grid=[0,1,2,3]"
    done = door.run(more, f"tune.budget.cost={limit}", "price.cpu_hour=3600")
    assert done.returncode == 4, done.stdout + done.stderr
    frame = results(door)
    new = frame[frame["seed"] > 0]
    assert set(frame[frame["seed"] == 0]["status"]) == {"done"}
    assert (new["status"] == "done").any() and (new["status"] == "left").any()
    assert re.search(r"left 0 stages and \d+ trials: about ", done.stdout)
    assert door.run(more).returncode == 0
    assert set(results(door)["status"]) == {"done"}
