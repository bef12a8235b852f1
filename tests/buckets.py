"""Servers of S3 (moto) and Google Cloud (its emulator) on loopback, and the environment that uses them."""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode, urlsplit

import pytest

LOGIN = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "hunter2hunter2"}


@dataclass(frozen=True)
class Bucket:
    """A bucket of its own on a server."""

    server: str  # http://127.0.0.1:PORT
    name: str
    scheme: str = "s3"

    @property
    def uri(self) -> str:
        """As a user would give it: S3's server is in the environment, Google Cloud's has no place there."""
        return self.explicit if self.scheme == "gs" else f"s3://{self.name}/some/where"

    @property
    def explicit(self) -> str:
        """With the server in it."""
        user = "anonymous@" if self.scheme == "gs" else ""
        return f"{self.scheme}://{user}{self.name}/some/where?{self._options}"

    @property
    def shown(self) -> str:
        """The URI, as it is written down."""
        return self.uri.replace("anonymous@", "")

    def below(self, name: str) -> str:
        """The URI of what is below it, as it is written down."""
        base, query = self.shown.partition("?")[::2]
        return f"{base}/{name}" + (f"?{query}" if query else "")

    @property
    def _options(self) -> str:
        return urlencode({"endpoint_override": urlsplit(self.server).netloc, "scheme": "http"})

    def environment(self, cache: Path) -> Mapping[str, str]:
        """Of a machine whose mirror is in a folder."""
        login = {**LOGIN, "AWS_ENDPOINT_URL": self.server, "AWS_EC2_METADATA_DISABLED": "true"}
        return {**(login if self.scheme == "s3" else {}), "DIFFULT_CACHE": str(cache)}

    @property
    def system(self):
        from pyarrow.fs import GcsFileSystem, S3FileSystem

        host = urlsplit(self.server).netloc
        if self.scheme == "gs":
            return GcsFileSystem(anonymous=True, scheme="http", endpoint_override=host, project_id="tests")
        return S3FileSystem(
            access_key="test", secret_key="hunter2hunter2", region="us-east-1", scheme="http",
            endpoint_override=host, allow_bucket_creation=True,
        )

    def names(self, below: str = "") -> list[str]:
        """Objects below the URI."""
        from pyarrow.fs import FileSelector, FileType

        base = f"{self.name}/some/where" + (f"/{below}" if below else "")
        wanted = FileSelector(base, recursive=True, allow_not_found=True)
        found = self.system.get_file_info(wanted)
        return sorted(f.path[len(base) + 1 :] for f in found if f.type == FileType.File)

    def read(self, name: str) -> bytes:
        with self.system.open_input_stream(f"{self.name}/some/where/{name}") as file:
            return file.read()

    def write(self, name: str, content: bytes) -> None:
        with self.system.open_output_stream(f"{self.name}/some/where/{name}") as file:
            file.write(content)


@contextmanager
def amazon(port: int = 0) -> Iterator[str]:
    """The address of a server that speaks S3. Its buckets outlast it, in this process."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    try:
        yield "http://{}:{}".format(*server.get_host_and_port())
    finally:
        server.stop()


@contextmanager
def google() -> Iterator[str]:
    """The address of a server that speaks as Google Cloud's storage does.

    A process of its own: pyarrow opens a parquet file without letting other threads of Python run.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "gcp_storage_emulator", "start", "--host=127.0.0.1", f"--port={port}",
               "--in-memory", "--quiet"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            _await_answer(server, port)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.kill()


def _await_answer(server: subprocess.Popen[bytes], port: int, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), 1.0).close()
        except OSError:
            assert server.poll() is None and time.monotonic() < end, "no server"
            time.sleep(0.05)


SERVERS = {"s3": amazon, "gs": google}


def make(server: str, scheme: str) -> Bucket:
    made = Bucket(server, f"bucket-{uuid.uuid4().hex[:12]}", scheme)
    made.system.create_dir(made.name)
    return made


@pytest.fixture(scope="module", params=["s3", "gs"])
def storage_server(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """An address, and what is spoken there."""
    with SERVERS[request.param]() as address:
        yield address, request.param


@pytest.fixture
def bucket(storage_server: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """A new bucket, and the environment in which it is used; the mirror is in `tmp_path / "cache"`."""
    made = make(*storage_server)
    for name, value in made.environment(tmp_path / "cache").items():
        monkeypatch.setenv(name, value)
    return made
