"""Artifacts addressed by content. A manifest is written last: what has none does not exist.

    python -m diffult_ray.store ls | show KEY | verify | gc [--keep SWEEP ...] [--dry-run]

Sizes are compared whenever an artifact is used, and its content the first time that it is used on a
machine. One that is not as its manifest says is moved to `damaged/`, with one warning, and built again.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffult_ray import __version__, fence, files, lease
from diffult_ray.errors import BadInput
from diffult_ray.lease import Tell
from diffult_ray.pipeline import Stage
from diffult_ray.stages import Site

FORMAT = 1  # of the storage folder and its manifests; a newer one is refused
MANIFEST = "manifest.json"
PROBE = 2**16  # bytes of the file by which a full storage is found out

_VERIFIED: dict[str, str] = {}  # folder -> what was seen of its files when their content was compared


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

    @property
    def peaks(self) -> dict[str, int]:
        """MiB of the largest process that built it; empty of an earlier version's."""
        return self.manifest.get("peaks", {})


class Store:
    """`artifacts/`, `work/` and `sweeps/` under one storage folder.

    Raises:
        BadInput: if the folder cannot be made or written, or was written by a newer version.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).expanduser().absolute()
        try:
            nearest = next(p for p in (self.root, *self.root.parents) if p.exists())
        except OSError as error:
            raise _refusal(root, error.strerror) from error
        if not nearest.is_dir():
            raise _refusal(root, f"{nearest} is a file")
        with suppress(OSError, ValueError):
            check_format(files.read_json(self.root / "store.json"), self.root / "store.json")

    @property
    def address(self) -> str:
        """By which another process opens this store."""
        return str(self.root)

    def shown(self, path: Path) -> str:
        """A path of the store as a person finds it."""
        return str(path)

    def check(self) -> None:
        """Write and remove a file, so that a full sweep does not find out late. Leaves no trace."""
        missing = files.missing(self.root)
        probe = self.root / f".probe-{socket.gethostname()}"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            # By its own name: one that a killed sweep has left is the next one's.
            probe.write_bytes(bytes(PROBE))
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

    def tune(self, sweep: str) -> Path:
        """What Ray Tune keeps while the trials of a sweep run."""
        return self.root / "work" / f"tune-{sweep.replace('/', '-')}"

    def progress(self, stage: Stage) -> dict[str, Any] | None:
        """What an unfinished build last told of how far it is."""
        room = fence.latest(self.work(stage))
        try:
            return None if room is None else files.read_json(room / "progress.json")
        except (OSError, ValueError):
            return None

    @property
    def leases(self) -> Path:
        """Who builds what at this moment."""
        return self.root / "leases"

    def look(self, stage: Stage) -> Artifact | None:
        """The finished artifact, if there is one whose files have their sizes; changes nothing.

        Raises:
            BadInput: if a newer version wrote it.
        """
        folder = self.folder(stage)
        try:
            manifest = read_manifest(folder)
        except (OSError, ValueError):
            return None
        return Artifact(folder, manifest) if manifest and not missized(folder, manifest) else None

    def find(self, stage: Stage) -> Artifact | None:
        """The finished artifact, if there is one; a damaged one is set aside.

        Raises:
            BadInput: if a newer version wrote it.
        """
        folder = self.folder(stage)
        try:
            manifest = read_manifest(folder)
            if manifest is None:
                return None
            fault = first_fault(folder, manifest)
        except ValueError as error:
            fault = f"manifest.json: {error}"
        except OSError:  # it went while we were looking, or cannot be read now
            return None
        if fault is None:
            return Artifact(folder, manifest)
        self.set_aside(folder, fault)
        return None

    def locate(self, stage: Stage) -> Artifact | None:
        """As `find`, where its files need not be on this machine."""
        return self.find(stage)

    def ready(self, stage: Stage) -> bool:
        """Whether there is the artifact, for one who asks again and again."""
        return self.find(stage) is not None

    def set_aside(self, folder: Path, fault: str) -> Path | None:
        """Move a damaged artifact out of the way; whoever does it says so. Returns where it is now."""
        aside = self.root / "damaged" / aside_name(folder)
        try:
            aside.parent.mkdir(parents=True, exist_ok=True)
            folder.rename(aside)
        except OSError:
            return None  # another process was first
        warn(folder, fault, str(aside))
        return aside

    def commit(
        self, stage: Stage, *, seconds: float, made: Path | None = None,
        peaks: Mapping[str, int] | None = None,
    ) -> Artifact:
        """Write the manifest of a built artifact and put it in its place: from here on it exists.

        Args:
            peaks: MiB of the largest process that built it, as `footprint.peaks`.
            made: the folder that it was built in, by default its place.

        Raises:
            FileNotFoundError: if the stage did not write its `summary.json`.
        """
        folder = self.folder(stage)
        made = made or folder
        files.remove_temporary(made)
        manifest = {
            "format": FORMAT,
            "stage": stage.name,
            "key": stage.key,
            "config": dict(stage.config),
            "inputs": {name: s.key for name, s in stage.inputs.items()},
            "summary": files.read_json(made / "summary.json"),
            "files": [_entry(made, f) for f in _files(made)],
            "code_version": __version__,
            "seconds": round(seconds, 3),
            "peaks": dict(peaks or {}),
            "resources": resources_of(stage),
            "machine": {"host": socket.gethostname(), "platform": platform.platform()},
            "created": time.time(),
        }
        if not (self.root / "store.json").exists():
            files.write_json(self.root / "store.json", {"format": FORMAT})
        files.write_json(made / "manifest.json", manifest)
        if made != folder:
            shutil.rmtree(folder, ignore_errors=True)  # without a manifest, or it would have been found
            folder.parent.mkdir(parents=True, exist_ok=True)
            made.rename(folder)
        _VERIFIED[str(folder)] = _seen(folder, manifest)  # its checksums were computed just now
        return Artifact(folder, manifest)

    def enter(self, folder: Path) -> Path:
        """A room of this build's own in a work folder; see `fence`."""
        return fence.enter(folder)

    def leave(self, room: Path) -> None:
        """Remove a room in which nothing was written."""
        fence.leave(room)

    def discard_work(self, stage: Stage) -> None:
        shutil.rmtree(self.work(stage), ignore_errors=True)

    def has_work(self, stage: Stage) -> bool:
        return self.work(stage).exists()

    @property
    def site(self) -> Site:
        """How stages come to folders of this store on other machines."""
        return Site()

    def hold(self, names: Mapping[str, Any], tell: Tell | None = None) -> AbstractContextManager[Any]:
        """Leases of these names, as in `lease.hold`."""
        return lease.hold(self.leases, names, tell)

    def tidy_leases(self) -> None:
        """Remove those of dead builders."""
        if self.leases.is_dir():
            lease.tidy(self.leases)
            files.remove_empty([self.leases])

    def leases_now(self) -> tuple[list[dict[str, Any]], set[str], list[Path]]:
        """What leases that may be alive say, their names, and the files of those that are not."""
        paths = sorted(self.leases.glob("*.json"))
        living = lease.living(self.leases)
        names = {path.stem for path in paths if lease.read(path) in living}
        return living, names, [path for path in paths if path.stem not in names]

    @contextmanager
    def outlined(self) -> Iterator[Store]:
        """A store whose folder has at least the names, the sizes and the JSON files of this one's."""
        yield self

    def altered(self, folder: Path, manifest: dict[str, Any]) -> str | None:
        """As `altered`, of an artifact's folder. Raises OSError, unreadable."""
        return altered(folder, manifest)

    def remove(self, path: Path) -> None:
        """Remove a file or folder; the manifest first, since what is half removed does not exist."""
        with suppress(OSError):
            (path if path.is_file() else path / MANIFEST).unlink()
        shutil.rmtree(path, ignore_errors=True)
        files.remove_empty([path.parent])

    def tracking_folder(self, sweep: str) -> Path:
        """Where MLflow's file is, unless a sweep names another place."""
        return self.root

    def pull(self, path: Path) -> None:
        """See what other machines have written to a folder."""

    def push(self, path: Path) -> None:
        """Let other machines see what was written to a folder or file."""

    def manifests(self, stage: str = "*") -> Iterator[tuple[str, dict[str, Any]]]:
        """(key, manifest) of every artifact, of a stage or of all, that has a readable one."""
        for folder in (self.root / "artifacts").glob(f"{stage}/*"):
            try:
                manifest = read_manifest(folder)
            except (OSError, ValueError):
                continue
            if manifest is not None:
                yield folder.name, manifest

    def read_json(self, stage: Stage, name: str) -> Any:
        """A file of an artifact. Raises OSError or ValueError if it cannot be read."""
        return files.read_json(self.folder(stage) / name)


