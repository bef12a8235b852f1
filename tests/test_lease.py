"""One builder a key, also of several drivers on one storage; what a dead one held is taken over."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
import types
from pathlib import Path

import pytest

from diffult_ray import build, files, lease, pipeline
from diffult_ray.config import Experiment
from diffult_ray.store import Store

SPLIT = pipeline.split(Experiment(select="test"))
SPAWN = multiprocessing.get_context("spawn")


def slow_builder(orders, resources) -> None:
    """Notes who builds, then takes a while."""
    (order,) = orders
    with open(order.out.parents[5] / "built.txt", "a") as file:
        file.write(f"{os.getpid()}\n")
    time.sleep(float(os.environ.get("SLOW", "0.5")))
    files.write_json(order.out / "summary.json", {"by": os.getpid()})


def drive(storage: str, beat: float, seconds: str) -> None:
    """A driver that wants the split."""
    os.environ["SLOW"] = seconds
    hurry(beat)
    artifact = build.build_together([SPLIT], Store(storage))[0]
    files.write_json(Path(storage).parent / f"got-{os.getpid()}.json", artifact.summary)


def hurry(beat: float) -> None:
    lease.BEAT, lease.POLL, lease.EXPIRES = beat, 0.05, 1.0
    module = types.ModuleType("slow_builders")
    module.build = slow_builder
    sys.modules["slow_builders"] = module
    build.BUILDERS["split"] = "slow_builders:build"


def start(storage: Path, *, beat: float = 0.1, seconds: str = "0.5") -> multiprocessing.Process:
    process = SPAWN.Process(target=drive, args=(str(storage), beat, seconds))
    process.start()
    return process


def builders(folder: Path) -> list[str]:
    path = folder / "built.txt"
    return path.read_text().split() if path.exists() else []


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_two_drivers_build_a_stage_once_and_both_have_it(tmp_path):
    storage = tmp_path / "storage"
    both = [start(storage, seconds="1.5"), start(storage, seconds="1.5")]
    for process in both:
        process.join(90)
    assert [p.exitcode for p in both] == [0, 0]
    (builder,) = builders(tmp_path)
    got = [files.read_json(p) for p in tmp_path.glob("got-*.json")]
    assert got == [{"by": int(builder)}] * 2
    assert not (storage / "leases").exists()


def test_the_lease_of_a_killed_driver_is_taken_over_at_once(tmp_path):
    storage = tmp_path / "storage"
    first = start(storage, seconds="600")
    wait_for(lambda: builders(tmp_path))
    os.kill(first.pid, signal.SIGKILL)
    first.join(30)
    second = start(storage)
    second.join(90)
    assert second.exitcode == 0 and builders(tmp_path) == [str(first.pid), str(second.pid)]


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(lease, "POLL", 0.02)
    monkeypatch.setattr(lease, "EXPIRES", 0.2)
    monkeypatch.setattr(lease, "BEAT", 0.02)


def of_elsewhere(folder: Path, **facts) -> Path:
    """A lease of an owner on another machine, of whom nothing is heard."""
    path = folder / "split-a.json"
    content = {"owner": "o", "beat": 3, "pid": 1, "place": ["there"], "host": "there", "time": 0.0}
    files.write_json(path, {**content, **facts})
    return path


def test_a_lease_from_elsewhere_expires_when_it_is_not_refreshed(tmp_path, quick):
    of_elsewhere(tmp_path)
    told, begin = [], time.monotonic()
    with lease.hold(tmp_path, {"split-a": {}}, told.append):
        assert time.monotonic() - begin >= 0.2
    assert told == ["split-a is being built by process 1 on there: waiting"]


def test_a_lease_that_is_refreshed_is_waited_for(tmp_path, quick):
    with lease.hold(tmp_path, {"split-a": {}}):
        second = lease.Lease(tmp_path / "split-a.json", {})
        seen = lease.read(second.path)
        wait_for(lambda: lease.read(second.path)["beat"] > seen["beat"])
        assert not second.take(None) and not second.take(seen)
    assert second.take(None)


def test_an_owner_that_slept_too_long_learns_that_it_lost(tmp_path, quick):
    with lease.hold(tmp_path, {"split-a": {}}) as held:
        other = of_elsewhere(tmp_path)
        with pytest.raises(lease.Lost, match="split-a was taken over"):
            held.check()
    assert files.read_json(other)["owner"] == "o"  # and it leaves the other's alone


def test_a_beat_that_comes_late_brings_no_lease_back(tmp_path):
    kept = lease.Lease(tmp_path / "split-a.json", {})
    assert kept.take(None)
    kept.release()
    kept.refresh()
    assert not kept.path.exists()


def test_a_driver_that_lost_its_lease_commits_nothing(tmp_path, monkeypatch):
    store = Store(tmp_path / "storage")

    def builder(orders, resources):
        files.write_json(orders[0].out / "summary.json", {})
        name = f"split-{SPLIT.key}.json"
        files.write_json(store.leases / name, {**files.read_json(store.leases / name), "owner": "other"})

    monkeypatch.setitem(sys.modules, "builders", types.SimpleNamespace(build=builder))
    monkeypatch.setitem(build.BUILDERS, "split", "builders:build")
    with pytest.raises(lease.Lost):
        build.build_one(SPLIT, store)
    assert store.look(SPLIT) is None


def test_a_number_that_is_another_process_by_now_is_no_owner(tmp_path):
    with lease.hold(tmp_path, {"split-a": {}}):
        mine = files.read_json(tmp_path / "split-a.json")
    assert not lease._is_gone(mine)
    assert lease._is_gone({**mine, "started": "1"})


def test_what_is_alive_is_told_for_one_look(tmp_path):
    of_elsewhere(tmp_path)
    assert lease.living(tmp_path) == []
    of_elsewhere(tmp_path, time=time.time())
    assert [f["owner"] for f in lease.living(tmp_path)] == ["o"]


def test_generators_of_one_family_share_a_lease_and_others_do_not():
    stages = [
        pipeline.generator(Experiment(select="test", generator={"steps": steps, "seed": seed}))
        for steps, seed in ((5, 0), (9, 0), (5, 1))
    ]
    named = lease.names_for(stages)
    assert len(named) == 2
    assert named[f"generator-{stages[0].family}"]["builds"] == [stages[0].key, stages[1].key]


def test_a_failed_build_leaves_no_trace_of_its_lease(tmp_path, monkeypatch):
    def builder(orders, resources):
        raise ValueError("no")

    monkeypatch.setitem(sys.modules, "builders", types.SimpleNamespace(build=builder))
    monkeypatch.setitem(build.BUILDERS, "split", "builders:build")
    with pytest.raises(ValueError, match="no"):
        build.build_one(SPLIT, Store(tmp_path / "a" / "storage"))
    assert list(tmp_path.iterdir()) == []
