"""An autoscaling Ray cluster on one Linux machine, that anyone can start: no cloud, no root, no container.

    python clusters/one_machine up                      # a head without a CPU; nodes come when work waits
    python clusters/one_machine submit digits           # packs this checkout, runs the sweep, shows its log
    python clusters/one_machine watch                   # nodes, demand, jobs, and the last job's log
    python clusters/one_machine fetch results/          # tables, reports and figures
    python clusters/one_machine down                    # ends its processes, by id; storage stays

It behaves as a cluster does: the head offers nothing, nodes are added while tasks wait and removed when
idle, and the driver is a job with a working directory of its own. The nodes are processes that share this
machine. Autoscaling on one machine is Ray's private API, so it holds for the Ray that is pinned here.

Ports are free ones, the dashboard binds to loopback, and a token of its own, in `--folder`, is asked for
everywhere: Ray's other ports listen on the machine's address. Only its metrics answer without one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

CHECKOUT = Path(__file__).resolve().parents[2]
MARK = "DIFFULT_ONE_MACHINE"  # in the environment of the cluster's processes, which are found by it
HEAD_ID = "f" * 51 + "00000"
RAY = (sys.executable, "-m", "ray.scripts.scripts")
PORTS = ("gcs", "dashboard", "client", "agent", "metrics")
FETCHED = ("report.html", "results.parquet", "statistics.json", "sweep.yaml", "figures")


@dataclass(frozen=True)
class Cluster:
    """What `up` decides and the other commands read back."""

    folder: Path
    storage: Path
    ports: dict[str, int]

    @classmethod
    def read(cls, folder: Path) -> Cluster:
        try:
            found = json.loads((folder / "cluster.json").read_text())
        except FileNotFoundError:
            sys.exit(f"error: no cluster in {folder}; start one with `up`")
        return cls(Path(found["folder"]), Path(found["storage"]), found["ports"])

    def write(self) -> None:
        (self.folder / "cluster.json").write_text(json.dumps(asdict(self), default=str, indent=1))

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.ports['gcs']}"

    @property
    def dashboard(self) -> str:
        return f"http://127.0.0.1:{self.ports['dashboard']}"

    @property
    def environment(self) -> dict[str, str]:
        """The token is named by its file, never by its value."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        return kept | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.folder / "token"),
            "RAY_USAGE_STATS_ENABLED": "0",
            "DIFFULT_STORAGE": str(self.storage),
        }

    def ray(self, *arguments: str) -> None:
        done = subprocess.run([*RAY, *arguments], env=self.environment, stdin=subprocess.DEVNULL)
        if done.returncode:
            sys.exit(done.returncode)

    def processes(self) -> list[int]:
        """Ids of the cluster's processes on this machine."""
        mark, found = f"{MARK}={self.folder}".encode(), []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                environment = (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if mark in environment and int(entry.name) != os.getpid():
                found.append(int(entry.name))
        return found


def autoscaling(gcs: str, *, nodes: int, cpus: int, idle_minutes: float) -> dict:
    """The autoscaler's configuration: a head that offers nothing, and up to `nodes` of `cpus` CPUs."""
    store = 256 * 2**20
    return {
        "cluster_name": "diffult",
        "max_workers": nodes,
        "idle_timeout_minutes": idle_minutes,
        "upscaling_speed": 1000.0,
        "provider": {
            "type": "external",
            "module": "one_machine_nodes.Nodes",
            "gcs_address": gcs,
            "launch_multiple": True,
            "head_node_id": HEAD_ID,
        },
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "node": {
                "resources": {"CPU": cpus, "object_store_memory": store},
                "node_config": {}, "min_workers": 0, "max_workers": nodes,
            },
        },
        "auth": {}, "docker": {}, "file_mounts": {}, "cluster_synced_files": [],
        "initialization_commands": [], "setup_commands": [], "head_setup_commands": [],
        "worker_setup_commands": [], "head_start_ray_commands": [], "worker_start_ray_commands": [],
    }  # fmt: skip


def free_ports(names: Sequence[str]) -> dict[str, int]:
    """A different free port for each name."""
    sockets = [socket.socket() for _ in names]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return dict(zip(names, ports, strict=True))


