"""Parquet files with a column of encoded images and one of labels, local or on object storage."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np

from diffult_ray.data.encoded import open_parquet
from diffult_ray.data.paths import file_system
from diffult_ray.data.source import Faults, Records, Source, fingerprint, some
from diffult_ray.errors import BadInput, said

PART = re.compile(r"(train|val|validation|test)(?![A-Za-z0-9])")
NAMES = {"val": "validation"}


def identity(config: Any) -> str:
    """Of the relative paths and sizes of the files."""
    return fingerprint(_files(config.root).items())


def open_source(config: Any, faults: Faults) -> Source:
    """Rows by reference. A file's part is the word train, val, validation or test that begins its name
    or its folder's (Hugging Face's layout); if no file has one, all are training.

    Raises:
        BadInput: for a root without parquet files, a broken file, or a column that is missing or of another
            type.
    """
    files = _files(config.root)
    parts = _parts(list(files), config.root)
    names = _class_names(config, parts["train"][0])
    most = 2**20 if names is None else len(names)
    records = {part: _records(config, paths, most, faults) for part, paths in parts.items()}
    labels = [int(r.labels.max(initial=-1)) for r in records.values()]
    return Source(
        name="parquet",
        class_names=names or [str(c) for c in range(max(labels) + 1)],
        parts=records,
        fingerprint=identity(config),
        root=absolute(config.root),
        column=config.columns.image,
    )


def absolute(root: str) -> str:
    """A local root as an absolute path; a URI as it is."""
    return root if "://" in root else file_system(root)[1]


def _files(root: str) -> dict[str, int]:
    """Path relative to the root (empty for a root that is a file) -> bytes."""
    from pyarrow import ArrowException, fs

    system, base = file_system(root)
    try:
        info = system.get_file_info(base)
        if info.type == fs.FileType.File:
            return {"": info.size}
        inside = system.get_file_info(fs.FileSelector(base, recursive=True))
    except (OSError, ArrowException) as error:
        raise BadInput(where="dataset.root", rule=f"cannot be read: {said(error)}", value=root) from error
    found = {i.path[len(base) :].lstrip("/"): i.size for i in inside if i.type == fs.FileType.File}
    found = {path: size for path, size in sorted(found.items()) if path.endswith(".parquet")}
    if not found:
        raise BadInput(where="dataset.root", rule="has no .parquet file", value=root)
    return found


def part_of(path: str) -> str | None:
    """The part that a path belongs to by its words.

    >>> part_of("data/train-00000-of-00002.parquet"), part_of("val/0.parquet"), part_of("a.parquet")
    ('train', 'validation', None)
    """
    for word in path.split("/"):
        found = PART.match(word)
        if found:
            return NAMES.get(found[1], found[1])
    return None


def _parts(paths: list[str], root: str) -> dict[str, list[str]]:
    named = {path: part_of(path) for path in paths}
    if not any(named.values()):
        return {"train": paths}
    lost = [path for path, part in named.items() if part is None]
    if lost:
        raise BadInput(
            where="dataset.root", rule=f"files of no part: {some(lost)}",
            advice="begin their names or folders with train, val or test",
        )
    parts = {part: [p for p in paths if named[p] == part] for part in ("train", "validation", "test")}
    if not parts["train"]:
        raise BadInput(where="dataset.root", rule="has a file whose name begins with train", value=root)
    return {part: found for part, found in parts.items() if found}


def _open(config: Any, path: str) -> Any:
    """A file whose two columns are there and of the right types."""
    try:
        file = open_parquet(config.root, path)
    except (OSError, ValueError) as error:
        raise BadInput(
            where=path or config.root, rule=f"is not a readable parquet file: {error}",
            advice="download or write it again",
        ) from error
    for column, check, kind in (
        (config.columns.image, _holds_images, "binary or a struct with binary `bytes`"),
        (config.columns.label, _holds_numbers, "whole numbers"),
    ):
        _check_column(file.schema_arrow, column, check, kind, path or config.root)
    return file


def _check_column(schema: Any, column: str, check: Any, kind: str, where: str) -> None:
    if column not in schema.names:
        raise BadInput(
            where=where, rule=f"has no column {column!r}, only {some(schema.names, ', ')}",
            advice="set dataset.columns.image and dataset.columns.label",
        )
    if not check(schema.field(column).type):
        raise BadInput(
            where=where, rule=f"column {column!r} holds {kind}", value=str(schema.field(column).type),
            advice="set dataset.columns, or convert the column",
        )


def _holds_images(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _holds_images(kind.field("bytes").type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _holds_numbers(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_integer(kind)


def _class_names(config: Any, path: str) -> list[str] | None:
    """The names in Hugging Face's note about the label column, if the file has one."""
    metadata = _open(config, path).schema_arrow.metadata or {}
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        names = features[config.columns.label]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return [str(name) for name in names]


def _records(config: Any, paths: list[str], most: int, faults: Faults) -> Records:
    parts = [_file_records(config, path, most, faults) for path in paths]
    return Records(
        labels=np.concatenate([p.labels for p in parts]),
        paths=np.concatenate([p.paths for p in parts]),
        rows=np.concatenate([p.rows for p in parts]),
    )


def _file_records(config: Any, path: str, most: int, faults: Faults) -> Records:
    column = _open(config, path).read(columns=[config.columns.label]).column(0)
    missing = column.is_null().to_numpy()
    labels = column.fill_null(-1).to_numpy().astype(np.int64)
    for row in np.flatnonzero((labels < 0) | (labels >= most)):
        rule = "has no label" if missing[row] else f"has a label outside 0..{most - 1}: {labels[row]}"
        faults.add(f"{path or config.root} row {row}", rule)
    kept = np.flatnonzero((labels >= 0) & (labels < most))
    return Records(labels[kept], paths=np.full(len(kept), path, dtype=object), rows=kept.astype(np.int64))
