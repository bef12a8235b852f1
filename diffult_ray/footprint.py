"""Peak memory of the processes that work for a stage; without Ray."""

from __future__ import annotations

import os
import resource
import socket
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from diffult_ray import files

if TYPE_CHECKING:
    from diffult_ray.stages import Site

PEAKS = ("memory_mib", "gpu_memory_mib")
FOLDER = "memory"  # in a stage's work folder: a file a process
GROWN = 1.05  # what is told again
MIB = 2**20


def begin() -> None:
    """From here on count what this process needs, not what its earlier work did: Ray uses processes again."""
    with suppress(OSError):  # elsewhere than on Linux the whole life of the process counts
        Path("/proc/self/clear_refs").write_text("5")
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def peaks() -> dict[str, int]:
    """`memory_mib`, the most that was resident, and, where a GPU was used, `gpu_memory_mib` of tensors."""
    found = {"memory_mib": round(_resident() / MIB)}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        found["gpu_memory_mib"] = round(torch.cuda.max_memory_reserved() / MIB)
    return found


def _resident() -> int:
    """Bytes."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@dataclass
class Footprint:
    """Notes the peaks of the process that it is in, where the driver of a stage finds them.

    Args:
        work: folder of the site.
    """

    site: Site
    work: Path
    _told: dict[str, int] = field(default_factory=dict)

    def note(self) -> None:
        """Unless little has changed since the last time."""
        now = peaks()
        if all(size < GROWN * self._told.get(name, 0) for name, size in now.items()):
            return
        path = self.work / FOLDER / f"{socket.gethostname()}-{os.getpid()}.json"
        files.write_json(self.site.here(path), now)
        self.site.publish(path)
        self._told = now


def collected(works: Mapping[Path, Site]) -> dict[str, int]:
    """The largest process's peaks of those that have noted theirs in these work folders; else this one's."""
    found: dict[str, int] = {}
    folders = [site.fetch(work / FOLDER) for work, site in works.items()]
    for path in (path for folder in folders for path in folder.glob("*.json")):
        for name, size in files.read_json(path).items():
            found[name] = max(size, found.get(name, 0))
    return found or peaks()
