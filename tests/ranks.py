"""Processes of a torch.distributed group, for tests."""

import os
from pathlib import Path

import torch
import torch.distributed as dist


def join(rank: int, world: int, folder: Path, local: int | None = None) -> None:
    """Over gloo, with one thread. `local`: as if so many of the ranks were on this machine, else all."""
    torch.set_num_threads(1)
    os.environ["LOCAL_WORLD_SIZE"] = str(local or world)
    dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=world)


def leave() -> None:
    """Together, and at once: torch may abort while it takes gloo down and a peer has gone."""
    dist.barrier()
    os._exit(0)
