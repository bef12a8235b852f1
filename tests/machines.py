"""A cluster of real raylets on this machine, of which each can be added, drained and taken away at once."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

ROOT = Path(__file__).parents[1]
RAY = (sys.executable, "-m", "ray.scripts.scripts")
MARK = "DIFFULT_TEST_MACHINE"  # in the environment of a machine's processes
PORTS = ("gcs", "dashboard", "client", "agent", "metrics")
NOTHING: Mapping[str, str] = MappingProxyType({})
Found = TypeVar("Found")


def wait_for(condition: Callable[[], Found], seconds: float = 180) -> Found:
    """What the condition gives once it is true."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.1)
    raise AssertionError(f"not in {seconds:g} s: {condition}")


@dataclass(frozen=True)
class Machine:
    """The processes of one raylet."""

    name: str
    mark: str

    def processes(self, title: str = "") -> list[int]:
        """Ids of those whose command line holds a title."""
        return [pid for pid, mark, line in _marked() if mark == self.mark and title in line]

    def vanish(self) -> None:
        """As when a machine loses its power."""
        while left := self.processes():
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)


def _marked() -> Iterator[tuple[int, str, str]]:
    """(id, mark, command line) of all processes of such machines."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            environment = (entry / "environ").read_bytes().split(b"\0")
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        for each in environment:
            if each.startswith(f"{MARK}=".encode()):
                yield int(entry.name), each.decode().partition("=")[2], line


@dataclass
class Cluster:
    """A head without a CPU and the machines beside it; a token of its own is asked for.

    Args:
        folder: a short path, for sockets below it.
    """

    folder: Path
    machines: dict[str, Machine] = field(default_factory=dict)
    ports: dict[str, int] = field(default_factory=dict)
    _count: int = 0

    def up(self, *, cpus: float = 0) -> Cluster:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "token").write_text(secrets.token_hex(32))
        self.ports = _free_ports(PORTS)
        ports = self.ports
        self._start(
            "head", "--head", f"--num-cpus={cpus}", "--num-gpus=0", f"--port={ports['gcs']}",
            f"--ray-client-server-port={ports['client']}", f"--temp-dir={self.folder / 'ray'}",
            f"--dashboard-agent-listen-port={ports['agent']}", f"--metrics-export-port={ports['metrics']}",
            "--include-dashboard=true", "--dashboard-host=127.0.0.1",
            f"--dashboard-port={ports['dashboard']}",
        )  # fmt: skip
        return self

    def add(self, *, cpus: float = 1, gpus: float = 0, variables: Mapping[str, str] | None = None) -> Machine:
        """One more, with variables in the environment of its processes."""
        self._count += 1
        return self._start(
            f"n{self._count}", f"--address={self.address}", f"--num-cpus={cpus}", f"--num-gpus={gpus}",
            variables=variables or {},
        )

    def _start(self, name: str, *options: str, variables: Mapping[str, str] = NOTHING) -> Machine:
        """Returns once the machine is alive."""
        machine = Machine(name, f"{self.folder}/{name}")
        before = self.nodes() if name != "head" else []
        done = subprocess.run(
            [*RAY, "start", *options, "--min-worker-port=0", "--max-worker-port=0", "--disable-usage-stats",
             f"--object-store-memory={150 * 2**20}"],
            env={**self.environment, **variables, MARK: machine.mark}, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
        known = {n["node_id"] for n in before}
        wait_for(lambda: [n for n in self.nodes() if n["node_id"] not in known], 60)
        self.machines[name] = machine
        return machine

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.ports['gcs']}"

    @property
    def dashboard(self) -> str:
        return f"http://127.0.0.1:{self.ports['dashboard']}"

    @property
    def environment(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "DIFFULT_", "MLFLOW_"))}
        return kept | self.variables

    @property
    def variables(self) -> dict[str, str]:
        """What a process needs to be let in."""
        return {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.folder / "token"),
            "RAY_USAGE_STATS_ENABLED": "0",
        }

    def nodes(self) -> list[dict[str, Any]]:
        """The machines that are alive, the head included, as the head's state API tells them."""
        import urllib.request

        request = urllib.request.Request(f"{self.dashboard}/api/v0/nodes?limit=100")
        request.add_header("Authorization", f"Bearer {(self.folder / 'token').read_text()}")
        try:
            answer = json.loads(urllib.request.urlopen(request, timeout=10).read())
        except OSError:
            return []
        return [n for n in answer["data"]["result"]["result"] if n["state"] == "ALIVE"]

    def id_of(self, machine: Machine) -> str:
        """Ray's id of a machine, from its raylet's command line."""
        for _, mark, line in _marked():
            if mark == machine.mark and "raylet/raylet" in line:
                return next(w.partition("=")[2] for w in line.split() if w.startswith("--node_id="))
        raise AssertionError(f"{machine.name} has no raylet")

    def drain(self, machine: Machine, seconds: int) -> None:
        """Tell that a machine goes in some seconds, as a cloud does of a spot node."""
        subprocess.run(
            [*RAY, "drain-node", "--address", self.address, "--node-id", self.id_of(machine),
             "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot",
             "--deadline-remaining-seconds", str(seconds)],
            env=self.environment, check=True, timeout=60, capture_output=True,
        )  # fmt: skip

    def where(self, title: str) -> Machine | None:
        """The first machine with a process of that title."""
        return next((m for m in self.machines.values() if m.processes(title)), None)

    def down(self) -> None:
        for machine in (Machine("", mark) for mark in {mark for _, mark, _ in _marked()}):
            if machine.mark.startswith(f"{self.folder}/"):
                machine.vanish()


def _free_ports(names: tuple[str, ...]) -> dict[str, int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in names]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return {name: each.getsockname()[1] for name, each in zip(names, sockets, strict=True)}
