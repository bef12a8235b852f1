"""What counts as a trial that is done."""

import io
from types import SimpleNamespace

import pytest

from diffult_ray import config, files, results
from diffult_ray.plan import Trial, make_plan
from diffult_ray.progress import Narrator, clock
from diffult_ray.store import Store
from tests.conftest import TINY


@pytest.fixture
def plan(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return make_plan(config.load(str(path)))


def watcher(plan, tmp_path, at_once=1):
    from diffult_ray.trials import Watcher

    told, said = {}, io.StringIO()
    table = {t.key: t for t in plan.trials}
    store = Store(tmp_path / "storage")
    watch = Watcher(
        table, store, Narrator(said), lambda trial, error: told.update({trial.key: error}), lambda: at_once
    )
    return watch, told, said, store


def ended(trial: Trial, last_result: dict[str, str]) -> SimpleNamespace:
    """Tune's trial, at its end."""
    config = {"trial": {"key": trial.key, "title": trial.title}}
    return SimpleNamespace(config=config, last_result=last_result)


def test_a_trial_that_ends_without_its_metric_has_failed(plan, tmp_path):
    watch, told, said, store = watcher(plan, tmp_path)
    first = plan.trials[0]
    watch.on_trial_complete(1, [], ended(first, last_result={}))
    assert told == {first.key: "ended without a metric"}
    assert f"trial 1/{len(plan.trials)} {first.title}: FAILED" in said.getvalue()
    record = results.record(first, store, told[first.key])
    assert (record["status"], record["error"]) == ("failed", "ended without a metric")


def test_a_trial_that_has_diverged_says_so(plan, tmp_path):
    watch, told, _, _ = watcher(plan, tmp_path)
    first = plan.trials[0]
    result = {"error": "the loss is not finite"}
    watch.on_trial_complete(1, [], ended(first, last_result=result))
    assert told == {first.key: "the loss is not finite"}


def test_a_trial_that_tune_never_told_of_has_failed(plan, tmp_path):
    watch, told, _, _ = watcher(plan, tmp_path)
    watch.settle("ended without a result")
    assert told == {t.key: "ended without a result" for t in plan.trials}


def test_of_long_trials_it_is_told_how_far_they_are_and_how_long_all_take(plan, tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("diffult_ray.trials.time", SimpleNamespace(monotonic=lambda: now[0]))
    watch, _, said, store = watcher(plan, tmp_path, at_once=2)
    total, (first, second, *_) = len(plan.trials), plan.trials
    rooms = {t.key: store.enter(store.work(t.stage)) for t in (first, second)}
    tunes = [
        SimpleNamespace(config={"trial": {"key": t.key}}, status="RUNNING" if t.key in rooms else "PENDING")
        for t in plan.trials
    ]

    def step(at, *done):
        now[0] = at
        for room, steps in zip(rooms.values(), done, strict=False):
            files.write_json(room / "progress.json", {"done": steps, "total": 1000})
        watch.on_step_begin(1, tunes)
        return said.getvalue().splitlines()

    assert step(19) == []
    assert step(20)[-1].endswith(f"trials: 0 of {total} ended, 2 at work (0%, 0%)")
    assert len(step(30, 50, 100)) == 1
    left = clock((total - 0.3) / 0.0075 / 2)
    assert step(40, 100, 200)[-1].endswith(f"ended, 2 at work (10%, 20%), about {left} left")
    said.seek(0)
    said.truncate()
    assert len(step(2000, 300, 400)) == 1 and len(step(2060, 301, 401)) == 1, "a line each thirtieth"
    assert len(step(2070, 302, 402)) == 2
    files.write_json(store.folder(first.stage) / "summary.json", {"accuracy": 50.0})
    store.commit(first.stage, seconds=2000.0)
    now[0] = 2100.0
    watch.on_trial_complete(1, [], ended(first, last_result={}))
    beside = 2080 * (total - 1 - 1) / 2  # the second is as good as done
    assert f"accuracy 50.0%, about {clock(beside)} left" in said.getvalue()
    tunes[0].status, tunes[1].status, tunes[2].status = "TERMINATED", "TERMINATED", "RUNNING"
    left = clock((total - 1) * 2080)
    assert step(2200)[-1].endswith(f"1 of {total} ended, 1 at work (0%), about {left} left")


def test_the_time_left_after_the_first_trial_is_by_its_training_alone(plan, tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("diffult_ray.trials.time", SimpleNamespace(monotonic=lambda: now[0]))
    watch, _, said, store = watcher(plan, tmp_path)
    first, now[0] = plan.trials[0], 1000.0
    files.write_json(store.folder(first.stage) / "summary.json", {"accuracy": 50.0, "train_seconds": 20.0})
    store.commit(first.stage, seconds=26.0)
    watch.on_trial_complete(1, [], ended(first, last_result={}))
    assert said.getvalue().endswith(f"accuracy 50.0%, about {clock(20.0 * (len(plan.trials) - 1))} left\n")


def test_of_trials_none_of_which_is_at_work_it_is_told_that_they_wait(plan, tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("diffult_ray.trials.time", SimpleNamespace(monotonic=lambda: now[0]))
    watch, _, said, _ = watcher(plan, tmp_path)
    now[0] = 60.0
    watch.on_step_begin(1, [SimpleNamespace(config={"trial": {"key": plan.trials[0].key}}, status="PENDING")])
    assert said.getvalue().endswith(f"trials: 0 of {len(plan.trials)} ended, none at work\n")
