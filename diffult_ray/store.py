"""Artifacts addressed by content. A manifest is written last: what has none does not exist."""

from __future__ import annotations

import hashlib
import platform
import shutil
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffult_ray import __version__, files
from diffult_ray.errors import BadInput
from diffult_ray.pipeline import Stage

FORMAT = 1


@dataclass(frozen=True)
class Artifact:
    """A finished artifact: its folder and its manifest."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def summary(self) -> dict[str, Any]:
        return self.manifest["summary"]

    @property
    def seconds(self) -> float:
        return self.manifest["seconds"]


class Store:
    """`artifacts/`, `work/` and `sweeps/` under one storage folder.

    Raises:
        BadInput: if the folder cannot be made or written.
    """

    def __init__(self, root: str | Path) -> None:
        if "://" in str(root):
            raise _refusal(root, "no such storage here; name a folder that every node sees")
        self.root = Path(root).expanduser().absolute()
        try:
            nearest = next(p for p in (self.root, *self.root.parents) if p.exists())
        except OSError as error:
            raise _refusal(root, error.strerror) from error
        if not nearest.is_dir():
            raise _refusal(root, f"{nearest} is a file")

    def check(self) -> None:
        """Write and remove a file, so that a full sweep does not find out late. Leaves no trace."""
        missing = files.missing(self.root)
        probe = self.root / f".probe-{socket.gethostname()}"
        try:
            files.write_bytes(probe, b"")
            probe.unlink()
        except OSError as error:
            raise _refusal(self.root, error.strerror or str(error)) from error
        finally:
            files.remove_empty(missing)

    def folder(self, stage: Stage) -> Path:
        """Where the artifact is, or will be."""
        return self.root / "artifacts" / stage.name / stage.key

    def work(self, stage: Stage) -> Path:
        """What an unfinished build keeps: checkpoints, parts, progress."""
        return self.root / "work" / f"{stage.name}-{stage.family}"

    def find(self, stage: Stage) -> Artifact | None:
        """The finished artifact, if there is one whose files all have their sizes."""
        folder = self.folder(stage)
        try:
            manifest = files.read_json(folder / "manifest.json")
        except (FileNotFoundError, ValueError):
            return None
        sizes_hold = all(_size(folder / f["name"]) == f["bytes"] for f in manifest["files"])
        return Artifact(folder, manifest) if sizes_hold else None

    def commit(self, stage: Stage, *, seconds: float) -> Artifact:
        """Write the manifest of a built artifact: from here on it exists.

        Raises:
            FileNotFoundError: if the stage did not write its `summary.json`.
        """
        folder = self.folder(stage)
        manifest = {
            "format": FORMAT,
            "stage": stage.name,
            "key": stage.key,
            "config": dict(stage.config),
            "inputs": {name: s.key for name, s in stage.inputs.items()},
            "summary": files.read_json(folder / "summary.json"),
            "files": [_entry(folder, f) for f in _files(folder)],
            "code_version": __version__,
            "seconds": round(seconds, 3),
            "machine": {"host": socket.gethostname(), "platform": platform.platform()},
            "created": time.time(),
        }
        files.write_json(folder / "manifest.json", manifest)
        return Artifact(folder, manifest)

    def discard_work(self, stage: Stage) -> None:
        shutil.rmtree(self.work(stage), ignore_errors=True)


def _refusal(root: str | Path, cause: str) -> BadInput:
    return BadInput(
        where="--storage",
        rule="must be a folder that can be written",
        value=str(root),
        advice=f"{cause}; give another with --storage or DIFFULT_STORAGE",
    )


def _files(folder: Path) -> list[Path]:
    found = (p for p in folder.rglob("*") if p.is_file())
    return sorted(p for p in found if p.name != "manifest.json" and not p.name.startswith("."))


def _entry(folder: Path, path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "name": path.relative_to(folder).as_posix(),
        "bytes": path.stat().st_size,
        "sha256": digest,
    }


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1