def open_store(root: str | Path) -> Store:
    """The store of a folder or a URI.

    Raises:
        BadInput: if there can be none.
    """
    if "://" not in str(root):
        return Store(root)
    from diffult_ray.remotestore import RemoteStore

    return RemoteStore(str(root))


def aside_name(folder: Path) -> str:
    return f"{folder.parent.name}-{folder.name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"


def warn(folder: Path, fault: str, aside: str) -> None:
    print(
        f"warning: {folder.parent.name} {folder.name[:8]} is damaged ({fault}); it is now {aside}, "
        "and is built again where it is needed",
        file=sys.stderr, flush=True,
    )


def resources_of(stage: Stage) -> dict[str, float]:
    """What a stage is built on: workers, and CPUs and GPUs a worker."""
    given = stage.resources
    if given is None:
        return {"workers": 1, "cpus": 1.0, "gpus": 0.0}
    return {"workers": given.workers, "cpus": given.cpus, "gpus": given.gpus}


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
    return {
        "name": path.relative_to(folder).as_posix(),
        "bytes": path.stat().st_size,
        "sha256": _digest(path),
    }


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- whether an artifact is what its manifest says ------------------------------------------------


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of an artifact's folder, None without one.

    Raises:
        BadInput: if a newer version wrote it.
        ValueError: if it is no manifest.
        OSError: if it cannot be read.
    """
    try:
        content = (folder / MANIFEST).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return manifest_of(content, folder / MANIFEST)


def manifest_of(content: bytes, path: str | Path) -> dict[str, Any]:
    """As above, of what a manifest's file holds."""
    manifest = json.loads(content)
    if not isinstance(manifest, dict) or not {"files", "summary", "seconds", "inputs"} <= set(manifest):
        raise ValueError("is no manifest")
    check_format(manifest, path)
    return manifest


