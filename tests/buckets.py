"""An S3 server on loopback (moto's), and the environment of a machine that uses it."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest

LOGIN = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "hunter2hunter2"}


@dataclass(frozen=True)
class Bucket:
    """A bucket of its own on a server."""

    server: str  # http://127.0.0.1:PORT
    name: str

    @property
    def uri(self) -> str:
        return f"s3://{self.name}/some/where"

    @property
    def explicit(self) -> str:
        """With the server in it."""
        return f"{self.uri}?endpoint_override={urlsplit(self.server).netloc}&scheme=http"

    def environment(self, cache: Path) -> Mapping[str, str]:
        """Of a machine whose mirror is in a folder."""
        return {
            **LOGIN, "AWS_ENDPOINT_URL": self.server, "AWS_EC2_METADATA_DISABLED": "true",
            "DIFFULT_CACHE": str(cache),
        }

    @property
    def system(self):
        from pyarrow.fs import S3FileSystem

        return S3FileSystem(
            access_key="test", secret_key="hunter2hunter2", region="us-east-1", scheme="http",
            endpoint_override=urlsplit(self.server).netloc, allow_bucket_creation=True,
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


def serve() -> Iterator[str]:
    """The address of a server that lasts until the generator ends."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def make(server: str) -> Bucket:
    made = Bucket(server, f"bucket-{uuid.uuid4().hex[:12]}")
    made.system.create_dir(made.name)
    return made


s3_server = pytest.fixture(scope="module")(serve)


@pytest.fixture
def bucket(s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """A new bucket, and the environment in which it is used; the mirror is in `tmp_path / "cache"`."""
    made = make(s3_server)
    for name, value in made.environment(tmp_path / "cache").items():
        monkeypatch.setenv(name, value)
    return made
