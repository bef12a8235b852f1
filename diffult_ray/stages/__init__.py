"""The stages: the only rooms that know both Ray and the method.

A stage is a function of orders and resources. Several orders come together where they share a start:
generators of which the shorter are prefixes of the longest, or pools that one pipeline makes.
It writes whole files into each order's output folder, `summary.json` last, and keeps in the work
folder what an interrupted build goes on from. It does not know where it is stored or why.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Site:
    """How a worker comes to the folders of an order, whichever machine it runs on.

    This one is for folders that all machines see. Of another kind, folders are named as the driver sees
    them, and each machine has its own; what one writes is seen by others when it is published.
    """

    @property
    def is_shared(self) -> bool:
        """Whether a path is the same file everywhere."""
        return True

    def here(self, path: str | Path) -> Path:
        """What this machine calls the path."""
        return Path(path)

    def fetch(self, path: str | Path) -> Path:
        """The same, with what has been published under it."""
        return Path(path)

    def publish(self, path: str | Path) -> None:
        """Let other machines see a file or folder."""

    def publish_soon(self, path: str | Path) -> None:
        """The same, by and by, while this process goes on."""

    def remove(self, path: str | Path) -> None:
        """Remove a folder, here and where it was published."""
        shutil.rmtree(path, ignore_errors=True)

    def settle(self) -> None:
        """Wait until all is published."""

    def moved(self) -> Site:
        """For paths as this machine calls them."""
        return self

    def storage(self, path: str | Path) -> tuple[str, Any]:
        """A folder for libraries that read and write storage themselves: path and Arrow file system."""
        return str(path), None


SHARED = Site()


@dataclass(frozen=True)
class Order:
    """One artifact to make: its section of the configuration, its inputs' folders, where it goes.

    Folders are as the driver sees them; a worker asks the site for its own.
    """

    config: Mapping[str, Any]
    inputs: Mapping[str, Path]
    out: Path
    work: Path
    site: Site = SHARED
