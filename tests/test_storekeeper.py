"""`python -m diffult_ray.store`: what is there, whether it is whole, and what nobody needs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from diffult_ray import config, files, lease, store, storekeeper
from diffult_ray.plan import Plan, make_plan
from diffult_ray.store import Store

ROOT = Path(config.__file__).parents[2]


def plan(name: str, **experiment) -> Plan:
    return make_plan(config.Sweep(name=name, experiment={"select": "test", **experiment}))


def build(kept: Store, stage) -> None:
    files.write_bytes(kept.folder(stage) / "weights.bin", stage.key.encode())
    files.write_json(kept.folder(stage) / "summary.json", {"accuracy": 50.0})
    kept.commit(stage, seconds=12)


def add(kept: Store, made: Plan) -> None:
    """A finished sweep, as the front door leaves it."""
    from diffult_ray.sweep import Session

    for stage in {s.key: s for t in made.trials for s in t.stage.walk()}.values():
        build(kept, stage)
    for stage in made.stages:
        build(kept, stage)
    Session(made, kept, None, "")._write_definition()


@pytest.fixture
def kept(tmp_path, monkeypatch) -> Store:
    """Two sweeps that share a split and an extractor."""
    monkeypatch.setattr(store, "_notes", lambda: tmp_path / "notes")
    monkeypatch.setattr(store, "_VERIFIED", {})
    made = Store(tmp_path / "storage")
    add(made, plan("one", generator={"steps": 5}))
    add(made, plan("two/b", generator={"steps": 6, "seed": 1}))
    monkeypatch.setenv("DIFFULT_STORAGE", str(made.root))
    return made


def said(capsys, *words: str, code: int = 0) -> list[str]:
    assert storekeeper.main(words) == code
    out, err = capsys.readouterr()
    assert bool(err) == (code == 2)
    return (out or err).splitlines()


def there(kept: Store) -> set[str]:
    return {p.parent.name for p in kept.root.glob("artifacts/*/*/manifest.json")}


def test_a_list_says_what_each_is_and_who_uses_it(kept, capsys):
    lines = said(capsys, "ls")
    (split,) = (line for line in lines if line.startswith("split "))
    assert split.endswith("one, two/b") and "digits" in split and " 12 " in split
    generators = [line for line in lines if line.startswith("generator ")]
    assert ["5 steps" in g for g in generators] == [g.endswith(" one") for g in generators]
    assert lines[-1].startswith(f"{len(there(kept))} artifacts, ")


def test_an_artifact_is_shown_by_the_beginning_of_its_key(kept, capsys):
    key = plan("one", generator={"steps": 5}).trials[0].key
    told = yaml.safe_load("\n".join(said(capsys, "show", key[:10])))
    assert (told["stage"], told["key"], told["state"]) == ("classifier", key, "whole")
    assert told["used by sweeps"] == ["one"] and told["config"]["method"] == "diffult"
    split = told["inputs"]["split"]
    assert f"classifier {key}" in yaml.safe_load("\n".join(said(capsys, "show", split)))["used by artifacts"]


def test_a_key_that_is_none_or_several(kept, capsys):
    (line,) = said(capsys, "show", "xyz", code=2)
    assert line == "error: KEY: no artifact has it (got 'xyz'); `ls` lists them all"
    (line,) = said(capsys, "show", "", code=2)
    assert "keys begin so: " in line and "give more of it" in line


@pytest.mark.parametrize("words", [(), ("nothing",), ("gc", "--keep"), ("gc", "--keep", "three"), ("show",)])
def test_a_mistake_is_one_line(words, kept, capsys):
    before = there(kept)
    (line,) = said(capsys, *words, code=2)
    assert line.startswith("error: ")
    assert there(kept) == before


def test_damage_is_found_though_no_time_of_a_file_changed(kept, capsys):
    assert said(capsys, "verify") == [f"{len(there(kept))} artifacts are whole, 0 damaged"]
    split = plan("one").trials[0].stage.inputs["split"]
    path = kept.folder(split) / "weights.bin"
    before = path.stat()
    path.write_bytes(b"x" * before.st_size)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert kept.find(split)  # as this machine has compared it before
    first, last = said(capsys, "verify", code=1)
    assert first == f"damaged: split {split.key}: weights.bin has another checksum"
    assert last == f"{len(there(kept)) - 1} artifacts are whole, 1 damaged"
    assert kept.find(split) is None and "is damaged" in capsys.readouterr().err
    assert said(capsys, "verify")[-1].endswith(" 0 damaged")


def test_what_all_sweeps_need_stays(kept, capsys):
    assert said(capsys, "gc") == ["removed 0, 0 B"]


def test_what_only_another_sweep_needs_goes(kept, capsys):
    one = {s.key for t in plan("one", generator={"steps": 5}).trials for s in [*t.upstream, t.stage]}
    before = there(kept)
    tried = said(capsys, "gc", "--keep", "one", "--dry-run")
    assert there(kept) == before
    done = said(capsys, "gc", "--keep", "one")
    assert [line.replace("would remove", "removed") for line in tried] == done
    assert there(kept) == one < before
    assert len(done) == len(before - one) + 1


def test_damage_and_orphaned_work_go_and_what_is_still_needed_stays(kept, capsys):
    two = plan("two/b", generator={"steps": 6, "seed": 1})
    generator = next(s for s in two.stages if s.name == "generator")
    files.write_bytes(kept.work(generator) / "checkpoint", b"half")
    files.write_bytes(kept.root / "work" / "images-gone" / "part", b"half")
    files.write_bytes(kept.root / "damaged" / "split-x" / "part", b"bad")
    lines = said(capsys, "gc")
    assert [line.partition(":")[0] for line in lines[:-1]] == [
        "removed damaged/split-x", "removed work/images-gone"
    ]
    assert kept.work(generator).exists()


def test_what_a_running_build_or_sweep_needs_stays(kept, capsys):
    two = plan("two/b", generator={"steps": 6, "seed": 1})
    pool = next(s for s in two.stages if s.name == "images")
    files.write_bytes(kept.work(pool) / "part", b"half")
    with lease.hold(kept.leases, lease.names_for([pool])):
        said(capsys, "gc", "--keep", "one")
        assert {s.key for s in pool.walk()} <= there(kept)
        assert two.trials[0].key not in there(kept)
        assert kept.work(pool).exists()
    add(kept, two)
    with lease.hold(kept.leases, {"sweep-x": {"sweep": "two/b", "needs": []}}):
        said(capsys, "gc", "--keep", "one")
        assert {s.key for s in two.trials[0].stage.walk()} <= there(kept)
    said(capsys, "gc", "--keep", "one")
    assert two.trials[0].key not in there(kept)


def test_a_dead_builders_lease_keeps_nothing(kept, capsys):
    stale = {"owner": "o", "beat": 1, "pid": 1, "place": ["elsewhere"], "time": time.time() - 9999}
    two = plan("two/b", generator={"steps": 6, "seed": 1})
    files.write_json(kept.leases / "x.json", {**stale, "needs": [two.trials[0].key]})
    assert any(line.startswith("removed leases/x.json: ") for line in said(capsys, "gc", "--keep", "one"))
    assert two.trials[0].key not in there(kept)
    assert not list(kept.leases.glob("*.json"))


def test_a_sweep_of_an_older_version_is_planned_from_its_definition(kept, capsys):
    (kept.root / "sweeps" / "one" / "stages.json").unlink()
    assert said(capsys, "gc") == ["removed 0, 0 B"]
    (kept.root / "sweeps" / "one" / "sweep.yaml").write_text("name: one\nexperiment: {gone: 1}\n")
    before = there(kept)
    (line,) = said(capsys, "gc", code=2)
    assert "does not tell what the sweep needs" in line and there(kept) == before


def test_the_module_is_a_command(kept):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "diffult_ray.store", "verify"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.endswith(" 0 damaged\n") and done.stderr == ""


def test_a_sweep_that_runs_keeps_what_it_needs_before_it_is_written_down(kept, capsys, monkeypatch):
    from argparse import Namespace

    from diffult_ray.sweep import Session

    made = make_plan(config.Sweep(
        name="three/c", tracking={"enabled": False},
        experiment={"select": "test", "generator": {"steps": 7}},
    ))
    needed = {s.key for s in made.stages}
    for stage in made.stages:
        build(kept, stage)

    def while_it_runs(self, records, uri):
        said(capsys, "gc")
        return 0 if needed <= there(kept) else 1

    monkeypatch.setattr(Session, "_run", while_it_runs)
    assert Session(made, kept, Namespace(address="there"), "").run() == 0
    assert not kept.leases.exists()
    said(capsys, "gc")
    assert not needed <= there(kept)
