"""A store on s3:// or gs://: the same layout, a mirror a machine, nothing lost and nothing half there."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import types
from contextlib import ExitStack
from pathlib import Path

import pytest

from diffult_ray import build, claims, files, lease, mirror, pipeline, remote, remotestore, store, storekeeper
from diffult_ray.config import Experiment
from diffult_ray.errors import BadInput
from diffult_ray.mirror import PUBLISHER
from diffult_ray.remote import Address, Remote
from diffult_ray.store import Store, open_store
from tests import buckets
from tests.buckets import LOGIN, bucket, storage_server  # noqa: F401  fixtures

SPLIT = pipeline.split(Experiment(select="test"))
NAME = f"artifacts/split/{SPLIT.key}"
SPAWN = multiprocessing.get_context("spawn")
only_s3 = pytest.mark.parametrize("storage_server", ["s3"], indirect=True)  # of its credentials


def as_new_machine(monkeypatch, folder: Path) -> None:
    """Another mirror, and nothing remembered."""
    monkeypatch.setenv("DIFFULT_CACHE", str(folder))
    remotestore.reopened.cache_clear()
    remotestore._LOCATED.clear()
    remotestore._HERE.clear()
    store._VERIFIED.clear()


def written(kept: Store, content: bytes = b"weights") -> Store:
    """A store with one artifact."""
    folder = kept.folder(SPLIT)
    files.write_bytes(folder / "part" / "a.bin", content)
    files.write_json(folder / "summary.json", {"classes": 10})
    kept.commit(SPLIT, seconds=1.5)
    return kept


# --- addresses ---


@pytest.mark.parametrize("uri", [
    "s3://b/p/q", "s3://k:a%2Fb@b/p?region=eu-1&scheme=http", "gs://b", "gs://anonymous@b/p",
])
def test_a_uri_is_read_and_written(uri):
    found = Address.of(uri)
    assert Address.of(found.uri) == found
    assert "a/b" not in found.shown and "a%2Fb" not in found.shown


@pytest.mark.parametrize(("uri", "told"), [
    ("ftp://b/p", "no storage of ftp:// is known"), ("s3://", "write s3://bucket/prefix"),
    ("s3://b/../c", "no .. in it"), ("s3://b/p?secret_key=hunter2", "no option is called secret_key"),
    ("s3://k:hun/ter2@b/p", "write / as %2F"), ("s3://[b/p", "Invalid IPv6"),
    ("gs://me:hunter2@b/p", "no user but anonymous"),
])
def test_a_uri_that_is_none(uri, told):
    with pytest.raises(BadInput) as caught:
        open_store(uri)
    said = str(caught.value)
    assert told in said and "hunter2" not in said and "ter2" not in said


def test_the_environments_endpoint_is_part_of_the_address(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:5")
    assert Address.of("s3://b/p").uri == "s3://b/p?endpoint_override=127.0.0.1%3A5&scheme=http"
    assert "5" not in Address.of("s3://b/p?endpoint_override=other").uri
    assert Address.of("gs://b/p").options == ()


def test_the_region_of_a_bucket_on_aws_is_asked_for(monkeypatch):
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pyarrow.fs.resolve_s3_region", {"bucket": "eu-west-3"}.get)  # AWS is not at hand
    assert Remote("s3://bucket/p").system.region == "eu-west-3"
    assert Remote("s3://bucket/p?region=eu-west-1").system.region == "eu-west-1"


def test_a_google_uri_makes_a_file_system():
    assert Remote("gs://anonymous@bucket/p").system.type_name == "gcs"
    assert Remote("gs://bucket/p").path("a") == "bucket/p/a"


@only_s3
def test_what_is_shown_or_pickled_beside_a_secret(bucket):  # noqa: F811
    kept = open_store(bucket.explicit.replace("s3://", "s3://test:hunter2hunter2@"))
    for shown in (repr(kept.site), repr(kept.remote), kept.shown(kept.root / "a"), str(kept.root)):
        assert "hunter2" not in shown
    assert pickle.loads(pickle.dumps(kept)).address == kept.address


# --- refused in time ---


def refused(uri: str) -> str:
    start = time.monotonic()
    with pytest.raises(BadInput) as caught:
        open_store(uri).check()
    assert time.monotonic() - start < 15
    return str(caught.value)


def test_a_bucket_that_is_missing(bucket):  # noqa: F811
    assert "there is no bucket no-such; make it first" in refused(bucket.uri.replace(bucket.name, "no-such"))


@only_s3
def test_no_credentials(bucket, tmp_path, monkeypatch):  # noqa: F811
    for name in LOGIN:
        monkeypatch.delenv(name)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "no credentials: set AWS_ACCESS_KEY_ID" in refused(bucket.uri)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(("content", "why"), [
    (None, "Cannot open credentials file"), ('{"type": "other"}', "Unsupported credential type"),
])
def test_credentials_of_google_that_are_none(tmp_path, monkeypatch, content, why):
    file = tmp_path / "credentials.json"
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(file))
    if content:
        file.write_text(content)
    told = refused("gs://bucket/p")
    assert why in told and str(file) in told and "error_info" not in told


def test_a_server_that_does_not_answer(bucket):  # noqa: F811
    uri = dataclasses.replace(bucket, server="http://127.0.0.1:9").explicit
    told = refused(uri)
    assert "--storage: must be a folder, or an s3:// or gs:// URI" in told
    assert "Could not connect to server" in told and "error_info" not in told and "***" not in told


def test_what_a_newer_version_wrote(bucket):  # noqa: F811
    bucket.write("store.json", b'{"format": 99}')
    assert "store.json" in refused(bucket.uri) and "was written by a newer version" in refused(bucket.uri)


# --- artifacts ---


def test_the_layout_is_that_of_a_folder(bucket):  # noqa: F811
    written(open_store(bucket.uri))
    assert bucket.names() == [
        f"{NAME}/manifest.json", f"{NAME}/part/a.bin", f"{NAME}/summary.json", "store.json",
    ]


def test_another_machine_finds_it_and_looks_without_fetching(bucket, tmp_path, monkeypatch):  # noqa: F811
    written(open_store(bucket.uri))
    as_new_machine(monkeypatch, tmp_path / "other")
    kept = open_store(bucket.uri)
    assert kept.look(SPLIT).summary == {"classes": 10} and kept.locate(SPLIT).seconds == 1.5
    assert [key for key, _ in kept.manifests()] == [SPLIT.key]
    assert not kept.folder(SPLIT).exists()
    found = kept.find(SPLIT)
    assert (found.folder / "part" / "a.bin").read_bytes() == b"weights"
    assert str(found.folder).startswith(str(tmp_path / "other"))


@pytest.mark.parametrize("content", [b"weight", b"WEIGHTS", None], ids=["cut", "flip", "gone"])
def test_a_damaged_one_is_set_aside_in_the_storage(content, bucket, tmp_path, monkeypatch, capsys):  # noqa: F811
    written(open_store(bucket.uri))
    if content is None:
        bucket.system.delete_file(f"{bucket.name}/some/where/{NAME}/part/a.bin")
    else:
        bucket.write(f"{NAME}/part/a.bin", content)
    as_new_machine(monkeypatch, tmp_path / "other")
    kept = open_store(bucket.uri)
    assert kept.find(SPLIT) is None and kept.find(SPLIT) is None
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: split {SPLIT.key[:8]} is damaged (part/a.bin ")
    assert bucket.names("artifacts") == []
    assert any(name.endswith("/manifest.json") for name in bucket.names("damaged"))
    assert written(kept).find(SPLIT) is not None


def test_a_damaged_mirror_is_fetched_again_in_silence(bucket, tmp_path, monkeypatch, capsys):  # noqa: F811
    kept = written(open_store(bucket.uri))
    (kept.folder(SPLIT) / "part" / "a.bin").write_bytes(b"x")
    assert (kept.find(SPLIT).folder / "part" / "a.bin").read_bytes() == b"weights"
    assert capsys.readouterr().err == ""


def test_one_that_is_gone_from_the_storage_is_gone_from_the_mirror(bucket, tmp_path, monkeypatch):  # noqa: F811
    kept = written(open_store(bucket.uri))
    kept.remote.delete_below(NAME)
    as_new_machine(monkeypatch, tmp_path / "cache")
    assert open_store(bucket.uri).find(SPLIT) is None
    assert not kept.folder(SPLIT).exists()


def test_one_that_was_built_again_elsewhere_replaces_the_mirrors(bucket, tmp_path, monkeypatch):  # noqa: F811
    written(open_store(bucket.uri))
    as_new_machine(monkeypatch, tmp_path / "other")
    kept = open_store(bucket.uri)
    kept.remote.delete_below(NAME)
    written(kept, b"others!")
    as_new_machine(monkeypatch, tmp_path / "cache")
    found = open_store(bucket.uri).find(SPLIT)
    assert (found.folder / "part" / "a.bin").read_bytes() == b"others!"


def test_folders_go_both_ways_and_only_what_changed(bucket, tmp_path, monkeypatch):  # noqa: F811
    kept = open_store(bucket.uri)
    folder = kept.root / "sweeps" / "one"
    for name in ("a", "b"):
        files.write_bytes(folder / name, name.encode())
    kept.push(folder)
    as_new_machine(monkeypatch, tmp_path / "other")
    other = open_store(bucket.uri)
    there = other.root / "sweeps" / "one"
    other.pull(there)
    assert (there / "a").read_bytes() == b"a"
    before = (there / "b").stat().st_ino
    bucket.write("sweeps/one/a", b"longer")
    bucket.system.delete_file(f"{bucket.name}/some/where/sweeps/one/b")
    files.write_bytes(there / "mine", b"-")
    other.pull(there)
    assert (there / "a").read_bytes() == b"longer" and not (there / "b").exists() and before
    assert (there / "mine").exists()  # not in the storage yet


# --- work and sites ---


def begun(kept: Store) -> Path:
    """A build's room in which something was made and published."""
    room = kept.enter(kept.work(SPLIT))
    files.write_json(room / "progress.json", {"done": 1, "total": 4})
    files.write_bytes(room / "checkpoint" / "state", b"1")
    files.write_bytes(room / "out" / SPLIT.key / "half", b"1")
    for name in ("progress.json", "checkpoint", "out"):
        kept.site.publish_soon(room / name)
    kept.site.settle()
    return room


