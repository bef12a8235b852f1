"""A snapshot is a safetensors file like any other, whatever is in it and wherever it is written."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffult_ray import files
from diffult_ray.snapshot import KINDS, Snapshot


def state(filling: int = 1) -> dict[str, torch.Tensor]:
    kinds = {name: torch.full((3, 5), filling).to(getattr(torch, name)) for name in KINDS}
    return {
        **kinds,
        "step": torch.tensor(float(filling)),
        "none": torch.empty(0, 4),
        "nhwc": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "turned": torch.randn(6, 7).T,
        "learnt": torch.randn(9, requires_grad=True),
        "large": torch.full((700, 1001), filling, dtype=torch.float32),
    }


@pytest.fixture(params=["disk", "memory"])
def folder(request, tmp_path, tmp_path_factory):
    """File systems that can be written past the page cache, and that perhaps cannot."""
    if request.param == "disk":
        yield tmp_path
        return
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK):
        pytest.skip("no file system in memory")
    with tempfile.TemporaryDirectory(dir=shared) as made:
        yield Path(made)


def test_it_is_read_as_what_was_taken(folder):
    snapshot = Snapshot()
    for filling in (1, 2):  # the second in the memory of the first
        taken = state(filling)
        snapshot.take(taken, {"step": filling}).write(folder / "state")
        tensors, numbers = files.read_state(folder / "state")
        assert numbers == {"step": filling}
        assert tensors.keys() == taken.keys()
        for name, each in taken.items():
            assert tensors[name].dtype == each.dtype
            assert torch.equal(tensors[name], each.detach()), name
    assert load_file(folder / "state").keys() == {*taken, "__json__"}
    assert [path.name for path in folder.iterdir()] == ["state"]


@pytest.mark.parametrize("sizes", [(10, 100_000), (100_000, 10), (0, 1)], ids=["grows", "shrinks", "begins"])
def test_one_of_another_size_leaves_nothing_of_the_last(tmp_path, sizes):
    snapshot = Snapshot()
    for size in sizes:
        taken = {"a": torch.arange(size)}
        snapshot.take(taken, []).write(tmp_path / "state")
        assert torch.equal(files.read_state(tmp_path / "state")[0]["a"], taken["a"])


def test_a_file_system_that_refuses_to_be_written_directly(tmp_path, monkeypatch):
    """Such as some over a network; the size is no multiple of a page's, which it would refuse, too."""
    monkeypatch.setattr(os, "O_DIRECT", os.O_TMPFILE, raising=False)  # not with O_CREAT: EINVAL
    taken = {"a": torch.arange(1001)}
    Snapshot().take(taken, {}).write(tmp_path / "state")
    assert torch.equal(files.read_state(tmp_path / "state")[0]["a"], taken["a"])
