"""Encoded images by reference: files, and rows of parquet files on any file system of pyarrow."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffult_ray.data.paths import file_system

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

FILES_AT_ONCE = 64  # so that photographs of 10 MB stay under a gigabyte
ROWS_AT_ONCE = 64
READERS = 8  # threads: reading waits for a disk or a network more than for a processor


class NoImage(ValueError):
    """A row of a parquet file whose image is null."""


Encoded = bytes | OSError | ValueError


def read_bytes(root: str, paths: np.ndarray, rows: np.ndarray, *, column: str = "image") -> list[bytes]:
    """The encoded images of references, in their order; each row group of a parquet file is read once.

    Args:
        root: what `paths` [n] are relative to.
        rows: [n], -1 where the file itself is the image.

    Raises:
        OSError: for a file that cannot be read.
        ValueError: for a row that is not there or has no image.
    """
    found: list[bytes] = [b""] * len(paths)
    for index, contents in iter_bytes(root, paths, rows, column=column):
        for i, content in zip(index, contents, strict=True):
            if isinstance(content, Exception):
                raise content
            found[i] = content
    return found


def iter_bytes(
    root: str, paths: np.ndarray, rows: np.ndarray, *, column: str = "image"
) -> Iterator[tuple[np.ndarray, list[Encoded]]]:
    """(positions, encoded images) in bounded batches, files first, then one parquet file after another.

    An image that cannot be read has its exception in its place.
    """
    rows = np.asarray(rows)
    yield from _iter_files(root, paths, np.flatnonzero(rows < 0))
    by_file: dict[str, list[int]] = {}
    for i in np.flatnonzero(rows >= 0).tolist():
        by_file.setdefault(paths[i], []).append(i)
    for path, mine in by_file.items():
        yield from _iter_rows(root, path, np.array(mine), rows[mine], column)


def _iter_files(
    root: str, paths: np.ndarray, index: np.ndarray
) -> Iterator[tuple[np.ndarray, list[Encoded]]]:
    with ThreadPoolExecutor(READERS) as pool:
        for first in range(0, len(index), FILES_AT_ONCE):
            part = index[first : first + FILES_AT_ONCE]
            yield part, list(pool.map(lambda path: _read_file(root, path), paths[part]))


def _read_file(root: str, path: str) -> Encoded:
    try:
        return (Path(root) / path).read_bytes()
    except OSError as error:
        return error


# --- parquet ------------------------------------------------------------------------------------


def open_parquet(root: str, path: str) -> pq.ParquetFile:
    """A parquet file under a root; `path` is empty where the root is the file.

    Raises:
        OSError: if it cannot be read.
        pyarrow.ArrowInvalid: (a ValueError) if it is no parquet file.
    """
    import pyarrow.parquet as pq

    system, base = file_system(root)
    return pq.ParquetFile(f"{base}/{path}" if path else base, filesystem=system, memory_map=False)


def image_bytes(values: pa.Array) -> list[bytes | None]:
    """Encoded images of a column: binary, or Hugging Face's struct of bytes and path."""
    import pyarrow as pa

    if pa.types.is_struct(values.type):
        values = values.field("bytes") if not values.null_count else values.flatten()[0]
    return values.to_pylist()


def _iter_rows(
    root: str, path: str, index: np.ndarray, rows: np.ndarray, column: str
) -> Iterator[tuple[np.ndarray, list[Encoded]]]:
    """The wanted rows of one file, by batches of the row groups that hold any."""
    order = np.argsort(rows, kind="stable")
    index, rows = index[order], rows[order]
    try:
        for first, values in _batches(open_parquet(root, path), rows, column):
            low, high = np.searchsorted(rows, [first, first + len(values)])
            if high > low:
                mine = rows[low:high]
                wanted = image_bytes(values.take(mine - first))
                yield index[low:high], [_there(w, path, r) for w, r in zip(wanted, mine, strict=True)]
    except (OSError, ValueError) as error:
        yield index, [error] * len(index)


def _there(content: bytes | None, path: str, row: int) -> Encoded:
    return NoImage(f"{path} row {row} has no image") if content is None else content


def _batches(file: Any, rows: np.ndarray, column: str) -> Iterator[tuple[int, pa.Array]]:
    """(first row, values) of the row groups that hold one of `rows`, each group read once."""
    sizes = [file.metadata.row_group(g).num_rows for g in range(file.metadata.num_row_groups)]
    ends = np.cumsum(sizes)
    if len(rows) and (not len(ends) or rows[-1] >= ends[-1]):
        raise ValueError(f"row {rows[-1]} is beyond the file's {ends[-1] if len(ends) else 0} rows")
    for group in np.unique(np.searchsorted(ends, rows, side="right")):
        first = int(ends[group] - sizes[group])
        for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, row_groups=[int(group)], columns=[column]):
            yield first, batch.column(0)
            first += batch.num_rows
