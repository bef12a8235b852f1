"""CIFAR-10 and CIFAR-100 from torchvision's official python files.

These are pickles, the only ones that the project ever loads: a file's bytes are read once, their md5 is
compared with torchvision's, and only then are those same bytes unpickled.
"""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffult_ray.data.paths import local_folder
from diffult_ray.data.source import Faults, Records, Source, fingerprint
from diffult_ray.errors import BadInput

if TYPE_CHECKING:
    from torchvision.datasets import CIFAR10


def official(name: str) -> type[CIFAR10]:
    """torchvision's class of a set, which knows its files and their md5."""
    from torchvision import datasets

    return {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]


def _md5s(name: str) -> dict[str, str]:
    """File name -> md5 of every official file; the order is training, test, names."""
    known = official(name)
    files = [*known.train_list, *known.test_list, [known.meta["filename"], known.meta["md5"]]]
    return dict(files)


def identity(config: Any) -> str:
    """Of the official files, so that it needs none of them."""
    return fingerprint(_md5s(config.name).items())


def open_source(config: Any, faults: Faults) -> Source:
    """The official training and test images, in the official order.

    Raises:
        BadInput: if the root or a file is missing, half there or not the official one.
    """
    root, known = _root(config), official(config.name)
    folder = root / known.base_folder
    _check_archive(config, root, folder)
    contents = {name: _content(folder / name, md5) for name, md5 in _md5s(config.name).items()}
    loaded = {name: pickle.loads(content, encoding="latin1") for name, content in contents.items()}
    return Source(
        name=config.name,
        class_names=list(loaded[known.meta["filename"]][known.meta["key"]]),
        parts={
            "train": _records([loaded[name] for name, _ in known.train_list]),
            "test": _records([loaded[name] for name, _ in known.test_list]),
        },
        fingerprint=identity(config),
        root=str(root),
        cut_first=True,
    )


def _records(batches: list[dict[str, Any]]) -> Records:
    pixels = np.concatenate([b["data"] for b in batches]).reshape(-1, 3, 32, 32)
    labels = [b["labels"] if "labels" in b else b["fine_labels"] for b in batches]
    return Records(np.concatenate(labels).astype(np.int64), pixels=pixels)


def _root(config: Any) -> Path:
    if config.download:
        root = Path(config.root).expanduser().absolute()
        _download(config.name, root)
        return root
    return local_folder(config.root)


def _download(name: str, root: Path) -> None:
    """torchvision fetches the archive unless the files are there, and checks its md5 before unpacking."""
    known = official(name)
    try:
        known(root, train=False, download=True)
    except (OSError, RuntimeError, EOFError) as error:
        raise BadInput(
            where="dataset.download",
            rule=f"{known.url} could not be fetched to {root}: {error}",
            advice="try again, or put the archive there by hand",
        ) from error


def _check_archive(config: Any, root: Path, folder: Path) -> None:
    """Say what is wrong where the folder is missing: no data, an archive not unpacked, or half of one."""
    if folder.is_dir():
        return
    known, archive = official(config.name), root / official(config.name).filename
    if not archive.exists():
        raise BadInput(
            where="dataset.root",
            rule=f"holds neither {known.base_folder}/ nor {known.filename}",
            value=str(root),
            advice="give torchvision's root, or set dataset.download: true",
        )
    with open(archive, "rb") as file:
        whole = hashlib.file_digest(file, "md5").hexdigest() == known.tgz_md5
    raise BadInput(
        where=str(archive),
        rule="is whole but not unpacked" if whole else
             f"is half downloaded or changed: {archive.stat().st_size} bytes, md5 is not {known.tgz_md5}",
        advice=f"tar -xzf it in {root}" if whole else "remove it, and set dataset.download: true",
    )


def _content(path: Path, md5: str) -> bytes:
    """The bytes of an official file.

    Raises:
        BadInput: if it is missing, or its md5 is not the official one.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BadInput(
            where=str(path), rule=f"cannot be read: {error.strerror}",
            advice="unpack the official archive again, or set dataset.download: true",
        ) from error
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != md5:
        raise BadInput(
            where=str(path), rule=f"has the md5 of the official file, {md5}", value=found,
            advice="it is damaged or another's, and is not opened: unpack the official archive again",
        )
    return content