def check_format(written: Any, path: str | Path) -> None:
    """Raises BadInput for what a newer version wrote."""
    found = written.get("format", 0) if isinstance(written, dict) else 0
    if isinstance(found, int) and found > FORMAT:
        raise BadInput(
            where=str(path), rule=f"was written by a newer version; this one reads format {FORMAT}",
            value=found, advice="update diffult_ray, or name another with --storage",
        )


def missized(folder: Path, manifest: dict[str, Any]) -> str | None:
    """The first file that is missing or has another size than the manifest says, with the two sizes."""
    for entry in manifest["files"]:
        size = _size(folder / entry["name"])
        if size != entry["bytes"]:
            there = "is missing" if size < 0 else f"has {size} bytes"
            return f"{entry['name']} {there} of {entry['bytes']}"
    return None


def altered(folder: Path, manifest: dict[str, Any]) -> str | None:
    """The first file whose size or content is not what the manifest says. Raises OSError, unreadable."""
    wrong = missized(folder, manifest)
    if wrong is not None:
        return wrong
    for entry in manifest["files"]:
        if _digest(folder / entry["name"]) != entry["sha256"]:
            return f"{entry['name']} has another checksum"
    return None


def first_fault(folder: Path, manifest: dict[str, Any]) -> str | None:
    """As `altered`, but content is compared once a machine, until a file is written to."""
    wrong = missized(folder, manifest)
    if wrong is not None:
        return wrong
    seen = _seen(folder, manifest)
    if _VERIFIED.get(str(folder)) == seen:
        return None
    note = _notes() / seen
    if not note.exists():
        fault = altered(folder, manifest)
        if fault is not None:
            return fault
        remember(folder, manifest)
    _VERIFIED[str(folder)] = seen
    return None


def remember(folder: Path, manifest: dict[str, Any]) -> None:
    """That the content was compared on this machine."""
    seen = _seen(folder, manifest)
    note = _notes() / seen
    with suppress(OSError):  # without the note, the next process compares once more
        note.parent.mkdir(mode=0o700, exist_ok=True)
        note.touch()
    _VERIFIED[str(folder)] = seen


def _seen(folder: Path, manifest: dict[str, Any]) -> str:
    """A hash of where the files are and when each was last written. Raises OSError if one is gone."""
    found = [str(folder), manifest["files"]]
    for name in ("manifest.json", *(entry["name"] for entry in manifest["files"])):
        status = (folder / name).stat()
        found.append([name, status.st_size, status.st_mtime_ns, status.st_ino])
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:32]


def _notes() -> Path:
    """Empty files named for what was compared on this machine, by this user."""
    return Path(tempfile.gettempdir()) / f"diffult-verified-{os.getuid()}"


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


if __name__ == "__main__":
    from diffult_ray.storekeeper import main

    sys.exit(main())