def test_unfinished_work_is_seen_elsewhere_and_goes_when_it_is_done(bucket, tmp_path, monkeypatch):  # noqa: F811
    room = begun(open_store(bucket.uri))
    as_new_machine(monkeypatch, tmp_path / "other")
    other = open_store(bucket.uri)
    assert other.has_work(SPLIT) and other.progress(SPLIT) == {"done": 1, "total": 4}
    here = other.site.fetch(other.work(SPLIT) / room.name / "checkpoint")
    assert (here / "state").read_bytes() == b"1"
    other.discard_work(SPLIT)
    assert not other.has_work(SPLIT) and bucket.names("work") == []


def test_who_takes_a_build_over_goes_on_in_a_room_that_late_writers_do_not_know(
    bucket, tmp_path, monkeypatch  # noqa: F811
):
    kept = open_store(bucket.uri)
    late, late_site = begun(kept), kept.site
    as_new_machine(monkeypatch, tmp_path / "other")
    other = open_store(bucket.uri)
    room = other.enter(other.work(SPLIT))
    assert room.name != late.name and (room / "checkpoint" / "state").read_bytes() == b"1"
    assert not (room / "out" / SPLIT.key).exists()  # what is not complete may still be written to
    assert {name.split("/")[1] for name in bucket.names("work")} == {room.name}
    monkeypatch.setenv("DIFFULT_CACHE", str(tmp_path / "cache"))  # the first machine wakes up
    files.write_bytes(late / "checkpoint" / "state", b"late")
    late_site.publish(late / "checkpoint")
    monkeypatch.setenv("DIFFULT_CACHE", str(tmp_path / "other"))
    assert (other.site.fetch(room / "checkpoint") / "state").read_bytes() == b"1"
    out = room / "out" / SPLIT.key
    files.write_json(out / "summary.json", {"classes": 10})
    other.commit(SPLIT, seconds=1.0, made=out)
    other.discard_work(SPLIT)
    assert bucket.names("work") == []
    as_new_machine(monkeypatch, tmp_path / "third")
    assert open_store(bucket.uri).find(SPLIT).summary == {"classes": 10}