def up(arguments: argparse.Namespace) -> None:
    folder = arguments.folder
    if (folder / "cluster.json").exists():
        sys.exit(f"error: there is a cluster in {folder}; `down` ends it, --folder names another place")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    storage = arguments.storage.expanduser().absolute()
    storage.mkdir(parents=True, exist_ok=True)
    with open(os.open(folder / "token", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    cluster = Cluster(folder, storage, free_ports(PORTS))
    config = autoscaling(
        cluster.address, nodes=arguments.nodes, cpus=arguments.cpus, idle_minutes=arguments.idle_minutes
    )
    (folder / "autoscaling.yaml").write_text(yaml.safe_dump(config))
    cluster.write()
    started = subprocess.run(
        [*RAY, *_head(cluster)], env=cluster.environment | _head_environment(folder),
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    if started.returncode:
        end(cluster)
        sys.exit(f"{started.stdout}\nerror: Ray did not start")
    print(f"up: a head without a CPU, and up to {arguments.nodes} nodes of {arguments.cpus} CPUs")
    print(f"dashboard: {cluster.dashboard} (its token: {folder / 'token'})")


def _head_environment(folder: Path) -> dict[str, str]:
    here, others = str(Path(__file__).resolve().parent), os.environ.get("PYTHONPATH")
    return {
        MARK: str(folder),
        "PYTHONPATH": f"{here}{os.pathsep}{others}" if others else here,  # for `one_machine_nodes`
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
        "RAY_NODE_TYPE_NAME": "ray.head.default",
    }


def _head(cluster: Cluster) -> list[str]:
    ports = cluster.ports
    return [
        "start", "--head", "--num-cpus=0", "--num-gpus=0",
        f"--port={ports['gcs']}", f"--ray-client-server-port={ports['client']}",
        f"--dashboard-agent-listen-port={ports['agent']}", f"--metrics-export-port={ports['metrics']}",
        "--min-worker-port=0", "--max-worker-port=0", f"--object-store-memory={128 * 2**20}",
        # WARNING: with another host, whoever reaches the port and has the token runs code here.
        "--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={ports['dashboard']}",
        f"--temp-dir={cluster.folder / 'ray'}", f"--autoscaling-config={cluster.folder / 'autoscaling.yaml'}",
        "--disable-usage-stats",
    ]  # fmt: skip


def submit(arguments: argparse.Namespace) -> None:
    cluster = Cluster.read(arguments.folder)
    name = f"sweep-{time.strftime('%Y%m%d-%H%M%S')}"
    waiting = ["--no-wait"] if arguments.no_wait else []
    (cluster.folder / "job").write_text(name)
    command = [sys.executable, "-m", "diffult_ray.sweep", *arguments.sweep]
    cluster.ray(
        "job", "submit", "--address", cluster.dashboard, "--submission-id", name, *waiting,
        "--working-dir", str(CHECKOUT), "--", *command, "--storage", str(cluster.storage),
    )  # fmt: skip


def watch(arguments: argparse.Namespace) -> None:
    cluster = Cluster.read(arguments.folder)
    cluster.ray("status", "--address", cluster.address)
    try:
        last = (cluster.folder / "job").read_text()
    except FileNotFoundError:
        sys.exit("no job yet; `submit` starts one")
    cluster.ray("job", "logs", "--address", cluster.dashboard, "--follow", last)


def fetch(arguments: argparse.Namespace) -> None:
    """Results only: artifacts are large, and stay in the storage folder."""
    sweeps = Cluster.read(arguments.folder).storage / "sweeps"
    found = [p for name in FETCHED for p in sorted(sweeps.rglob(name))]
    for path in found:
        target = arguments.target / path.relative_to(sweeps)
        target.parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if path.is_dir() else shutil.copy2
        copy(path, target, **({"dirs_exist_ok": True} if path.is_dir() else {}))
    print(f"{len(found)} results of {sweeps} in {arguments.target}")


def down(arguments: argparse.Namespace) -> None:
    cluster = Cluster.read(arguments.folder)
    ended = end(cluster)
    print(f"down: {ended} processes ended; the storage {cluster.storage} stays")


def end(cluster: Cluster, patience: float = 10.0) -> int:
    """End the cluster's processes by id, gently first, and remove its folder but not its storage."""
    ended, deadline = set(), time.monotonic() + patience
    while left := cluster.processes():
        late = time.monotonic() > deadline
        for pid in left:
            if late or pid not in ended:
                _signal(pid, signal.SIGKILL if late else signal.SIGTERM)
        ended.update(left)
        time.sleep(0.2)
    for name in ("ray", "cluster.json", "autoscaling.yaml", "token", "job"):
        path = cluster.folder / name
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return len(ended)


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="clusters/one_machine", description=__doc__.partition("\n")[0])
    # A short path: Ray puts sockets below it, whose paths may have 107 characters.
    folder = Path(tempfile.gettempdir()) / f"diffult-one-{os.getuid()}"
    about = "of its token, ports and logs (%(default)s)"
    parser.add_argument("--folder", type=Path, default=folder, help=about)
    commands = parser.add_subparsers(required=True, metavar="up | submit | watch | fetch | down")
    one = commands.add_parser("up", help="start it")
    one.add_argument("--nodes", type=int, default=max(2, os.cpu_count() or 1), help="at most (%(default)s)")
    one.add_argument("--cpus", type=int, default=1, help="a node (%(default)s)")
    one.add_argument("--idle-minutes", type=float, default=1.0, help="before a node leaves (%(default)s)")
    storage = os.environ.get("DIFFULT_STORAGE") or "~/diffult"
    one.add_argument("--storage", type=Path, default=storage, help="of all results (%(default)s)")
    one.set_defaults(run=up)
    one = commands.add_parser("submit", help="run a sweep as a job; takes all that diffult_ray.sweep takes")
    one.add_argument("--no-wait", action="store_true", help="do not follow its log")
    one.add_argument("sweep", nargs=argparse.REMAINDER, help="sweep, key=value ...")
    one.set_defaults(run=submit)
    commands.add_parser("watch", help="nodes, demand, the last job and its log").set_defaults(run=watch)
    one = commands.add_parser("fetch", help="copy results")
    one.add_argument("target", type=Path, nargs="?", default=Path("results"))
    one.set_defaults(run=fetch)
    commands.add_parser("down", help="end it; the storage stays").set_defaults(run=down)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    arguments = _parser().parse_args(argv)
    arguments.folder = arguments.folder.expanduser().absolute()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
