"""A room of its own for each build, so that the files of two writers are never mixed.

Workers may outlive the driver that started them by some seconds, on this machine or another. Whoever
takes the build over moves its files to a room of another name: the paths that those workers know lead
nowhere from then on, and what they still write lies beside the room and goes with the work folder.
"""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path

from diffult_ray import files

ENTERED = "entered"  # a file in every room; a late worker makes the folder anew, but not this
OUTS = "out"


def enter(folder: Path) -> Path:
    """A work folder's room under a new name, with what an earlier build has left in it.

    Of artifacts only the complete ones: a late worker may have a file of the others open.
    """
    room = folder / uuid.uuid4().hex[:12]
    earlier = latest(folder)
    if earlier is None:
        room.mkdir(parents=True)
        (room / ENTERED).touch()
    else:
        earlier.rename(room)
    for other in folder.iterdir():
        if other != room:
            shutil.rmtree(other, ignore_errors=True)
    for out in (room / OUTS).glob("*"):
        if not (out / "summary.json").exists():
            shutil.rmtree(out, ignore_errors=True)
    return room


def leave(room: Path) -> None:
    """Remove a room in which nothing was written."""
    files.remove_empty([*(room / OUTS).glob("*"), room / OUTS])
    if [path.name for path in room.glob("*")] == [ENTERED]:
        shutil.rmtree(room, ignore_errors=True)


def latest(folder: Path) -> Path | None:
    """The room in a work folder, if a build has begun."""
    return next((path.parent for path in sorted(folder.glob(f"*/{ENTERED}"))), None)
