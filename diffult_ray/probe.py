"""What runs on each node for `preflight`: its versions, GPUs, and a try of the storage."""

from __future__ import annotations

import hashlib
import platform
import subprocess
import time
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from diffult_ray import __version__
from diffult_ray.remote import Remote


def facts() -> dict[str, Any]:
    """Versions and GPUs of the machine that this runs on."""
    return {
        "versions": {
            "Python": platform.python_version(), "Ray": _version("ray"), "torch": _version("torch"),
            "diffult_ray": f"{__version__} ({code()})",
        },
        "gpus": graphics(),
    }  # fmt: skip


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


@lru_cache(maxsize=1)
def code() -> str:
    """A digest of this package's source: an old copy on a node has the same version, and other code."""
    root, digest = Path(__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:8]


def graphics() -> list[dict[str, Any]]:
    """Name, total and free memory (MiB) of each GPU here, also of those that Ray hides from a task."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,memory.free", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = (line.rsplit(",", 2) for line in told.stdout.splitlines() if line.count(",") >= 2)
    return [] if told.returncode else [
        {"name": name.strip(), "total": float(total), "free": float(free)} for name, total, free in rows
    ]


def run(root: str, nonce: str, mine: str) -> dict[str, Any]:
    """Runs on a node: its facts, and what came of reading and writing the storage."""
    try:
        storage = read(root, nonce, "driver")
        write(root, nonce, mine)
    except Exception as error:  # whatever stands between this node and the storage, it is told
        storage = f"{type(error).__name__}: {error}"
    return {**facts(), "storage": storage}


def clock() -> float:
    return time.time()


# --- the storage, wherever it is ---


def _file_system(root: str) -> tuple[Any, str]:
    if "://" in root:
        remote = Remote(root)
        return remote.system, remote.path()
    from pyarrow.fs import LocalFileSystem

    return LocalFileSystem(), str(Path(root).expanduser().absolute())


def _place(nonce: str) -> str:
    return f".preflight-{nonce[:12]}"


def write(root: str, nonce: str, name: str) -> None:
    system, path = _file_system(root)
    with system.open_output_stream(f"{path}/{_place(nonce)}/{name}") as file:
        file.write(nonce.encode())


def read(root: str, nonce: str, name: str) -> str:
    system, path = _file_system(root)
    with system.open_input_stream(f"{path}/{_place(nonce)}/{name}") as file:
        return file.read().decode()


def prepare(root: str, nonce: str) -> None:
    system, path = _file_system(root)
    system.create_dir(f"{path}/{_place(nonce)}", recursive=True)
    write(root, nonce, "driver")


def clear(root: str, nonce: str) -> None:
    system, path = _file_system(root)
    system.delete_dir(f"{path}/{_place(nonce)}")
