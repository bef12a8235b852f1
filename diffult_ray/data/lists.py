"""List files, `relative/path label` a line, as of ImageNet-LT, Places-LT and iNaturalist-2018."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from diffult_ray.data.folder import references
from diffult_ray.data.paths import local_folder, outside
from diffult_ray.data.source import Faults, Records, Source, fingerprint
from diffult_ray.errors import BadInput

PARTS = ("train", "validation", "test")
MAX_LABEL = 2**20  # above any data set's classes; a larger number is a slip

Lines = list[tuple[int, str, str | None]]  # line number, path, label as written


def identity(config: Any) -> str:
    """Of the list files' content, and the sizes of the files that they name."""
    root = local_folder(config.root)
    listed = _list_files(config, root)
    named = {path for file in listed.values() for _, path, _ in _lines(file)}
    inside = [path for path in sorted(named) if not outside(str(root), path)]
    with ThreadPoolExecutor(16) as pool:
        sizes = list(pool.map(lambda path: _size(root / path), inside))
    lists = [(f"list {part}", hashlib.sha256(file.read_bytes()).hexdigest()) for part, file in listed.items()]
    return fingerprint([*lists, *zip(inside, sizes, strict=True)])


def open_source(config: Any, faults: Faults) -> Source:
    """The images by reference; labels count from 0 and training has all of them.

    Raises:
        BadInput: for a list that is missing, outside of the root, not text or empty.
    """
    root = local_folder(config.root)
    listed = _list_files(config, root)
    names = _names(config, root)
    most = MAX_LABEL if names is None else len(names)
    parts = {part: _records(root, file, most, faults) for part, file in listed.items()}
    if not len(parts["train"]):
        raise BadInput(where=str(listed["train"]), rule="names no training image", advice="check the list")
    classes = max(int(p.labels.max(initial=0)) for p in parts.values()) + 1
    return Source(
        name="lists",
        class_names=names or [str(c) for c in range(classes)],
        parts=parts,
        fingerprint=identity(config),
        root=str(root),
    )


def _list_files(config: Any, root: Path) -> dict[str, Path]:
    given = {part: getattr(config.lists, part) for part in PARTS}
    return {part: _inside(root, name, f"dataset.lists.{part}") for part, name in given.items() if name}


def _inside(root: Path, name: str, where: str) -> Path:
    away = outside(str(root), name)
    if away or not (root / name).is_file():
        raise BadInput(
            where=where,
            rule=f"is a file under dataset.root: it {away}" if away else f"no such file in {root}",
            value=name, advice="give its path relative to dataset.root",
        )
    return root / name


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(where=str(file), rule=f"is not a readable UTF-8 text file: {error}") from error


def _lines(file: Path) -> Lines:
    """Line number, path and label of every line that is not blank."""
    found: Lines = []
    for number, line in enumerate(_text(file).splitlines(), 1):
        words = line.strip().rsplit(maxsplit=1)
        if words:
            found.append((number, words[0], words[1] if len(words) > 1 else None))
    return found


def _names(config: Any, root: Path) -> list[str] | None:
    if config.lists.names is None:
        return None
    file = _inside(root, config.lists.names, "dataset.lists.names")
    return [line.strip() for line in _text(file).splitlines() if line.strip()]


def _records(root: Path, file: Path, most: int, faults: Faults) -> Records:
    kept = []
    for number, path, label in _lines(file):
        fault = _label_fault(label, most) or outside(str(root), path)
        if fault:
            faults.add(f"{file.name} line {number}, {path},", fault)
        else:
            kept.append((path, int(label)))
    return references(kept)


def _label_fault(label: str | None, most: int) -> str | None:
    if label is None:
        return "has no label"
    if not label.lstrip("+-").isascii() or not label.lstrip("+-").isdigit():
        return f"has a label that is not a whole number: {label!r}"
    if len(label) > 18 or not 0 <= int(label) < most:
        return f"has a label outside 0..{most - 1}: {label}"
    return None


def _size(path: Path) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1

