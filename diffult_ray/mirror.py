"""The part of a remote storage that is on this machine: a folder that holds the same names.

It lies under DIFFULT_CACHE, else in the temporary folder, and can be removed whenever nothing runs: what
is in the storage is the truth. Beside each folder that was transferred, a note under `.notes` says what
both sides looked like, so that only what changed is transferred again.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from diffult_ray import files
from diffult_ray.remote import Remote, Stat, side_by_side

PAUSE = 2.0  # seconds between two uploads of what changes all the time


def folder_of(remote: Remote) -> Path:
    """Where this machine keeps its part of a storage."""
    base = os.environ.get("DIFFULT_CACHE") or Path(tempfile.gettempdir()) / f"diffult-cache-{os.getuid()}"
    digest = hashlib.sha256(remote.address.shown.encode()).hexdigest()[:16]
    return Path(base).expanduser().absolute() / digest


class Mirror:
    """Transfers between a storage and this machine's folder of it.

    Raises:
        OSError: from every method, if the storage or the disk fails.
    """

    def __init__(self, remote: Remote) -> None:
        self.remote = remote

    def __reduce__(self) -> tuple[Any, ...]:
        return (Mirror, (self.remote,))  # another machine has another folder

    @property
    def root(self) -> Path:
        return folder_of(self.remote)

    def name(self, path: Path) -> str:
        """How the storage calls a path in the mirror."""
        return path.relative_to(self.root).as_posix()

    def pull(self, name: str) -> Path:
        """Bring what the storage has under a name and this machine has not, or has otherwise.

        A file that was brought before and is gone from the storage goes here too; one that was changed
        here, and not there, stays as it is.
        """
        path, found = self.root / name, self.remote.list(name)
        with self.alone(name):
            noted = self._noted(name)
            wanted = {
                each: stat for each, stat in found.items()
                if not (path / each).exists() or noted.get(each, {}).get("there") != _there(stat)
            }
            side_by_side(lambda each: self.remote.get(f"{name}/{each}", path / each), [(e,) for e in wanted])
            for gone in set(noted) - set(found):
                (path / gone).unlink(missing_ok=True)
            self._note(name, {
                each: _entry(path / each, stat) if each in wanted else noted[each]
                for each, stat in found.items() if (path / each).exists()
            })
        return path

    def push(self, name: str, *, without: str = "manifest.json") -> None:
        """Upload the files under a name that are not in the storage as they are here."""
        path = self.root / name
        with self.alone(name):
            noted, there = self._noted(name), self.remote.list(name)
            changed = {}
            for each in _files(path):
                seen = _here(path / each)
                known = noted.get(each, {})
                same = known.get("here") == seen and each in there and known["there"] == _there(there[each])
                if each != without and seen is not None and not same:
                    changed[each] = seen
            side_by_side(lambda each: self._put(path / each, f"{name}/{each}"), [(e,) for e in changed])
            if changed:
                there = self.remote.list(name)
                entries = {e: {"here": seen, "there": _there(there[e])} for e, seen in changed.items()
                           if e in there}
                self._note(name, {**noted, **entries})

    def _put(self, path: Path, name: str) -> None:
        with suppress(FileNotFoundError):  # replaced or removed meanwhile
            self.remote.put(path, name)

    def push_file(self, name: str) -> None:
        self._put(self.root / name, name)

    def pull_file(self, name: str) -> Path | None:
        """One object as a file; None, and no file, where there is none."""
        path = self.root / name
        try:
            self.remote.get(name, path)
        except FileNotFoundError:
            path.unlink(missing_ok=True)
            return None
        return path

    def drop(self, name: str) -> None:
        """Forget what this machine has under a name."""
        shutil.rmtree(self.root / name, ignore_errors=True)
        self._place_of_note(name).unlink(missing_ok=True)

    @contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """Alone among the processes of this machine that transfer what is under a name."""
        path = self._place_of_note(name).with_suffix(".lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _place_of_note(self, name: str) -> Path:
        return self.root / ".notes" / f"{name.replace('/', '~')}.json"

    def _noted(self, name: str) -> dict[str, Any]:
        try:
            return files.read_json(self._place_of_note(name))
        except (OSError, ValueError):
            return {}

    def _note(self, name: str, entries: dict[str, Any]) -> None:
        files.write_json(self._place_of_note(name), entries)


def _files(path: Path) -> list[str]:
    """Names of all files below a folder that are whole."""
    found = (p for p in path.rglob("*") if p.is_file() and not p.name.endswith(".tmp"))
    return sorted(p.relative_to(path).as_posix() for p in found)


def _entry(path: Path, stat: Stat) -> dict[str, Any]:
    return {"here": _here(path), "there": _there(stat)}


def _there(stat: Stat) -> list[int]:
    return [stat.bytes, stat.time]


def _here(path: Path) -> list[int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns, status.st_ino]


class Publisher:
    """A thread that uploads folders and files as they are when it comes to them; training goes on."""

    def __init__(self) -> None:
        self._waiting: dict[tuple[str, str], Mirror] = {}
        self._changed = threading.Condition()
        self._busy: tuple[str, str] | None = None
        self._hurry, self._errors = 0, dict[tuple[str, str], OSError]()
        self._thread: threading.Thread | None = None

    def soon(self, mirror: Mirror, name: str) -> None:
        with self._changed:
            self._waiting[mirror.remote.address.uri, name] = mirror
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="publisher", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def settle(self) -> None:
        """Wait until all is uploaded.

        Raises:
            OSError: if something could not be.
        """
        with self._changed:
            self._hurry += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._waiting and self._busy is None)
            self._hurry -= 1
            errors, self._errors = self._errors, {}
        for error in errors.values():
            raise error

    def forget(self, mirror: Mirror, name: str) -> None:
        """Upload nothing more of what is under a name; what is on its way is waited for."""
        uri = mirror.remote.address.uri

        def concerned(each: tuple[str, str] | None) -> bool:
            return each is not None and each[0] == uri and (each[1] + "/").startswith(name + "/")

        with self._changed:
            for left in (self._waiting, self._errors):
                for each in [e for e in left if concerned(e)]:
                    del left[each]
            self._changed.wait_for(lambda: not concerned(self._busy))

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                self._busy = next(iter(self._waiting))
                mirror = self._waiting.pop(self._busy)
            try:
                self._upload(mirror, self._busy[1])
                self._errors.pop(self._busy, None)
            except OSError as error:
                self._errors[self._busy] = error
            with self._changed:
                self._busy = None
                self._changed.notify_all()
                end = time.monotonic() + PAUSE
                self._changed.wait_for(lambda: self._hurry, timeout=max(0.0, end - time.monotonic()))

    @staticmethod
    def _upload(mirror: Mirror, name: str) -> None:
        if (mirror.root / name).is_dir():
            mirror.push(name)
        else:
            mirror.push_file(name)


PUBLISHER = Publisher()  # of this process
