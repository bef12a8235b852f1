"""A folder of images: `train/<class>/*`, and `val|validation/<class>/*` and `test/<class>/*` if there are."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from diffult_ray.data.decode import SUFFIXES
from diffult_ray.data.paths import local_folder, outside
from diffult_ray.data.source import Faults, Records, Source, fingerprint, some
from diffult_ray.errors import BadInput

FOLDERS = {"train": ("train",), "validation": ("val", "validation"), "test": ("test",)}


def identity(config: Any) -> str:
    """Of the relative paths and sizes of all files."""
    root = local_folder(config.root)
    folders = part_folders(root).values()
    return fingerprint((path, size) for folder in folders for path, size in _files(root, folder))


def open_source(config: Any, faults: Faults) -> Source:
    """The images by reference; classes are the training folder's subfolders, sorted by name.

    Raises:
        BadInput: for a missing or empty folder, or a class that only another part has.
    """
    root = local_folder(config.root)
    folders = part_folders(root)
    classes = {part: _classes(root, folder) for part, folder in folders.items()}
    names = classes["train"]
    for part, others in classes.items():
        _check_known(set(others) - set(names), part, root)
    return Source(
        name="folder",
        class_names=names,
        parts={part: _records(root, folder, names, faults) for part, folder in folders.items()},
        fingerprint=identity(config),
        root=str(root),
    )


def part_folders(root: Path) -> dict[str, str]:
    """Part -> its folder's name, of those that are there.

    Raises:
        BadInput: if there is no training folder, or validation twice.
    """
    there = {part: [n for n in names if (root / n).is_dir()] for part, names in FOLDERS.items()}
    if not there["train"]:
        raise BadInput(
            where="dataset.root", rule="has a folder train/ with one subfolder a class", value=str(root),
            advice="move the images to train/<class>/",
        )
    if len(there["validation"]) > 1:
        raise BadInput(where=str(root), rule="has val/ and validation/", advice="rename one of them")
    return {part: found[0] for part, found in there.items() if found}


def _classes(root: Path, folder: str) -> list[str]:
    names = sorted(e.name for e in os.scandir(root / folder) if e.is_dir() and not e.name.startswith("."))
    if not names:
        raise BadInput(
            where=str(root / folder), rule="is empty: it has no subfolder, one of which is a class",
            advice=f"move the images to {folder}/<class>/",
        )
    return names


def _check_known(unknown: set[str], part: str, root: Path) -> None:
    if unknown:
        raise BadInput(
            where=str(root),
            rule=f"{len(unknown)} classes of {part} that training lacks: {some(sorted(unknown), ', ')}",
            advice="add training images of them, or take the classes out",
        )


def _files(root: Path, folder: str) -> Iterator[tuple[str, int]]:
    """(path relative to root, bytes) of every file under a folder that is not hidden, sorted by path."""
    found = []
    for where, folders, names in os.walk(root / folder):
        folders[:] = [f for f in folders if not f.startswith(".")]
        inside = os.path.relpath(where, root)
        found += [f"{inside}/{n}" for n in [*names, *_links(where, folders)] if not n.startswith(".")]
    for path in sorted(found):
        yield path, _size(root / path)


def _links(where: str, folders: list[str]) -> list[str]:
    """Folders that are links: not walked, so that no loop or foreign folder is entered, but told of."""
    return [f for f in folders if os.path.islink(os.path.join(where, f))]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _records(root: Path, folder: str, names: list[str], faults: Faults) -> Records:
    labels = {name: label for label, name in enumerate(names)}
    kept: list[tuple[str, int]] = []
    for path, _ in _files(root, folder):
        fault = _fault(root, path)
        if fault:
            faults.add(path, fault)
        else:
            kept.append((path, labels[path.split("/")[1]]))
    return references(kept)


def _fault(root: Path, path: str) -> str | None:
    if not path.lower().endswith(SUFFIXES):
        if (root / path).is_dir():
            return "is a link to a folder: put the folder itself there"
        return f"is none of {', '.join(SUFFIXES)}"
    if path.count("/") < 2:
        return "is in no class's folder"
    if not path.isprintable():
        return "has a name that is not printable text"
    return outside(str(root), path)


def references(rows: list[tuple[str, int]]) -> Records:
    """Records of (path, label) pairs whose files are the images."""
    return Records(
        labels=np.array([label for _, label in rows], dtype=np.int64),
        paths=np.array([path for path, _ in rows], dtype=object),
        rows=np.full(len(rows), -1, dtype=np.int64),
    )
