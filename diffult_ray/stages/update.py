"""What follows a gradient: it is clipped, Adam takes a step, and the average of the parameters one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from diffult_ray.allotment import Allotment
from diffult_ray.method.device import averaged, clip
from diffult_ray.stages.shared_memory import can_share, mapped

ALIGNED = 16  # numbers of float32, 64 bytes


class Update:
    """Of parameters, moments and average by every rank, or, where ranks share them, by each of a part.

    Without `share` every rank has them all and does all of the work, as DDP has it. Ranks of one machine's
    CPUs can have them once, in shared memory: then two take half of the memory and of the time. That is
    ZeRO's first stage (Rajbhandari et al., "ZeRO: Memory optimizations toward training trillion parameter
    models", SC 2020) without its messages, since what one rank writes the others have. The results are
    the same, of two ranks bit by bit.
    """

    def __init__(
        self, parameters: Sequence[torch.nn.Parameter], optimizer: torch.optim.Adam, average: Any, *,
        most: float, given: Allotment,
    ) -> None:
        """
        Args:
            average: diffusers' `EMAModel` of the parameters.
            most: the norm that gradients are clipped to.
        """
        self.parameters, self.optimizer, self.average = list(parameters), optimizer, average
        self.most, self.given = most, given
        self.owners: dict[torch.nn.Parameter, int] = {}  # the rank that updates each, where they share

    def step(self) -> None:
        """The same on every rank; when it returns, all parameters are up to date."""
        if not self.owners:
            clip(self.parameters, self.most)
            self.optimizer.step()
            averaged(self.average, self.parameters, self.given)
            return
        rank = dist.get_rank()
        own = [owner == rank for owner in self.owners.values()]
        mine, shadows = [], []
        for p, shadow, is_own in zip(self.parameters, self.average.shadow_params, own, strict=True):
            if is_own:
                mine.append(p)
                shadows.append(shadow)
            else:
                p.grad = None  # so Adam passes it by

        def of_all(norms: torch.Tensor) -> torch.Tensor:
            everywhere = torch.zeros(len(own)).masked_scatter_(torch.tensor(own), norms)
            dist.all_reduce(everywhere)
            return everywhere

        clip(mine, self.most, of_all)
        self.optimizer.step()
        averaged(self.average, mine, self.given, shadows)
        self.wait()

    def wait(self) -> None:
        """For all ranks, if they share: one that has changed the parameters for a while has put them back."""
        if self.owners:
            dist.barrier()

    def share(self) -> bool:
        """Move all into memory that the ranks share, if they can; every rank calls it, all in the same state.

        Before DDP wraps the network, whose gradients lie as the parameters do then.

        Returns:
            Whether it is so; the same on every rank.
        """
        world = dist.get_world_size()
        if not can_share(self.parameters):
            return False
        total = sum(p.numel() for p in self.parameters)
        memory = mapped([sum(_slots(p.numel()) * 4 + ALIGNED for p in self.parameters)])
        if memory is None:
            return False
        place = _Place(memory, writes=dist.get_rank() == 0)
        passed = 0
        for i, p in enumerate(self.parameters):
            self.owners[p] = (2 * passed + p.numel()) * world // (2 * total)  # by its middle
            passed += p.numel()
            p.data = place(p.data)
            self.average.shadow_params[i] = place(self.average.shadow_params[i])
            state = self.optimizer.state[p]  # of Adam; empty before its first step
            state["step"] = place(state.get("step", torch.zeros(())))
            for moment in ("exp_avg", "exp_avg_sq"):
                state[moment] = place(state[moment]) if moment in state else place.zeros(p)
        dist.barrier()
        return True


class _Place:
    """Tensors one after another in shared memory of zeros; one rank writes what they are."""

    def __init__(self, memory: torch.Tensor, *, writes: bool) -> None:
        self.memory, self.writes, self._begin = memory, writes, 0

    def zeros(self, like: torch.Tensor) -> torch.Tensor:
        """In the same shape and memory format."""
        begin, n = self._begin, like.numel()
        self._begin += _slots(n)
        strides = torch.empty_like(like, device="meta").stride()  # dense
        return self.memory[begin : begin + n].as_strided(like.shape, strides)

    def __call__(self, value: torch.Tensor) -> torch.Tensor:
        here = self.zeros(value)
        if self.writes:
            here.copy_(value.detach())
        return here


def _slots(numbers: int) -> int:
    return -(-numbers // ALIGNED) * ALIGNED
