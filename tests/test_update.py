"""Ranks that share the state of a training, each updating a part of it, train as those that each have all."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from diffusers.training_utils import EMAModel
from torch.multiprocessing import spawn
from torch.nn.parallel import DistributedDataParallel

from diffult_ray.allotment import ALONE
from diffult_ray.stages import shared_memory
from diffult_ray.stages.shared_gradients import share_gradients
from diffult_ray.stages.training import load_optimizer, optimizer_tensors
from diffult_ray.stages.update import Update
from tests.ranks import join, leave

STEPS = 6
UNCLIPPED, CLIPPED = 1e9, 1e-2


class Training:
    """Of a small network of convolutions, channels-last, as the generator's is."""

    def __init__(self, most: float) -> None:
        torch.manual_seed(0)
        first, second, last = (torch.nn.Conv2d(*sizes) for sizes in ((3, 40, 3), (40, 30, 3), (30, 2, 1)))
        network = torch.nn.Sequential(first, torch.nn.SiLU(), second, last)
        self.network = network.to(memory_format=torch.channels_last)
        parameters = list(self.network.parameters())
        self.average = EMAModel(parameters, decay=0.9, foreach=True)
        self.optimizer = torch.optim.Adam(parameters, lr=0.01, fused=True)
        self.update = Update(parameters, self.optimizer, self.average, most=most, given=ALONE)

    def go(self, rank: int, steps: range) -> None:
        parallel = DistributedDataParallel(self.network, gradient_as_bucket_view=True, bucket_cap_mb=0.03)
        share_gradients(parallel, self.update.owners)
        for step in steps:
            self.optimizer.zero_grad(set_to_none=True)
            rng = torch.Generator().manual_seed(10 * step + rank)
            parallel(torch.randn(4, 3, 9, 9, generator=rng)).square().mean().backward()
            self.update.step()

    def state(self) -> dict[str, torch.Tensor]:
        shadows = {f"average.{i}": s for i, s in enumerate(self.average.shadow_params)}
        found = {**self.network.state_dict(), **shadows, **optimizer_tensors(self.optimizer)}
        return {name: each.detach().clone() for name, each in found.items()}

    def load(self, state: dict[str, torch.Tensor]) -> None:
        self.network.load_state_dict({k: state[k] for k in self.network.state_dict()})
        count = len(self.average.shadow_params)
        self.average.shadow_params = [state[f"average.{i}"] for i in range(count)]
        load_optimizer(self.optimizer, state)


def _train(rank: int, world: int, folder: Path, most: float) -> None:
    join(rank, world, folder)
    apart, shared, resumed = Training(most), Training(most), Training(most)
    apart.go(rank, range(STEPS))
    assert shared.update.share()
    shared.go(rank, range(STEPS // 2))
    halfway = shared.state()
    dist.barrier()  # all have it before anyone goes on
    resumed.load(halfway)
    assert resumed.update.share()
    resumed.average.optimization_step = STEPS // 2
    resumed.go(rank, range(STEPS // 2, STEPS))
    states = {name: t.state() for name, t in (("apart", apart), ("shared", resumed))}
    owned = {r for r in shared.update.owners.values()}
    held = sum(p.grad is not None for p in resumed.update.parameters)
    torch.save({**states, "owned": owned, "held": held}, folder / f"{rank}.pt")
    leave()


@pytest.mark.parametrize("most", [UNCLIPPED, CLIPPED])
@pytest.mark.parametrize("world", [2, 3])
def test_weights_moments_and_average_are_those_of_ranks_that_each_have_all(world, most, tmp_path):
    spawn(_train, (world, tmp_path, most), nprocs=world)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    first = ranks[0]["apart"]
    assert len(first) == 6 * 5  # parameters, average, and Adam's three of each
    moment = torch.cat([v.flatten() for name, v in first.items() if name.endswith("exp_avg")])
    assert (moment.norm() <= CLIPPED) == (most == CLIPPED)
    for found in ranks:
        assert found["owned"] == set(range(world))
        for name, value in first.items():
            if world == 2:
                assert torch.equal(found["shared"][name], value), name
            torch.testing.assert_close(found["shared"][name], value, rtol=1e-4, atol=1e-5, msg=name)
            assert torch.equal(found["shared"][name], ranks[0]["shared"][name]), name
            assert found["shared"][name].stride() == value.stride()
    # each has updated its own, and all of them together each once
    assert sum(found["held"] for found in ranks) == 6
    assert max(found["held"] for found in ranks) < 6


def _seen(rank: int, world: int, folder: Path) -> None:
    join(rank, world, folder)
    training = Training(UNCLIPPED)
    assert training.update.share()
    before = training.network[0].weight.detach().clone()
    training.update.wait()  # all have it
    if rank == 0:  # as it writes the averaged weights
        training.average.store(training.network.parameters())
        with torch.no_grad():
            training.network[0].weight.zero_()
        training.average.restore(training.network.parameters())
    training.update.wait()
    assert torch.equal(training.network[0].weight, before)
    with torch.no_grad():
        training.network[2].bias[rank] = 7.0 + rank
    training.update.wait()
    assert training.network[2].bias[:world].tolist() == [7.0 + r for r in range(world)]
    assert not list(Path("/dev/shm").glob("diffult-training-*"))  # nothing outlives the processes
    leave()


def test_what_one_rank_writes_the_others_have(tmp_path):
    spawn(_seen, (2, tmp_path), nprocs=2)


def _alone(rank: int, world: int, folder: Path) -> None:
    join(rank, world, folder)
    shared_memory.PLACE = Path("/proc/there/is/none")
    training = Training(UNCLIPPED)
    before = training.network[0].weight.detach().clone()
    assert not training.update.share()
    training.go(rank, range(2))
    weights = [torch.zeros_like(before) for _ in range(world)]
    dist.all_gather(weights, training.network[0].weight.detach())
    assert torch.equal(*weights)
    assert not torch.equal(weights[0], before)
    leave()


def test_without_memory_to_share_each_rank_has_all(tmp_path):
    spawn(_alone, (2, tmp_path), nprocs=2)
