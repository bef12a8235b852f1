"""An artifact is used only as it was written; what is damaged is set aside and built again."""

from __future__ import annotations

import io
import json
import sys
import types

import pytest

from diffult_ray import build, config, files, pipeline, store
from diffult_ray.budget import Purse
from diffult_ray.cluster import Capacity
from diffult_ray.config import Experiment
from diffult_ray.costs import Costs
from diffult_ray.errors import BadInput
from diffult_ray.plan import make_plan
from diffult_ray.progress import Narrator
from diffult_ray.store import Store

SPLIT = pipeline.split(Experiment(select="test"))


@pytest.fixture(autouse=True)
def notes(tmp_path, monkeypatch):
    """What this machine remembers to have compared is of this test alone."""
    monkeypatch.setattr(store, "_notes", lambda: tmp_path / "notes")
    monkeypatch.setattr(store, "_VERIFIED", {})


def written(root, content: bytes = b"weights") -> Store:
    """A store with one artifact."""
    kept = Store(root / "storage")
    folder = kept.folder(SPLIT)
    files.write_bytes(folder / "part" / "a.bin", content)
    files.write_json(folder / "summary.json", {"classes": 10})
    kept.commit(SPLIT, seconds=1.5)
    return kept


def as_new_process() -> None:
    store._VERIFIED.clear()


def as_new_machine(root) -> None:
    as_new_process()
    for note in (root / "notes").glob("*"):
        note.unlink()


def test_what_was_written_is_found(tmp_path):
    kept = written(tmp_path)
    assert kept.find(SPLIT).summary == {"classes": 10}
    assert kept.look(SPLIT).seconds == 1.5


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, flip, lambda path: path.unlink()], ids=["cut", "flip", "gone"])
def test_a_damaged_artifact_is_set_aside_with_one_warning(damage, tmp_path, capsys):
    kept = written(tmp_path)
    as_new_machine(tmp_path)
    assert kept.find(SPLIT) is not None
    damage(kept.folder(SPLIT) / "part" / "a.bin")
    assert kept.find(SPLIT) is None and kept.find(SPLIT) is None
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: split {SPLIT.key[:8]} is damaged (part/a.bin ")
    assert not kept.folder(SPLIT).exists()
    (aside,) = (kept.root / "damaged").iterdir()
    assert (aside / "manifest.json").exists()
    written(tmp_path)
    assert kept.find(SPLIT) is not None


def test_a_manifest_that_is_none_is_damage(tmp_path, capsys):
    kept = written(tmp_path)
    (kept.folder(SPLIT) / "manifest.json").write_text("{}")
    assert kept.find(SPLIT) is None and kept.look(SPLIT) is None
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_look_changes_nothing(tmp_path, capsys):
    kept = written(tmp_path)
    cut(kept.folder(SPLIT) / "part" / "a.bin")
    assert kept.look(SPLIT) is None
    assert kept.folder(SPLIT).exists() and capsys.readouterr().err == ""


def test_content_is_compared_once_a_process_and_once_a_machine(tmp_path, monkeypatch):
    kept, compared = written(tmp_path), []
    original = store._digest
    monkeypatch.setattr(store, "_digest", lambda path: compared.append(path.name) or original(path))
    assert kept.find(SPLIT) and compared == []  # it was written here
    as_new_machine(tmp_path)
    assert kept.find(SPLIT) and kept.find(SPLIT)
    assert sorted(compared) == ["a.bin", "summary.json"]
    as_new_process()
    assert kept.find(SPLIT) and len(compared) == 2
    (kept.folder(SPLIT) / "part" / "a.bin").touch()
    assert kept.find(SPLIT) and len(compared) == 4


def test_what_a_newer_version_wrote_is_refused_in_one_line(tmp_path):
    kept = written(tmp_path)
    path = kept.folder(SPLIT) / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": store.FORMAT + 1}))
    for use in (kept.find, kept.look):
        with pytest.raises(BadInput, match=r"manifest\.json: was written by a newer version.*\(got 2\)"):
            use(SPLIT)
    assert kept.folder(SPLIT).exists()
    files.write_json(kept.root / "store.json", {"format": store.FORMAT + 1})
    with pytest.raises(BadInput, match=r"store\.json: was written by a newer version"):
        Store(kept.root)


def test_the_storage_says_its_format(tmp_path):
    kept = written(tmp_path)
    assert files.read_json(kept.root / "store.json") == {"format": store.FORMAT}


@pytest.fixture
def builders(monkeypatch):
    """Builders that note what they build; the keys in order."""
    built: list[str] = []

    def builder(orders, resources):
        for order in orders:
            built.append(order.out.name)
            files.write_json(order.out / "summary.json", {"order": len(built)})

    monkeypatch.setitem(sys.modules, "builders", types.SimpleNamespace(build=builder))
    for name in build.BUILDERS:
        monkeypatch.setitem(build.BUILDERS, name, "builders:build")
    return built


def build_all(stages, kept: Store) -> dict[str, Exception]:
    narrator = Narrator(io.StringIO())
    capacity = Capacity(cpus=4.0, gpus=0.0, origin="here")
    purse = Purse(Costs(make_plan(config.load("digits")), kept), seconds=lambda: 0.0)  # without a budget
    return build.build_all(stages, kept, capacity, narrator, lambda stage, artifact: None, purse)


def test_what_is_damaged_while_a_sweep_runs_is_built_again(tmp_path, builders, capsys):
    kept, extractor = Store(tmp_path / "storage"), pipeline.extractor(Experiment(select="test"))
    assert build_all([SPLIT, extractor], kept) == {}
    assert builders == [SPLIT.key, extractor.key]
    cut(kept.folder(SPLIT) / "summary.json")
    with pytest.raises(RuntimeError, match=f"split {SPLIT.key[:8]} is gone or damaged"):
        build._check_inputs([extractor], kept)
    flip(kept.folder(extractor) / "summary.json")
    assert build_all([extractor], kept) == {}  # the split was there when it was listed
    assert builders[2:] == [SPLIT.key, extractor.key]
    assert len(capsys.readouterr().err.splitlines()) == 2


@pytest.mark.parametrize(("lost", "built", "runs"), [
    ("ActorUnavailableError", True, 2), ("UnserializableException", True, 2), ("creation task", False, 1),
    ("ValueError", False, 1),
])
def test_a_build_whose_machine_is_lost_goes_on(lost, built, runs, tmp_path, monkeypatch):
    """Ray's own errors, as it raises them for machines that go; not those of what ran there."""
    from ray import exceptions

    errors = {
        "ActorUnavailableError": exceptions.ActorUnavailableError("unavailable", b"\0" * 16),
        "UnserializableException": exceptions.UnserializableException("cancelled before it started"),
        "creation task": exceptions.RayActorError(
            error_msg="The actor died because of an error raised in its creation task"
        ),
        "ValueError": ValueError("no"),
    }
    tried: list[int] = []

    def builder(orders, resources) -> None:
        tried.append(len(tried))
        if len(tried) == 1:
            raise errors[lost]
        files.write_json(orders[0].out / "summary.json", {})

    module = types.ModuleType("lossy_builders")
    module.build = builder
    monkeypatch.setitem(sys.modules, "lossy_builders", module)
    monkeypatch.setitem(build.BUILDERS, "split", "lossy_builders:build")
    kept = Store(tmp_path)
    failed = build_all([SPLIT], kept)
    assert (failed == {}) == built == (kept.find(SPLIT) is not None) and len(tried) == runs
