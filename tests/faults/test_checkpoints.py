"""A generator goes on from its last checkpoint, from the one before if that is damaged, or from the start.

Rows of the loss curve carry the seconds at which they were made, so that those which a later run has
taken over from a checkpoint are told apart from those of steps that it trained again.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from diffult_ray import files
from diffult_ray.store import Store
from tests.faults.door import Door, Tally, wait_for, wait_for_the_end_of
from tests.faults.one_generator import stage

STEPS = 600
SECONDS = 0.5  # between two checkpoints, in place of 30


@dataclass
class Builder(Door):
    """Builds one generator in a process of its own, with one worker in a task or several under Train."""

    workers: int = 1

    def command(self, *arguments: str) -> list[str]:
        given = [str(self.storage), str(STEPS), str(SECONDS), str(self.workers)]
        return [sys.executable, "-m", "tests.faults.one_generator", *given]

    @property
    def checkpoints(self) -> list[Path]:
        """Those that are whole: one more may have been on its way when the driver was killed."""
        return sorted(filter(is_whole, self.kept("checkpoint_*/state.safetensors")))

    def kept(self, pattern: str) -> Iterator[Path]:
        """Files in the folder of checkpoints: with several workers it is Ray Train's."""
        folder = "checkpoints" if self.workers == 1 else "generator-*"
        return (self.storage / "work").glob(f"generator-*/*/{folder}/{pattern}")

    @property
    def rows(self) -> list[dict[str, Any]]:
        return files.read_json(Store(self.storage).folder(stage(STEPS)) / "history.json")

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        (path,) = (Store(self.storage).folder(stage(STEPS)) / "unet").glob("*.safetensors")
        return files.read_tensors(path)

    def check_as(self, other: Builder) -> None:
        """The same loss curve and the same weights."""
        for name in ("step", "loss"):
            assert [row[name] for row in self.rows] == [row[name] for row in other.rows]
        found, expected = self.weights, other.weights
        assert all(torch.equal(found[name], expected[name]) for name in expected)

    def stop_after_two_checkpoints(self) -> None:
        self.begin()
        wait_for(lambda: len(self.checkpoints) >= 2 or self.process.poll() is not None, 300)
        self.kill()
        wait_for_the_end_of(self.processes)


@pytest.fixture(scope="module")
def new_builder(new_faulty: Callable[[], Door]) -> Callable[..., Builder]:
    def make(workers: int = 1) -> Builder:
        door = new_faulty()
        return Builder(storage=door.storage, sweep=door.sweep, ray=door.ray, workers=workers)

    return make


@pytest.fixture(scope="module")
def undisturbed(new_builder: Callable[..., Builder]) -> Callable[..., Builder]:
    """The same generator of a builder that nothing hits, by its number of workers."""

    @cache
    def built(workers: int = 1) -> Builder:
        builder = new_builder(workers)
        builder.finish()
        return builder

    return built


def is_whole(path: Path) -> bool:
    try:
        return bool(files.read_state(path))
    except (OSError, SafetensorError):
        return False


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def trained_before(path: Path) -> list[dict[str, Any]]:
    """The rows of the loss curve that a checkpoint holds."""
    return files.read_state(path)[1]["history"]


# Which of the checkpoints are cut, oldest first, the one that is gone on from, and the workers.
CASES = {
    "none": ([], -1, 1), "the last": ([-1], -2, 1), "all": (None, None, 1),
    "none, under Train": ([], -1, 2), "the last, under Train": ([-1], -2, 2),
}


@pytest.mark.parametrize("case", CASES)
def test_a_generator_goes_on_from_a_checkpoint_that_is_whole(
    case: str, undisturbed: Callable[..., Builder], new_builder: Callable[..., Builder], tally: Tally
):
    which, source, workers = CASES[case]
    builder, expected = new_builder(workers), undisturbed(workers)
    with tally.fault():
        builder.stop_after_two_checkpoints()
        kept = builder.checkpoints
        before = [] if source is None else trained_before(kept[source])
        for path in kept if which is None else [kept[i] for i in which]:
            cut(path)
        builder.finish()
        assert len(before) > 0 or source is None
        assert builder.rows[: len(before)] == before
        builder.check_as(expected)
        assert not list((builder.storage / "work").glob("*"))


def test_trains_own_list_of_checkpoints_is_cut(
    undisturbed: Callable[..., Builder], new_builder: Callable[..., Builder], tally: Tally
):
    builder, expected = new_builder(workers=2), undisturbed(workers=2)
    with tally.fault():
        builder.stop_after_two_checkpoints()
        (path,) = builder.kept("checkpoint_manager_snapshot.json")
        before = trained_before(builder.checkpoints[-1])
        cut(path)
        builder.finish()
        assert before and builder.rows[: len(before)] == before
        builder.check_as(expected)


def test_the_workers_of_a_killed_driver_never_write_beside_the_next_one(
    undisturbed: Callable[..., Builder], new_builder: Callable[..., Builder], tally: Tally
):
    """They are stopped, so that they live on while the next driver builds; then they are let go on."""
    builder, expected = new_builder(), undisturbed()
    with tally.fault():
        builder.begin()
        wait_for(lambda: builder.checkpoints or builder.process.poll() is not None, 300)
        late = [int(line.split()[0]) for line in builder.processes() if "ray::generator" in line]
        assert late
        for pid in late:
            os.kill(pid, signal.SIGSTOP)
        builder.kill()
        builder.begin()
        wait_for(lambda: len(builder.checkpoints) >= 2 or builder.process.poll() is not None, 300)
        for pid in late:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        assert builder.end() == 0, builder.said[-1]
        builder.check_as(expected)
        wait_for_the_end_of(builder.processes)
        assert not list((builder.storage / "work").glob("*"))
