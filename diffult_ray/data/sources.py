"""The sources by name. Each is a module with `open_source(config, faults)` and `identity(config)`."""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType
from typing import Any

from diffult_ray.data import cifar, digits, folder, lists, parquet
from diffult_ray.data.source import Faults, Source

SOURCES: dict[str, ModuleType] = {
    "digits": digits,
    "cifar10": cifar,
    "cifar100": cifar,
    "folder": folder,
    "lists": lists,
    "parquet": parquet,
}


def open_source(config: Any, faults: Faults) -> Source:
    """The data set of a `dataset` section; images that cannot be had by their entry are in `faults`.

    Raises:
        BadInput: for a set that is not there, or whose layout is wrong.
    """
    return SOURCES[config.name].open_source(config, faults)


@lru_cache(maxsize=256)
def identity(config: Any) -> str:
    """A fingerprint of the set's content, without reading an image: checksums, or paths and sizes.

    Looked up once a process and section, since every trial of a sweep asks for it.

    Raises:
        BadInput: if the set is not there.
    """
    return SOURCES[config.name].identity(config)
