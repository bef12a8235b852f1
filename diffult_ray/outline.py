"""What a remote store holds, in a temporary folder: small files as they are, of others no more than the size.

The storekeeper's commands look at it as at any folder; what they read whole, or remove, is the storage's.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffult_ray.remote import PIECE, side_by_side
from diffult_ray.store import MANIFEST, Store

if TYPE_CHECKING:
    from diffult_ray.remotestore import RemoteStore

TOLD = ("sweep.yaml", "stages.json", MANIFEST)  # what is read of a sweep and of an artifact, beside trials


class Outline(Store):
    """The outline of a remote store at this moment."""

    def __init__(self, of: RemoteStore, root: Path) -> None:
        self.of, self.root = of, root
        found = of.remote.list()
        small = [name for name in found if _is_told(name)]
        side_by_side(lambda name: of.remote.get(name, root / name), [(name,) for name in small])
        for name in set(found) - set(small):
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as file:
                file.truncate(found[name].bytes)  # takes no room on the disk

    def shown(self, path: Path) -> str:
        return self.of.shown(self.of.root / path.relative_to(self.root))

    def altered(self, folder: Path, manifest: dict[str, Any]) -> str | None:
        """Every file is read from the storage."""
        name = folder.relative_to(self.root).as_posix()
        for entry in manifest["files"]:
            if self._digest(f"{name}/{entry['name']}") != entry["sha256"]:
                return f"{entry['name']} has another checksum"
        return None

    def _digest(self, name: str) -> str:
        digest, remote = hashlib.sha256(), self.of.remote
        with remote.system.open_input_stream(remote.path(name)) as file:
            while piece := file.read(PIECE):
                digest.update(piece)
        return digest.hexdigest()

    def remove(self, path: Path) -> None:
        name = path.relative_to(self.root).as_posix()
        if path.is_file():
            self.of.remote.delete(name)
        else:
            self.of.remote.delete(f"{name}/{MANIFEST}")
            self.of.remote.delete_below(name)
        super().remove(path)

    def leases_now(self) -> tuple[list[dict[str, Any]], set[str], list[Path]]:
        living, names, gone = self.of.leases_now()
        return living, names, [self.root / path.relative_to(self.of.root) for path in gone]


def _is_told(name: str) -> bool:
    parts = name.split("/")
    return parts[-1] in TOLD or (parts[0] == "sweeps" and parts[-2] == "trials" and name.endswith(".json"))
