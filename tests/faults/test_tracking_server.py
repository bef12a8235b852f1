"""A real MLflow server that is not there when it is needed: results are kept, runs are logged later, once."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.door import SWEEP, Door, Tally, check_tracking, runs, wait_for


class Server:
    """`mlflow server` on loopback with an sqlite store."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.database = folder, folder / "server.db"
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port),
             "--workers", "1", "--backend-store-uri", f"sqlite:///{self.database}",
             "--artifacts-destination", str(self.folder / "files")],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True, cwd=self.folder, env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"},
        )
        wait_for(self._answers, 120, "no answer from the MLflow server")

    def kill(self) -> None:
        """With its workers, which have its session to themselves."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        try:
            urllib.request.urlopen(f"{self.uri}/health", timeout=2).close()
        except OSError:
            return False
        return True


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path)
    yield made
    made.kill()


@pytest.fixture
def tracked(server: Server, new_faulty: Callable[..., Door]) -> Door:
    return new_faulty(f"{SWEEP}tracking: {{uri: '{server.uri}'}}\n")


def test_a_server_that_is_down_at_the_first_start_is_told_before_anything_starts(
    server: Server, tracked: Door, tally: Tally
):
    with tally.fault():
        tracked.begin()
        assert tracked.end() == 2
        assert "can be reached" in tracked.said[-1] and not tracked.storage.exists()


def test_a_server_that_is_down_when_a_sweep_goes_on(
    server: Server, tracked: Door, reference: Door, tally: Tally
):
    server.start()
    with tally.fault(2):
        tracked.begin()
        tracked.until(r"\] generator .*started")
        tracked.kill()
        server.kill()
        said = tracked.finish()  # down at start, and for good
        assert "the same command logs the rest" in said
        tally.cost(tracked, reference, 2)
        tracked.check(reference, tracked=False)
        server.start()
        tracked.finish()
        check_tracking(server.database, reference)
        tracked.finish()
        check_tracking(server.database, reference)


def test_a_server_that_is_killed_and_started_again(
    server: Server, tracked: Door, reference: Door, tally: Tally
):
    server.start()
    with tally.fault():
        tracked.begin()
        wait_for(lambda: runs(server.database, "diffult.key"), what="no run was logged")
        server.kill()
        tracked.until(r"trial 1/")
        server.start()
        assert tracked.end() == 0, tracked.said[-1]
        tally.cost(tracked, reference)
        tracked.check(reference, tracked=False)
        if "not all is in MLflow" in tracked.said[-1]:
            tracked.finish()
        check_tracking(server.database, reference)
