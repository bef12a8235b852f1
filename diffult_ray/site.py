"""The folders of a remote store on each machine that works for an order."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from diffult_ray.mirror import PUBLISHER
from diffult_ray.remotestore import RemoteStore, reopened
from diffult_ray.stages import Site


@dataclass(frozen=True)
class MirroredSite(Site):
    """Paths below the mirror of one machine, wherever they are asked for.

    Args:
        uri: of the storage; it may hold a secret.
        root: the mirror in which the paths are.
    """

    uri: str = field(repr=False)
    root: str

    @property
    def is_shared(self) -> bool:
        return False

    @property
    def _store(self) -> RemoteStore:
        return reopened(self.uri)

    def _name(self, path: str | Path) -> str:
        return Path(path).relative_to(self.root).as_posix()

    def here(self, path: str | Path) -> Path:
        return self._store.root / self._name(path)

    def fetch(self, path: str | Path) -> Path:
        """An artifact whole and compared with its manifest; what is no artifact yet as it was published.

        Raises:
            FileNotFoundError: for an artifact that is damaged.
        """
        name = self._name(path)
        if name.startswith("artifacts/") and self._store.fetch(name):
            return self.here(path)
        mirror = self._store.mirror
        if Path(name).suffix:
            mirror.pull_file(name)
        else:
            mirror.pull(name)
        return self.here(path)

    def publish(self, path: str | Path) -> None:
        self._store.push(self.here(path))

    def publish_soon(self, path: str | Path) -> None:
        PUBLISHER.soon(self._store.mirror, self._name(path))

    def remove(self, path: str | Path) -> None:
        self._store.discard(self._name(path))

    def settle(self) -> None:
        PUBLISHER.settle()

    def moved(self) -> Site:
        return replace(self, root=str(self._store.root))

    def storage(self, path: str | Path) -> tuple[str, Any]:
        remote = self._store.remote
        return remote.path(self._name(path)), remote.system