def test_a_build_in_which_nothing_was_made_leaves_nothing(bucket):  # noqa: F811
    kept = open_store(bucket.uri)
    room = kept.enter(kept.work(SPLIT))
    assert bucket.names("work")
    kept.leave(room)
    assert bucket.names("work") == [] and not room.exists()


def elsewhere(site, paths: dict, cache: str, out) -> None:
    """A worker on another machine: reads an input, writes an output."""
    os.environ["DIFFULT_CACHE"] = cache
    content = (site.fetch(paths["input"]) / "part" / "a.bin").read_bytes()
    files.write_bytes(site.here(paths["out"]) / "made", content * 2)
    site.publish(paths["out"])
    out.put(str(site.here(paths["input"])))


def test_a_worker_with_another_mirror_reads_inputs_and_its_output_comes_back(bucket, tmp_path):  # noqa: F811
    kept = written(open_store(bucket.uri))
    paths = {"input": str(kept.folder(SPLIT)), "out": str(kept.root / "artifacts" / "other" / "abc")}
    out = SPAWN.Queue()
    worker = SPAWN.Process(target=elsewhere, args=(kept.site, paths, str(tmp_path / "worker"), out))
    worker.start()
    assert out.get(timeout=60).startswith(str(tmp_path / "worker"))
    worker.join(60)
    assert not Path(paths["out"]).exists()
    assert (kept.site.fetch(paths["out"]) / "made").read_bytes() == b"weightsweights"


