"""`clusters/one_machine` as a reader uses it: it grows for a sweep, is checked and watched, ends clean."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffult_ray import metrics
from tests.conftest import TINY

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.autoscaling


class OneMachine:
    def __init__(self, folder: Path) -> None:
        self.folder, self.storage = folder, folder / "storage"

    def run(self, *arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "clusters/one_machine", "--folder", str(self.folder), *arguments],
            cwd=ROOT, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL,
        )

    @property
    def state(self) -> dict:
        return json.loads((self.folder / "cluster.json").read_text())

    def processes(self) -> int:
        mark, found = f"DIFFULT_ONE_MACHINE={self.folder}".encode(), 0
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                found += mark in (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
        return found

    def check(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.folder / "token")}
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "DIFFULT_"))}
        return subprocess.run(
            [sys.executable, "-m", "diffult_ray.cluster", *arguments, "--storage", str(self.storage),
             "--address", f"127.0.0.1:{self.state['ports']['gcs']}"],
            cwd=ROOT, env={**kept, **token}, capture_output=True, text=True, timeout=180,
        )  # fmt: skip

    def told(self, what: str) -> list[dict]:
        """What the head's state API lists."""
        url = f"http://127.0.0.1:{self.state['ports']['dashboard']}/api/v0/{what}?limit=10000"
        request = urllib.request.Request(url)
        request.add_header("Authorization", f"Bearer {(self.folder / 'token').read_text()}")
        return json.loads(urllib.request.urlopen(request, timeout=30).read())["data"]["result"]["result"]

    def workers(self) -> set[str]:
        """Ids of the nodes that are alive, but for the head."""
        return {n["node_id"] for n in self.told("nodes") if n["state"] == "ALIVE" and not n["is_head_node"]}

    def counted(self) -> set[str]:
        """Our metrics on the endpoints of all nodes."""
        found: set[str] = set()
        (listed,) = (self.folder / "ray").glob("prom_metrics_service_discovery.json")
        for group in json.loads(listed.read_text()):
            for target in group["targets"]:
                try:
                    text = urllib.request.urlopen(f"http://{target}/metrics", timeout=5).read().decode()
                except OSError:
                    continue
                found |= set(re.findall(r"^(ray_diffult_\w+)\{", text, re.MULTILINE))
        return found


@pytest.fixture(scope="module")
def machine(ray_folder: Path) -> Iterator[OneMachine]:
    made = OneMachine(ray_folder / "one")
    started = made.run("up", "--nodes", "2", "--idle-minutes", "0.3", "--storage", str(made.storage))
    assert started.returncode == 0, started.stdout + started.stderr
    yield made
    if (made.folder / "cluster.json").exists():
        made.run("down")


def test_a_request_is_set_against_what_the_autoscaler_may_start(machine):
    done = machine.check("digits")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 ray.head.default x 0 + 2 node x 1 = 2 CPUs" in done.stdout
    assert "is written and read by" in done.stdout and "\nerror" not in done.stdout
    large = machine.check("digits", "resources.generator.workers=3")
    assert large.returncode == 3, large.stdout + large.stderr
    assert "3 workers x 1 CPUs = 3 CPUs, but" in large.stdout


WORK = {  # of a stage: what Ray calls its tasks
    "extractor": "extractor", "reference": "reference", "generator": "RayTrainWorker", "images": "SampleRows",
    "scores": "ScoreRows", "quality": "MeasureRows", "classifier": "_trial.train",
}  # fmt: skip


def test_a_sweep_grows_the_cluster_is_counted_and_is_fetched(machine, tmp_path):
    sweep = tmp_path / "tiny.yaml"
    sweep.write_text(TINY)
    assert machine.workers() == set()
    started = machine.run("submit", "--no-wait", str(sweep), "tracking.enabled=false")
    assert started.returncode == 0, started.stdout + started.stderr
    report, seen, deadline = machine.storage / "sweeps/tiny/report.html", set(), time.monotonic() + 400
    came, counts = set(), [0]
    while not (report.exists() and counts[-1] == 0) and time.monotonic() < deadline:
        seen |= machine.counted()
        up = machine.workers()
        came |= up
        counts += [len(up)] if len(up) != counts[-1] else []
        time.sleep(1)
    print("nodes over time:", counts)
    assert max(counts) == 2 and counts[-1] == 0  # they came for the generator's two workers, and went
    tasks = [t for t in machine.told("tasks") if t["node_id"]]  # that were given to a node
    ran = {stage: {t["node_id"] for t in tasks if name in t["name"]} for stage, name in WORK.items()}
    assert {stage: nodes - came for stage, nodes in ran.items()} == {stage: set() for stage in WORK}
    assert [stage for stage, nodes in ran.items() if not nodes] == []
    watched = machine.run("watch")
    assert report.exists() and "succeeded" in watched.stdout.lower(), watched.stdout + watched.stderr
    told = watched.stdout + watched.stderr
    assert "at its largest with 2 CPUs" in told
    expected = {f"ray_{name}_total" for name in metrics.COUNTERS if name != "diffult_artifacts_reused"}
    deadline = time.monotonic() + 60  # the head still tells what the driver counted until its end
    while not expected <= seen and time.monotonic() < deadline:
        seen |= machine.counted()
    assert expected <= seen
    machine.run("fetch", str(tmp_path / "got"))
    assert (tmp_path / "got/tiny/report.html").exists() and (tmp_path / "got/tiny/figures").is_dir()


def test_it_is_closed_to_who_has_no_token(machine):
    for port, path in (("dashboard", "/api/jobs/"), ("dashboard", "/nodes?view=summary")):
        request = urllib.request.Request(f"http://127.0.0.1:{machine.state['ports'][port]}{path}")
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=10)
        assert refused.value.code in (401, 403)
    token = (machine.folder / "token").read_text()
    assert (machine.folder / "token").stat().st_mode & 0o777 == 0o600
    logs = machine.folder / "ray"
    held = [p for p in logs.rglob("*") if p.is_file() and token.encode() in p.read_bytes()]
    assert held == []


def test_down_leaves_no_process_and_keeps_the_storage(machine):
    assert machine.processes() > 0
    done = machine.run("down")
    assert done.returncode == 0 and "processes ended" in done.stdout
    assert machine.processes() == 0
    assert machine.storage.exists() and not (machine.folder / "token").exists()
