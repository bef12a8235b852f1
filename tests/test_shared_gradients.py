"""Gradients that ranks average in shared memory are those that DDP averages through gloo."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import spawn
from torch.nn.parallel import DistributedDataParallel

from diffult_ray.stages import shared_memory
from diffult_ray.stages.shared_gradients import share_gradients
from tests.ranks import join, leave

STEPS = 7


def _network() -> DistributedDataParallel:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(16, 700), torch.nn.ReLU(), torch.nn.Linear(700, 700), torch.nn.Linear(700, 3)]
    layers[2].bias.requires_grad_(False)
    network = torch.nn.Sequential(*layers)
    # 2 MB of gradients: several buckets, which DDP arranges anew after the first step
    return DistributedDataParallel(network, gradient_as_bucket_view=True, bucket_cap_mb=1)


def _step(network: DistributedDataParallel, rng: torch.Generator) -> None:
    network(torch.randn(8, 16, generator=rng)).square().mean().backward()


def _trained(rank: int, share: bool) -> list[torch.Tensor]:
    network = _network()
    if share:
        assert share_gradients(network)
        dist.barrier()  # until when the first rank has taken the name away
        assert not list(Path("/dev/shm").glob("diffult-training-*"))  # nothing outlives the processes
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    rng = torch.Generator().manual_seed(rank)
    for step in range(STEPS):
        if step % 3 == 1:
            with network.no_sync():
                _step(network, rng)
        _step(network, rng)
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in network.parameters()]


def _compare(rank: int, world: int, folder: Path) -> None:
    join(rank, world, folder)
    state = {"gloo": _trained(rank, share=False), "shared": _trained(rank, share=True)}
    torch.save(state, folder / f"{rank}.pt")
    leave()


@pytest.mark.parametrize("world", [2, 3])
def test_the_same_weights_are_trained_on_every_rank(world, tmp_path):
    spawn(_compare, (world, tmp_path), nprocs=world)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    for found in ranks:
        for own, first in zip(found["shared"], ranks[0]["shared"], strict=True):
            assert torch.equal(own, first)
        for shared, gloo in zip(found["shared"], found["gloo"], strict=True):
            if world == 2:
                assert torch.equal(shared, gloo)
            torch.testing.assert_close(shared, gloo, rtol=1e-4, atol=1e-5)


def _apart(rank: int, world: int, folder: Path, local: int, place: str) -> None:
    join(rank, world, folder, local)
    shared_memory.PLACE = Path(place)
    network = _network()
    assert not share_gradients(network)
    _step(network, torch.Generator().manual_seed(rank))  # goes on through gloo
    gradients = [torch.zeros_like(network.module[0].weight) for _ in range(world)]
    dist.all_gather(gradients, network.module[0].weight.grad)
    assert torch.equal(*gradients)
    leave()


@pytest.mark.parametrize(
    ("local", "place"),
    [(1, "/dev/shm"), (2, "/proc/there/is/none")],
    ids=["ranks on two machines", "no memory to share"],
)
def test_elsewhere_gloo_averages(local, place, tmp_path):
    spawn(_apart, (2, tmp_path, local, place), nprocs=2)


def _die(rank: int, world: int, folder: Path) -> None:
    join(rank, world, folder)
    network, rng = _network(), torch.Generator().manual_seed(rank)
    assert share_gradients(network)
    _step(network, rng)
    if rank == 1:
        os._exit(9)
    with pytest.raises(RuntimeError):
        _step(network, rng)
    (folder / "told").touch()
    os._exit(0)


def test_a_rank_that_dies_ends_the_step_of_the_others(tmp_path):
    context = spawn(_die, (2, tmp_path), nprocs=2, join=False)
    for process in context.processes:
        process.join(120)
    assert [process.exitcode for process in context.processes] == [0, 9]
    assert (tmp_path / "told").exists()
