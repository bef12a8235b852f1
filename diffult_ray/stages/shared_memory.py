"""Memory that the ranks of one machine share."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

PLACE = Path("/dev/shm")
MOST = 4  # ranks: each reads what all have written, which of many would be more than gloo's ring sends
MARGIN = 2  # of the memory that is free there, so much of what is asked for
LOCAL = "LOCAL_WORLD_SIZE"


def can_share(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether the ranks are few and all on this machine, and the tensors float32 on its CPUs."""
    world = dist.get_world_size()
    together = world <= MOST and os.environ.get(LOCAL) == str(world)
    return together and all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors)


def mapped(shape: Sequence[int]) -> torch.Tensor | None:
    """Zeros of float32 that every rank sees and writes; every rank asks.

    They end with the processes, as their file has no name any more. A page takes memory when it is first
    written to.

    Returns:
        the memory; None, on every rank, without room for it.
    """
    told: list[str | None] = [None]
    if dist.get_rank() == 0:
        told[0] = _made(4 * math.prod(shape))
    dist.broadcast_object_list(told, src=0)
    if told[0] is None:
        return None
    path, memory = Path(told[0]), None
    with suppress(OSError):  # not there: the worker has a container of its own
        memory = torch.from_numpy(np.memmap(path, np.float32, "r+", shape=tuple(shape)))
    everywhere = torch.tensor(memory is not None, dtype=torch.uint8)
    dist.all_reduce(everywhere, op=dist.ReduceOp.MIN)
    if dist.get_rank() == 0:
        path.unlink()
    return memory if everywhere else None


def _made(size: int) -> str | None:
    try:
        room = os.statvfs(PLACE)
        if room.f_bavail * room.f_frsize < MARGIN * size:
            return None
        handle, path = tempfile.mkstemp(prefix="diffult-training-", dir=PLACE)
        os.truncate(handle, size)
        os.close(handle)
    except OSError:
        return None
    return path
