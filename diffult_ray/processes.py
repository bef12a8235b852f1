"""Processes of this machine, as Linux tells of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """What /proc/PID/stat says: proc(5)."""

    parent: int
    started: str  # clock ticks since the machine started
    ended: bool  # and perhaps not yet reaped


def look(pid: int) -> Process | None:
    """The process with that number; None without one, or where there is no /proc."""
    try:
        told = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # its name may hold anything
    except OSError:
        return None
    return Process(parent=int(told[1]), started=told[19], ended=told[0] in "ZX")


def children(pid: int) -> list[int]:
    """Numbers of the processes that it started or adopted, and has not reaped."""
    everyone = (int(entry.name) for entry in Path("/proc").glob("[0-9]*"))
    return [each for each in everyone if (found := look(each)) is not None and found.parent == pid]
