"""One builder a key on a storage without locks: Lamport's bakery (1974), with objects for its registers.

Who wants a name puts `<owner>.choosing`, lists what is there, puts `<number>.<owner>` with a number above
all it saw, and takes its choosing away. It is its turn when nobody chooses and nobody has a smaller
number. Put, list and delete must be seen by all at once, as S3 and Google Cloud promise; nothing is ever
read and then replaced.

A number is put once. So whoever finds that an owner is dead removes the numbers it holds for good: an owner
that was only slow misses them, and gives up. Signs of life are in an object of their own.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from diffult_ray import lease
from diffult_ray.lease import Lost, Tell
from diffult_ray.remote import Remote

FOLDER = "leases"
OWNERS = f"{FOLDER}/owners"
CHOOSING = "choosing"


class Owner:
    """This process among those that want names, with a thread that shows that it lives."""

    def __init__(self, remote: Remote, facts: Mapping[str, Mapping[str, Any]]) -> None:
        self.remote, self.id = remote, uuid.uuid4().hex
        self._content = {**lease._me(), "owner": self.id, "beat": 0, "leases": dict(facts)}
        self._claims: list[Claim] = []
        self._done, self._beating = threading.Event(), threading.Lock()
        self._write()
        threading.Thread(target=self._beat, name="claims", daemon=True).start()

    def claim(self, name: str) -> Claim:
        claim = Claim(self.remote, name, self.id)
        self._claims.append(claim)
        return claim

    def check(self) -> None:
        """Raises Lost unless all claims are ours."""
        for claim in self._claims:
            if claim.ahead() is None:
                raise Lost(f"{claim.name} was taken over: this process had not been heard of for long")

    def leave(self) -> None:
        self._done.set()
        with suppress(OSError), self._beating:
            for claim in self._claims:
                claim.withdraw()
            self.remote.delete(f"{OWNERS}/{self.id}.json")

    def _beat(self) -> None:
        while not self._done.wait(lease.BEAT):
            with suppress(OSError), self._beating:
                if not self._done.is_set():
                    self._write()

    def _write(self) -> None:
        self._content = {**self._content, "beat": self._content["beat"] + 1, "time": time.time()}
        self.remote.write(f"{OWNERS}/{self.id}.json", json.dumps(self._content).encode())


class Claim:
    """An owner's place in the line for a name."""

    def __init__(self, remote: Remote, name: str, owner: str) -> None:
        self.remote, self.name, self.owner = remote, name, owner
        self._folder = f"{FOLDER}/{name}"
        self._number: str | None = None

    def enter(self) -> None:
        """Take a number above all that are there."""
        choosing = f"{self.owner}.{CHOOSING}"
        while True:
            self._put(choosing)
            number = f"{1 + max((n for n, _ in _numbers(self._there())), default=0):010d}.{self.owner}"
            self._put(number)
            # Who took us for dead while we chose may have passed us by, with a number as high as ours.
            if choosing in self._there():
                break
            self._delete(number)
        self._delete(choosing)
        self._number = number

    def ahead(self) -> list[str] | None:
        """Owners before us, and those that choose; None if our own number was taken away."""
        there = self._there()
        if self._number not in there:
            return None
        mine = _numbered(self._number)
        smaller = [owner for number, owner in _numbers(there) if (number, owner) < mine]
        choosing = [name.removesuffix(f".{CHOOSING}") for name in there if name.endswith(f".{CHOOSING}")]
        return [*smaller, *(owner for owner in choosing if owner != self.owner)]

    def remove(self, owner: str) -> None:
        """Take away what a dead owner holds."""
        for name in self._there():
            if owner in name.split("."):
                self._delete(name)

    def withdraw(self) -> None:
        self.remove(self.owner)

    def _there(self) -> list[str]:
        return sorted(self.remote.list(self._folder))

    def _put(self, name: str) -> None:
        self.remote.write(f"{self._folder}/{name}", b"-")

    def _delete(self, name: str) -> None:
        self.remote.delete(f"{self._folder}/{name}")


def _numbered(name: str) -> tuple[int, str]:
    number, _, owner = name.partition(".")
    return int(number), owner


def _numbers(there: list[str]) -> list[tuple[int, str]]:
    return [_numbered(name) for name in there if not name.endswith(f".{CHOOSING}")]


class Watch:
    """Which owners are dead: their process on this machine is gone, or they gave no sign for long."""

    def __init__(self, remote: Remote) -> None:
        self.remote = remote
        self._seen: dict[str, tuple[int, float]] = {}

    def is_dead(self, owner: str) -> bool:
        try:
            found = read(self.remote, owner)
        except ValueError:
            return False  # it is just being written, on a storage that shows that
        if found is None:  # it leaves last what it puts first
            return True
        beat, since = self._seen.get(owner, (None, 0.0))
        if beat != found["beat"]:
            self._seen[owner] = found["beat"], time.monotonic()
            return lease._is_gone(found)
        return lease._is_gone(found) or time.monotonic() - since > lease.EXPIRES


@contextmanager
def hold(
    remote: Remote, names: Mapping[str, Mapping[str, Any]], tell: Tell | None = None
) -> Iterator[Owner]:
    """As `lease.hold`: hold names, waiting for living owners, in sorted order."""
    owner = Owner(remote, names)
    with ExitStack() as stack:
        stack.callback(owner.leave)
        for name in sorted(names):
            _await(owner.claim(name), tell)
        yield owner


def _await(claim: Claim, tell: Tell | None) -> None:
    watch, told = Watch(claim.remote), False
    claim.enter()
    while (ahead := claim.ahead()) != []:
        if ahead is None:
            claim.enter()
            continue
        dead = [owner for owner in ahead if watch.is_dead(owner)]
        for owner in dead:
            claim.remove(owner)
        if dead:
            continue
        found = None if tell is None or told else _told(claim.remote, ahead[0])
        if found is not None:
            tell(f"{claim.name} is being built by process {found['pid']} on {found['host']}: waiting")
            told = True
        time.sleep(lease.POLL)


def _told(remote: Remote, owner: str) -> dict[str, Any] | None:
    with suppress(ValueError):
        return read(remote, owner)
    return None


def read(remote: Remote, owner: str) -> dict[str, Any] | None:
    """What an owner says of itself; None if it has left. Raises ValueError if that is not whole."""
    try:
        found = json.loads(remote.read(f"{OWNERS}/{owner}.json"))
    except FileNotFoundError:
        return None
    if not isinstance(found, dict) or not {"owner", "beat", "pid", "place"} <= set(found):
        raise ValueError(f"{OWNERS}/{owner}.json is no owner")
    return found


def owners(remote: Remote, within: float = 600.0) -> tuple[list[dict[str, Any]], list[str]]:
    """Owners that may be alive, for one look, and the objects of those that are not."""
    living, gone = [], []
    for name in sorted(remote.list(OWNERS)):
        try:
            found = read(remote, name.removesuffix(".json"))
        except ValueError:
            continue  # it is just being written
        if found is not None and not lease._is_gone(found) and lease._is_fresh(found, within):
            living.append(found)
        else:
            gone.append(f"{OWNERS}/{name}")
    return living, gone


def tidy(remote: Remote, within: float = 86400.0) -> None:
    """Remove what owners have left that are dead on this machine, or have long given no sign."""
    _, gone = owners(remote, within)
    dead = {name.rpartition("/")[2].removesuffix(".json") for name in gone}
    for name in remote.list(FOLDER) if dead else ():
        if dead & set(name.rpartition("/")[2].split(".")):
            remote.delete(f"{FOLDER}/{name}")
