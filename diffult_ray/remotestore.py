"""A store on s3:// or gs://: the same layout below the URI, and each machine's mirror of what it uses.

An artifact's files are uploaded before its manifest, and fetched, with sizes and checksums compared, when
it is first used on a machine. What tells no more than that it exists reads its manifest alone.
"""

from __future__ import annotations

import json
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from diffult_ray import claims, fence, files, store
from diffult_ray.data.split import MOVED
from diffult_ray.errors import BadInput
from diffult_ray.mirror import PUBLISHER, Mirror
from diffult_ray.pipeline import Stage
from diffult_ray.remote import Remote, Stat, side_by_side
from diffult_ray.store import MANIFEST, Artifact, Store

FRESH = 5.0  # seconds for which a listing of all artifacts, and progress, are taken for true

_LOCATED: dict[tuple[str, str], dict[str, Any]] = {}  # (URI, folder) -> its manifest, seen by this process
_HERE: set[tuple[str, str]] = set()  # those of which this process knows that the mirror has them


class RemoteStore(Store):
    """The store of a URI.

    Raises:
        BadInput: if it is none, does not answer, lets nobody in, or was written by a newer version.
    """

    def __init__(self, uri: str) -> None:
        self._open(uri)
        self.remote.check()
        with suppress(FileNotFoundError, ValueError):
            written = json.loads(self.remote.read("store.json"))
            store.check_format(written, self.shown(self.root / "store.json"))

    def _open(self, uri: str) -> None:
        self.remote = Remote(uri)
        self.mirror = Mirror(self.remote)
        self._tree: tuple[float, dict[str, Stat]] = (float("-inf"), {})
        self._told: dict[str, tuple[float, Any]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return (reopened, (self.address,))

    @property
    def root(self) -> Path:
        """The mirror on this machine."""
        return self.mirror.root

    @property
    def address(self) -> str:
        return self.remote.address.uri

    def shown(self, path: Path) -> str:
        base, query = self.remote.address.shown.partition("?")[::2]
        name = path.relative_to(self.root).as_posix()
        return base + ("" if name == "." else f"/{name}") + (f"?{query}" if query else "")

    def check(self) -> None:
        self.remote.try_writing(f".probe-{socket.gethostname()}-{uuid.uuid4().hex[:8]}")
        missing = files.missing(self.root)
        try:
            files.write_bytes(self.root / ".probe", bytes(store.PROBE))
            (self.root / ".probe").unlink()
        except OSError as error:
            raise BadInput(
                where="DIFFULT_CACHE", rule="must be a folder of this machine that can be written",
                value=str(self.root), advice=error.strerror or str(error),
            ) from error
        finally:
            files.remove_empty(missing)

    # --- artifacts ---

    def look(self, stage: Stage) -> Artifact | None:
        folder, name = self.folder(stage), _name(stage)
        tree = self._listing()
        stat = tree.get(f"{name}/{MANIFEST}")
        if stat is None:
            return None
        try:
            manifest = self._manifest(name, stat)
        except (OSError, ValueError):
            return None
        there = {e["name"]: tree.get(f"{name}/{e['name']}") for e in manifest["files"]}
        return None if _missized(manifest, there) else Artifact(folder, manifest)

    def locate(self, stage: Stage) -> Artifact | None:
        return self._locate(_name(stage))

    def _locate(self, name: str) -> Artifact | None:
        folder = self.root / name
        known = _LOCATED.get((self.address, name))
        if known is not None:
            return Artifact(folder, known)
        try:
            content = self.remote.read(f"{name}/{MANIFEST}")
            manifest = store.manifest_of(content, self.shown(folder / MANIFEST))
            fault = _missized(manifest, self.remote.list(name))
        except FileNotFoundError:
            return None
        except ValueError as error:
            fault = f"{MANIFEST}: {error}"
        if fault is None:
            _LOCATED[self.address, name] = manifest
            return Artifact(folder, manifest)
        self.set_aside(folder, fault)
        return None

    def ready(self, stage: Stage) -> bool:
        """As `locate`, but what was missing is asked for again only after some seconds."""
        name = _name(stage)
        if (self.address, name) in _LOCATED:
            return True
        asked, _ = self._told.get(name, (float("-inf"), None))
        if time.monotonic() - asked < FRESH:
            return False
        self._told[name] = time.monotonic(), None
        return self.locate(stage) is not None

    def find(self, stage: Stage) -> Artifact | None:
        """The artifact in the mirror, fetched if need be; a damaged one is set aside."""
        return self._find(_name(stage))

    def fetch(self, name: str) -> bool:
        """Make the artifact whole on this machine in whose folder a path is; whether there is one.

        Raises:
            FileNotFoundError: if it is damaged.
        """
        name = "/".join(name.split("/")[:3])
        if self._locate(name) is None:
            return False
        if self._find(name) is None:
            raise FileNotFoundError(f"{name} is damaged; the same command builds it again")
        return True

    def _find(self, name: str) -> Artifact | None:
        folder, located = self.root / name, self._locate(name)
        if located is None:
            if (folder / MANIFEST).exists():
                self.mirror.drop(name)  # of a storage that has it no more
            return None
        try:
            fault = self._bring(located)
        except FileNotFoundError:
            fault = "a file went while it was fetched"
        if fault is None:
            return located
        self._forget(name)
        self.set_aside(folder, fault)
        return None

    def _bring(self, artifact: Artifact) -> str | None:
        """Make an artifact whole on this machine; what is wrong with the storage's, if anything is."""
        folder, name = artifact.folder, self.mirror.name(artifact.folder)
        if (self.address, name) in _HERE and store.first_fault(folder, artifact.manifest) is None:
            return None
        with self.mirror.alone(name):
            if not _is_whole(artifact):
                fault = self._download(artifact)
                if fault is not None:
                    return fault
        if folder.parent.name == "split":
            self.mirror.pull_file(f"{name}/{MOVED}")
        _HERE.add((self.address, name))
        return None

    def _download(self, artifact: Artifact) -> str | None:
        folder, name = artifact.folder, self.mirror.name(artifact.folder)
        draft = self.root / ".fetched" / uuid.uuid4().hex
        try:
            names = [(e["name"],) for e in artifact.manifest["files"]]
            draft.mkdir(parents=True)
            side_by_side(lambda each: self.remote.get(f"{name}/{each}", draft / each), names)
            fault = store.altered(draft, artifact.manifest)
            if fault is not None:
                return fault
            files.write_json(draft / MANIFEST, artifact.manifest)
            self.mirror.drop(name)
            folder.parent.mkdir(parents=True, exist_ok=True)
            draft.rename(folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        store.remember(folder, artifact.manifest)
        return None

    def set_aside(self, folder: Path, fault: str) -> Path | None:
        """Move the storage's files out of the way, the manifest first: without it there is no artifact."""
        name = self.mirror.name(folder)
        aside = self.root / "damaged" / f"{store.aside_name(folder)}"
        self._forget(name)
        try:
            there = self.remote.list(name)
            for each in sorted(there, key=lambda each: each != MANIFEST):
                self.remote.copy(f"{name}/{each}", f"{self.mirror.name(aside)}/{each}")
                self.remote.delete(f"{name}/{each}")
        except FileNotFoundError:
            return None  # another process was first
        self.mirror.drop(name)
        if there:
            store.warn(folder, fault, self.shown(aside))
        return aside if there else None

    def commit(
        self, stage: Stage, *, seconds: float, made: Path | None = None,
        peaks: Mapping[str, int] | None = None,
    ) -> Artifact:
        """Upload what is not in the storage yet, and the manifest last."""
        name = _name(stage)
        PUBLISHER.forget(self.mirror, self.mirror.name(made) if made else name)
        artifact = super().commit(stage, seconds=seconds, made=made, peaks=peaks)
        self.mirror.push(name)
        self._sign()
        self.mirror.push_file(f"{name}/{MANIFEST}")
        _LOCATED[self.address, name] = artifact.manifest
        _HERE.add((self.address, name))
        return artifact

    def _sign(self) -> None:
        try:
            self.remote.read("store.json")
        except FileNotFoundError:
            self.remote.write("store.json", json.dumps({"format": store.FORMAT}).encode())

    def _forget(self, name: str) -> None:
        _LOCATED.pop((self.address, name), None)
        _HERE.discard((self.address, name))

    # --- unfinished work ---

    def progress(self, stage: Stage) -> dict[str, Any] | None:
        here = super().progress(stage)
        name = self.mirror.name(self.work(stage))
        asked, told = self._told.get(f"{name}/progress", (float("-inf"), None))
        if here is not None or time.monotonic() - asked < FRESH:
            return here or told
        with suppress(OSError, ValueError, StopIteration):
            room = next(each for each in sorted(self.remote.list(name)) if each.endswith(f"/{fence.ENTERED}"))
            told = json.loads(self.remote.read(f"{name}/{room.partition('/')[0]}/progress.json"))
        self._told[f"{name}/progress"] = time.monotonic(), told
        return told

    def has_work(self, stage: Stage) -> bool:
        return bool(self.remote.list(self.mirror.name(self.work(stage))))

    def enter(self, folder: Path) -> Path:
        """As `Store.enter`, with what other machines have published; the storage's room is renamed too."""
        name = self.mirror.name(folder)
        self._drop_unfenced(folder)
        self.mirror.pull(name)
        room = super().enter(folder)
        self.mirror.push(self.mirror.name(room))
        for each in {each.partition("/")[0] for each in self.remote.list(name)} - {room.name}:
            self.remote.delete_below(f"{name}/{each}")
        return room

    def _drop_unfenced(self, folder: Path) -> None:
        """Rooms of this machine that the storage has no more: others have gone on with the build."""
        there = {each.partition("/")[0] for each in self.remote.list(self.mirror.name(folder))}
        for room in folder.glob("*"):
            if room.name not in there:
                self.mirror.drop(self.mirror.name(room))

    def leave(self, room: Path) -> None:
        super().leave(room)
        if not room.exists():
            self.discard(self.mirror.name(room))

    def discard_work(self, stage: Stage) -> None:
        self.discard(self.mirror.name(self.work(stage)))

    def discard(self, name: str) -> None:
        """Remove what is under a name, here and in the storage."""
        PUBLISHER.forget(self.mirror, name)
        self.mirror.drop(name)
        self.remote.delete_below(name)

    @property
    def site(self) -> Any:
        from diffult_ray.site import MirroredSite

        return MirroredSite(self.address, str(self.root))

    # --- leases ---

    def hold(self, names: Mapping[str, Any], tell: Any = None) -> AbstractContextManager[claims.Owner]:
        return claims.hold(self.remote, names, tell)

    def leases_now(self) -> tuple[list[dict[str, Any]], set[str], list[Path]]:
        living, gone = claims.owners(self.remote)
        held = [
            {**facts, "name": name, "pid": owner["pid"]}
            for owner in living for name, facts in owner["leases"].items()
        ]
        return held, {each["name"] for each in held}, [self.root / name for name in gone]

    def tidy_leases(self) -> None:
        claims.tidy(self.remote)

    # --- what else there is ---

    @contextmanager
    def outlined(self) -> Iterator[Store]:
        from diffult_ray.outline import Outline

        with tempfile.TemporaryDirectory(prefix="diffult-outline-") as folder:
            yield Outline(self, Path(folder))

    def tracking_folder(self, sweep: str) -> Path:
        return self.root / "sweeps" / sweep

    def pull(self, path: Path) -> None:
        self.mirror.pull(self.mirror.name(path))

    def push(self, path: Path) -> None:
        name = self.mirror.name(path)
        if path.is_dir():
            self.mirror.push(name)
        elif path.exists():
            self.mirror.push_file(name)
        else:
            self.remote.delete(name)

    def manifests(self, stage: str = "*") -> Iterator[tuple[str, dict[str, Any]]]:
        start = "artifacts/" if stage == "*" else f"artifacts/{stage}/"
        found = [
            (name, stat) for name, stat in self._listing().items()
            if name.startswith(start) and name.endswith(f"/{MANIFEST}")
        ]
        for (name, _), manifest in zip(found, side_by_side(self._readable, found), strict=True):
            if manifest is not None:
                yield name.split("/")[2], manifest

    def read_json(self, stage: Stage, name: str) -> Any:
        with suppress(OSError):
            return super().read_json(stage, name)
        path = f"{_name(stage)}/{name}"
        if path not in self._listing() and (self.address, _name(stage)) not in _LOCATED:
            raise FileNotFoundError(path)
        return json.loads(self.remote.read(path))

    def _readable(self, name: str, stat: Stat) -> dict[str, Any] | None:
        try:
            return self._manifest(name.rpartition("/")[0], stat)
        except (OSError, ValueError):
            return None

    def _manifest(self, name: str, stat: Stat) -> dict[str, Any]:
        """Read once on this machine, for as long as it is the same object."""
        path = self.root / ".manifests" / f"{name.replace('/', '~')}~{stat.bytes}~{stat.time}.json"
        try:
            content = path.read_bytes()
        except OSError:
            content = self.remote.read(f"{name}/{MANIFEST}")
            with suppress(OSError):
                files.write_bytes(path, content)
        return store.manifest_of(content, self.shown(self.root / name / MANIFEST))

    def _listing(self) -> dict[str, Stat]:
        """All that is below `artifacts`, as it was some seconds ago."""
        made, tree = self._tree
        if time.monotonic() - made > FRESH:
            tree = {f"artifacts/{name}": stat for name, stat in self.remote.list("artifacts").items()}
            self._tree = time.monotonic(), tree
        return tree


@lru_cache(maxsize=4)
def reopened(uri: str) -> RemoteStore:
    """In another process, the store of a storage that has been checked; one a process."""
    made = RemoteStore.__new__(RemoteStore)
    made._open(uri)
    return made


def _name(stage: Stage) -> str:
    return f"artifacts/{stage.name}/{stage.key}"


def _missized(manifest: Mapping[str, Any], there: Mapping[str, Stat | None]) -> str | None:
    """As `store.missized`, of a listing."""
    for entry in manifest["files"]:
        found = there.get(entry["name"])
        if found is None:
            return f"{entry['name']} is missing of {entry['bytes']}"
        if found.bytes != entry["bytes"]:
            return f"{entry['name']} has {found.bytes} bytes of {entry['bytes']}"
    return None


def _is_whole(artifact: Artifact) -> bool:
    """Whether the mirror has these very files."""
    try:
        same = files.read_json(artifact.folder / MANIFEST) == artifact.manifest
        return same and store.first_fault(artifact.folder, artifact.manifest) is None
    except (OSError, ValueError):
        return False
