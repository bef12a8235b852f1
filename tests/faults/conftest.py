"""One undisturbed run, which every disturbed one is compared with; and the sum of all faults at the end."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.door import SWEEP, TALLY, Door, Tally, wait_for_the_end_of


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.faults)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if TALLY.injected:
        terminalreporter.section("faults")
        terminalreporter.line(str(TALLY))


@pytest.fixture(scope="session")
def tally() -> Tally:
    return TALLY


@pytest.fixture(scope="session")
def new_faulty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Door]]:
    """Makes doors, each with its own storage and Ray folder, for the sweep of this folder or a text."""
    folders: list[Path] = []

    def make(text: str = SWEEP, *, storage: Path | None = None, name: str = "faults") -> Door:
        folder = tmp_path_factory.mktemp("door")
        ray = Path(tempfile.mkdtemp(prefix="dr-"))  # a short path, for its sockets
        folders.append(ray)
        (folder / "sweep.yaml").write_text(text)
        return Door(storage=storage or folder / "storage", sweep=folder / "sweep.yaml", ray=ray, name=name)

    yield make
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def reference(new_faulty: Callable[..., Door]) -> Door:
    """The undisturbed run."""
    door = new_faulty()
    door.finish()
    door.check(door)
    return door


@pytest.fixture
def door(new_faulty: Callable[..., Door]) -> Door:
    return new_faulty()


@pytest.fixture(scope="session")
def halfway(new_faulty: Callable[..., Door]) -> Callable[[], Door]:
    """Makes doors of one storage in which all but the trials is stored, as a killed driver leaves it."""
    first = new_faulty()
    kept = first.storage.parent / "kept"

    def make() -> Door:
        if not kept.exists():
            first.begin()
            first.until(r"trial 1/")
            first.kill()
            wait_for_the_end_of(first.processes)  # a trial on its way writes on for a moment
            shutil.copytree(first.storage, kept)
        shutil.rmtree(first.storage)
        shutil.copytree(kept, first.storage)
        door = Door(storage=first.storage, sweep=first.sweep, ray=first.ray, seconds=first.seconds)
        door.seen = door.manifests()
        return door

    return make


@pytest.fixture(scope="session")
def superuser() -> None:
    if os.geteuid() != 0:
        pytest.skip("only root may mount a file system")
