"""The storage is full, or away for some seconds."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.door import Door, Tally

SIZE = "64m"
AWAY = 5.0  # seconds


@pytest.fixture
def small_disk(superuser: None, tmp_path: Path) -> Iterator[Path]:
    """A file system of a few megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", folder], capture_output=True, text=True
    )
    if made.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(folder: Path) -> Path:
    """A file that leaves no room beside it."""
    filler = folder / "filler"
    with pytest.raises(OSError, match="No space left"), open(filler, "wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    return filler


def test_a_full_disk(reference: Door, new_faulty: Callable[..., Door], small_disk: Path, tally: Tally):
    door = new_faulty(storage=small_disk / "storage")
    with tally.fault():
        door.begin()
        door.until(r"\] generator .*started")
        filler = fill(small_disk)
        assert door.end() == 1, door.said[-1]
        assert "No space left" in door.said[-1] and "Traceback" not in door.said[-1]
        filler.unlink()
        door.finish()
        tally.cost(door, reference)
        door.check(reference)


def point(link: Path, target: Path) -> None:
    """Let a link lead elsewhere, in one step."""
    new = link.with_name("new")
    new.symlink_to(target)
    new.rename(link)


@pytest.mark.parametrize("line", [r"\] generator .*started", r"\] images .*started"])
def test_a_storage_that_is_away_for_some_seconds(
    line: str, reference: Door, new_faulty: Callable[..., Door], tmp_path: Path, tally: Tally
):
    """Its name leads in a circle meanwhile, so that every use of it fails."""
    place, there = tmp_path / "place", tmp_path / "there"
    there.mkdir()
    place.symlink_to(there)
    door = new_faulty(storage=place / "storage")
    with tally.fault():
        door.begin()
        door.until(line)
        point(place, place)
        with contextlib.suppress(subprocess.TimeoutExpired):
            door.process.wait(AWAY)
        point(place, there)
        assert door.end() in (0, 1), door.said[-1]
        assert "Traceback" not in door.said[-1]
        door.finish()
        tally.cost(door, reference)
        door.check(reference)
