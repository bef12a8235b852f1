"""One builder a key: a lease is a small file that its owner keeps refreshing for as long as it works.

A lease is dead when its owner's process is gone (seen from the same machine), or when it has not been
refreshed for `EXPIRES` seconds of the watcher's own clock, so that clocks need not agree.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from diffult_ray import files, processes

BEAT = 5.0  # seconds between two refreshes
EXPIRES = 30.0
POLL = 1.0

Tell = Callable[[str], None]


class Lost(RuntimeError):
    """Another process took a lease over, since this one had not refreshed it for long."""


class Lease:
    """The right to build something, held until it is released.

    Args:
        path: the lease file.
        facts: what else it says, for whoever reads it.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any]) -> None:
        self.path, self._lost, self._released = path, False, False
        self._content = {**facts, **_me(), "owner": uuid.uuid4().hex, "beat": 0, "time": 0.0}

    def take(self, over: Mapping[str, Any] | None) -> bool:
        """Write the lease where there is none, or in place of the dead one `over`; whether it is ours.

        Raises:
            OSError: if the folder cannot be written.
        """
        with _locked(self.path.parent):
            found = read(self.path)
            if found is not None and (over is None or _mark(found) != _mark(over)):
                return False
            self._write()
        return True

    def refresh(self) -> None:
        """Show that the owner lives; notes if the lease is another's by now."""
        with _locked(self.path.parent):
            found = read(self.path)
            if found is not None and found["owner"] != self._content["owner"]:
                self._lost = True
            if not (self._lost or self._released):
                self._content["beat"] += 1
                self._write()

    def release(self) -> None:
        self._released = True  # for the thread that refreshes, which may be about to write it once more
        with suppress(OSError), _locked(self.path.parent):
            found = read(self.path)
            if found is not None and found["owner"] == self._content["owner"]:
                self.path.unlink(missing_ok=True)

    def check(self) -> None:
        """Raises Lost if the lease is another's by now."""
        self.refresh()
        if self._lost:
            raise Lost(f"{self.path.stem} was taken over: this process had not been heard of for long")

    def _write(self) -> None:
        self._content["time"] = time.time()
        files.write_json(self.path, self._content)


class Held:
    """Leases that a thread refreshes."""

    def __init__(self) -> None:
        self._leases: list[Lease] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="leases", daemon=True)
        self._thread.start()

    def add(self, lease: Lease) -> None:
        self._leases.append(lease)

    def check(self) -> None:
        """Raises Lost unless all are ours."""
        for lease in self._leases:
            lease.check()

    def release(self) -> None:
        self._done.set()
        self._thread.join(BEAT)  # its last beat; one that a storage holds up is no beat any more
        for lease in self._leases:
            lease.release()

    def _beat(self) -> None:
        while not self._done.wait(BEAT):
            for lease in list(self._leases):
                with suppress(OSError):  # a storage that is away for a moment; the next beat may do
                    lease.refresh()


@contextmanager
def hold(folder: Path, names: Mapping[str, Mapping[str, Any]], tell: Tell | None = None) -> Iterator[Held]:
    """Hold leases, waiting for those of living owners. In sorted order, so that no two wait for each other.

    Args:
        folder: of all leases; it is created.
        names: name of each lease -> what else it says.
        tell: told once of each that has to be waited for.

    Raises:
        OSError: if the folder cannot be written.
    """
    made = [folder, *files.missing(folder.parent)]
    held = Held()
    with ExitStack() as stack:
        stack.callback(files.remove_empty, made)
        stack.callback(tidy, folder)
        stack.callback(held.release)
        for name in sorted(names):
            lease = Lease(folder / f"{name}.json", names[name])
            _await(lease, tell)
            held.add(lease)
        yield held


def _await(lease: Lease, tell: Tell | None) -> None:
    """Take a lease as soon as nobody living has it."""
    dead, seen, since, told = None, None, 0.0, False
    while not lease.take(dead):
        found = read(lease.path)
        if found is None:
            dead = None
            continue
        if seen != _mark(found):
            seen, since = _mark(found), time.monotonic()
        gone = _is_gone(found) or time.monotonic() - since > EXPIRES
        dead = found if gone else None
        if gone:
            continue
        if tell is not None and not told:
            tell(f"{lease.path.stem} is being built by process {found['pid']} on {found['host']}: waiting")
            told = True
        time.sleep(POLL)


def read(path: Path) -> dict[str, Any] | None:
    """What a lease says; None without one, or one that is none."""
    try:
        found = files.read_json(path)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and {"owner", "beat", "pid", "place"} <= set(found) else None


def living(folder: Path, within: float = 600.0) -> list[dict[str, Any]]:
    """Leases that may have an owner: of processes that run here, or refreshed in the last seconds `within`.

    For one that looks once; by the file's own time, where clocks may be some minutes apart.
    """
    found = [read(path) for path in sorted(folder.glob("*.json"))]
    return [f for f in found if f is not None and not _is_gone(f) and _is_fresh(f, within)]


def _is_fresh(found: Mapping[str, Any], within: float) -> bool:
    return found["place"] == _me()["place"] or abs(time.time() - found["time"]) < within


def _mark(found: Mapping[str, Any]) -> tuple[Any, Any]:
    return found["owner"], found["beat"]


def _is_gone(found: Mapping[str, Any]) -> bool:
    """Whether the owner ran here, and runs no more."""
    return found["place"] == _me()["place"] and _started(found["pid"]) != found.get("started")


def _me() -> dict[str, Any]:
    """This process, and the machine or container in which its number means something."""
    return {
        "host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid()), "place": _place()
    }


def _place() -> list[str]:
    boot, space = "", ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = os.readlink("/proc/self/ns/pid")
    return [socket.gethostname(), boot, space]


def _started(pid: int) -> str | None:
    """When a process was started, None if there is none: its number may be another's by now."""
    found = processes.look(pid)
    if found is None:
        return None if Path("/proc/self").exists() else _without_proc(pid)
    return None if found.ended else found.started


def _without_proc(pid: int) -> str | None:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return ""


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Alone among those that read and then write leases, where the storage has locks."""
    file = None
    while file is None:
        file = _lock(folder)
    with file:
        yield


def _lock(folder: Path) -> TextIO | None:
    """The lock file, locked until it is closed; None if it was tidied away meanwhile."""
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    try:
        file = open(path, "a")  # noqa: SIM115
    except FileNotFoundError:
        return None
    try:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_ino == path.stat().st_ino:
            return file
    except FileNotFoundError:
        pass
    file.close()
    return None


def tidy(folder: Path) -> None:
    """Remove the leases of those who ran here and are gone, and the lock where no lease is left."""
    with suppress(OSError), _locked(folder):
        for path in folder.glob("*.json"):
            found = read(path)
            if found is not None and _is_gone(found):
                path.unlink(missing_ok=True)
        if not any(folder.glob("*.json")):
            files.remove_temporary(folder)
            (folder / ".lock").unlink(missing_ok=True)


def names_for(stages: Sequence[Any]) -> dict[str, dict[str, Any]]:
    """A lease a work folder: what it builds, and all that this needs."""
    named: dict[str, dict[str, Any]] = {}
    for stage in stages:
        facts = named.setdefault(f"{stage.name}-{stage.family}", {"builds": [], "needs": []})
        facts["builds"].append(stage.key)
        facts["needs"] = sorted({s.key for s in stage.walk()} | set(facts["needs"]))
    return named