def test_an_upload_does_not_stop_who_asked_for_it(bucket, monkeypatch):  # noqa: F811
    kept, go = open_store(bucket.uri), threading.Event()
    original = Remote.put
    monkeypatch.setattr(Remote, "put", lambda *args: go.wait(30) and original(*args))
    files.write_bytes(kept.work(SPLIT) / "checkpoint" / "state", b"1")
    kept.site.publish_soon(kept.work(SPLIT) / "checkpoint")
    assert bucket.names("work") == []
    go.set()
    kept.site.settle()
    assert len(bucket.names("work")) == 1


def test_a_storage_that_fails_for_some_seconds_is_waited_for():
    with buckets.amazon() as server:
        found = buckets.make(server, "s3")
        kept = Remote(found.explicit.replace("s3://", "s3://test:hunter2hunter2@"))
        kept.write("a", b"1")
    again = ExitStack()
    port = int(server.rpartition(":")[2])
    threading.Timer(3, lambda: again.enter_context(buckets.amazon(port))).start()
    with again:
        kept.write("b", b"2")  # moto keeps its buckets in this process
        assert kept.read("b") == b"2" and set(kept.list()) == {"a", "b"}


def test_what_is_refused_is_not_asked_again(bucket):  # noqa: F811
    start = time.monotonic()
    with pytest.raises(OSError, match="NO_SUCH_BUCKET|NOT_FOUND"):
        Remote(bucket.uri.replace(bucket.name, "no-such")).write("a", b"1")
    assert time.monotonic() - start < 10


def test_what_is_not_there_is_missing_at_once_and_removed_in_silence(bucket):  # noqa: F811
    kept, start = Remote(bucket.uri), time.monotonic()
    with pytest.raises(FileNotFoundError):
        kept.read("a")
    with pytest.raises(FileNotFoundError):
        kept.copy("a", "b")
    kept.delete("a")
    kept.delete_below("a")
    assert kept.list("a") == {} and time.monotonic() - start < 10


# --- one builder ---


def slow_builder(orders, resources) -> None:
    (order,) = orders
    with open(os.environ["BUILT"], "a") as file:
        file.write(f"{os.getpid()}\n")
    time.sleep(float(os.environ.get("SLOW", "0.5")))
    files.write_json(order.out / "summary.json", {"by": os.getpid()})


def drive(uri: str, cache: str, seconds: str) -> None:
    os.environ.update({"DIFFULT_CACHE": cache, "SLOW": seconds})
    lease.BEAT, lease.POLL = 0.1, 0.05
    module = types.ModuleType("slow_builders")
    module.build = slow_builder
    sys.modules["slow_builders"] = module
    build.BUILDERS["split"] = "slow_builders:build"
    artifact = build.build_together([SPLIT], open_store(uri))[0]
    files.write_json(Path(cache) / "got.json", artifact.summary)


