"""Checkpoints are written beside the training, from a copy."""

from __future__ import annotations

import errno
import resource
import threading
from dataclasses import dataclass, field

import pytest
import torch

from diffult_ray import files
from diffult_ray.config import StageResources
from diffult_ray.snapshot import Snapshot
from diffult_ray.stages import Site
from diffult_ray.stages.training import KEPT, STATE, run_here


@dataclass(frozen=True)
class SlowSite(Site):
    """A storage that is ready when it is told so."""

    ready: threading.Event = field(default_factory=threading.Event)

    def settle(self) -> None:
        assert self.ready.wait(60), "the training waits for its checkpoint"


@dataclass(frozen=True)
class FullSite(Site):
    """It tells an error once."""

    errors: list[OSError] = field(default_factory=lambda: [OSError("No space left on device")])

    def settle(self) -> None:
        for error in self.errors[:]:
            self.errors.clear()
            raise error


def run(loop, work, site=None):
    run_here(
        lambda run, _: loop(run), {}, resources=StageResources(), work=work, site=site or Site(),
        checkpoint_seconds=0.0,
    )


def restored(work):
    found = []
    run(lambda run: found.append(run.restore()), work)
    return found[0]


def test_it_is_of_the_moment_at_which_it_was_asked_for(tmp_path):
    weights, rows, site = torch.ones(3, 4), [1], SlowSite()

    def loop(run):
        run.save({"weights": weights}, {"rows": rows})
        weights.fill_(2)
        rows.append(2)
        site.ready.set()

    run(loop, tmp_path, site)
    tensors, numbers = restored(tmp_path)
    assert torch.equal(tensors["weights"], torch.ones(3, 4)) and numbers == {"rows": [1]}


def test_none_is_due_while_one_is_on_its_way(tmp_path):
    site = SlowSite()

    def loop(run):
        assert run.should_save()
        run.save({"weights": torch.ones(2)}, {})
        assert not run.should_save()
        site.ready.set()
        run.settle()
        assert run.should_save()

    run(loop, tmp_path, site)


@pytest.mark.parametrize("asks", [False, True], ids=["at the end", "when the next is due"])
def test_one_that_cannot_be_written_ends_the_run(tmp_path, asks):
    after = []

    def loop(run):
        run.save({"weights": torch.ones(2)}, {})
        while asks:
            run.should_save()
        after.append(True)

    with pytest.raises(OSError, match="No space left"):
        run(loop, tmp_path, FullSite())
    assert bool(after) is not asks
    assert restored(tmp_path) is None


@pytest.mark.parametrize("write", [
    lambda path: files.write_tensors(path, {"a": torch.zeros(10_000)}),
    lambda path: files.write_bytes(path, bytes(40_000)),
    lambda path: Snapshot().take({"a": torch.zeros(10_000)}, {}).write(path),
], ids=["tensors", "bytes", "snapshot"])
def test_a_system_that_takes_no_more_is_told_alike_and_nothing_is_left(tmp_path, write):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError) as told:
            write(tmp_path / "it")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert told.value.errno == errno.EFBIG
    assert list(tmp_path.iterdir()) == []


def test_the_last_whole_ones_are_kept(tmp_path):
    """What a killed writer has left is none of them."""
    half = tmp_path / "checkpoints" / "checkpoint_000000"
    half.mkdir(parents=True)
    (half / f".{STATE}.tmp").touch()

    def loop(run):
        for step in range(KEPT + 2):
            run.save({"weights": torch.full((2,), step)}, {"step": step})
            run.settle()

    run(loop, tmp_path)
    assert restored(tmp_path)[1] == {"step": KEPT + 1}
    assert len(list((tmp_path / "checkpoints").iterdir())) == KEPT
    (sorted((tmp_path / "checkpoints").iterdir())[-1] / STATE).write_bytes(b"damaged")
    assert restored(tmp_path)[1] == {"step": KEPT}