@pytest.fixture
def built(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("BUILT", str(tmp_path / "built.txt"))
    return tmp_path / "built.txt"


def start(uri: str, cache: Path, seconds: str = "0.5") -> multiprocessing.Process:
    process = SPAWN.Process(target=drive, args=(uri, str(cache), seconds))
    process.start()
    return process


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_drivers_on_several_machines_build_a_stage_once(bucket, built, tmp_path):  # noqa: F811
    drivers = [start(bucket.uri, tmp_path / str(n), "1") for n in range(4)]
    for each in drivers:
        each.join(120)
    assert [each.exitcode for each in drivers] == [0] * 4
    (builder,) = built.read_text().split()
    assert [files.read_json(tmp_path / str(n) / "got.json") for n in range(4)] == [{"by": int(builder)}] * 4
    assert bucket.names("leases") == []


def test_what_a_killed_driver_held_is_taken_over(bucket, built, tmp_path):  # noqa: F811
    first = start(bucket.uri, tmp_path / "1", "600")
    wait_for(built.exists)
    os.kill(first.pid, signal.SIGKILL)
    first.join(30)
    second = start(bucket.uri, tmp_path / "2")
    second.join(90)
    open_store(bucket.uri).tidy_leases()
    assert bucket.names("leases") == []
    assert second.exitcode == 0 and built.read_text().split() == [str(first.pid), str(second.pid)]


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(lease, "POLL", 0.02)
    monkeypatch.setattr(lease, "EXPIRES", 0.3)
    monkeypatch.setattr(lease, "BEAT", 0.05)


def stranger(kept, beat: int = 1, **facts) -> None:
    """An owner on another machine that holds the first number of `a`."""
    told = {"owner": "them", "beat": beat, "pid": 1, "place": ["there"], "host": "there", "time": 0.0}
    kept.remote.write("leases/owners/them.json", json.dumps({**told, "leases": {}, **facts}).encode())
    kept.remote.write("leases/a/0000000001.them", b"-")


def test_an_owner_elsewhere_that_gives_no_sign_is_passed_over(bucket, quick):  # noqa: F811
    kept, told = open_store(bucket.uri), []
    stranger(kept)
    begin = time.monotonic()
    with kept.hold({"a": {}}, told.append):
        assert time.monotonic() - begin >= 0.3
        assert "a/0000000001.them" not in bucket.names("leases")
    assert told == ["a is being built by process 1 on there: waiting"]


def test_a_living_owner_elsewhere_is_not_tidied_away(bucket):  # noqa: F811
    kept = open_store(bucket.uri)
    stranger(kept, time=time.time() - 3600)
    kept.tidy_leases()
    assert len(bucket.names("leases")) == 2
    stranger(kept, time=time.time() - 7 * 86400)
    kept.tidy_leases()
    assert bucket.names("leases") == []


def test_an_owner_whose_claim_was_taken_learns_that_it_lost(bucket, quick):  # noqa: F811
    kept = open_store(bucket.uri)
    with kept.hold({"a": {}}) as held:
        held.check()
        for name in bucket.names("leases/a"):
            kept.remote.delete(f"leases/a/{name}")
        with pytest.raises(lease.Lost, match="a was taken over"):
            held.check()


def test_who_was_taken_for_dead_while_choosing_starts_anew(bucket, monkeypatch):  # noqa: F811
    """Its number may be as high as that of one that has passed it by."""
    kept = open_store(bucket.uri)
    slow, quick_one = (claims.Claim(kept.remote, "a", owner) for owner in ("aaa", "zzz"))
    original, entered = slow._put, []

    def put(name: str) -> None:
        if not name.endswith("choosing") and not entered:
            entered.append(name)
            quick_one.remove("aaa")  # it looks dead
            quick_one.enter()
            assert quick_one.ahead() == []
        original(name)

    monkeypatch.setattr(slow, "_put", put)
    slow.enter()
    assert slow.ahead() == ["zzz"] and quick_one.ahead() == []


# --- the storekeeper ---


def told_by(capsys, *words: str, code: int = 0) -> list[str]:
    assert storekeeper.main(words) == code
    out, err = capsys.readouterr()
    return (out or err).splitlines()


def test_the_storekeeper_on_a_uri(bucket, tmp_path, monkeypatch, capsys):  # noqa: F811
    first = written(open_store(bucket.uri)).folder(SPLIT)
    monkeypatch.setenv("DIFFULT_STORAGE", bucket.uri)
    as_new_machine(monkeypatch, tmp_path / "other")
    lines = told_by(capsys, "ls")
    assert lines[1].split()[:3] == ["split", SPLIT.key, "whole"] and bucket.shown in lines[-1]
    assert f"folder: {bucket.below(NAME)}" in "\n".join(told_by(capsys, "show", SPLIT.key[:6]))
    assert told_by(capsys, "verify") == ["1 artifacts are whole, 0 damaged"]
    bucket.write(f"{NAME}/part/a.bin", b"WEIGHTS")
    assert "a.bin has another checksum" in told_by(capsys, "verify", code=1)[0]
    assert "would remove" in told_by(capsys, "gc", "--dry-run")[0] and bucket.names(NAME)
    assert "no sweep needs it" in told_by(capsys, "gc")[0]
    assert bucket.names("artifacts") == [] and first.exists()
    assert not (tmp_path / "other").exists()


def test_gc_keeps_what_a_running_build_needs(bucket, monkeypatch, capsys):  # noqa: F811
    kept = written(open_store(bucket.uri))
    monkeypatch.setenv("DIFFULT_STORAGE", bucket.uri)
    with kept.hold({f"split-{SPLIT.family}": {"builds": [SPLIT.key], "needs": []}}):
        assert told_by(capsys, "gc") == ["removed 0, 0 B"]
    assert "no sweep needs it" in told_by(capsys, "gc")[0]


def test_this_process_publishes_for_all_its_stores():
    assert mirror.PUBLISHER is PUBLISHER and remote.PATIENCE > 0
