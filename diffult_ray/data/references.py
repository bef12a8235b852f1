"""Encoded images by reference, and packed files of them that are read at random.

A reference is a path and a row: row -1 is an image file under the root, another one a row of a packed
file (Arrow IPC, uncompressed, one column of bytes), which a memory map opens in no time. Rows of
parquet files are packed once, since parquet is read by the row group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

COLUMN = "image"


@dataclass(frozen=True)
class References:
    """Where n encoded images are, and the shape they are decoded to.

    Args:
        root: what relative paths are relative to.
        paths: [n] pyarrow strings, of image files or packed files.
        rows: [n] int64, -1 for an image file, else the row of a packed one.
        channels: 1 or 3.
        image_size: side of the square image, pixels.
    """

    root: str
    paths: pa.Array
    rows: np.ndarray
    channels: int
    image_size: int

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.channels, self.image_size, self.image_size)

    def take(self, index: np.ndarray) -> References:
        """The references at `index`, in its order."""
        import pyarrow as pa

        return replace(self, paths=self.paths.take(pa.array(index)), rows=self.rows[index])

    def join(self, other: References) -> References:
        """These, then the others, whose paths are absolute or relative to the same root."""
        import pyarrow as pa

        paths = pa.concat_arrays([self.paths, other.paths])
        return replace(self, paths=paths, rows=np.concatenate([self.rows, other.rows]))

    def moved(self, place: Callable[[str], str]) -> References:
        """The same images, where packed files lie elsewhere."""
        import pyarrow as pa

        packs = self.paths.filter(pa.array(self.rows >= 0)).unique().to_pylist()
        there = {path: place(path) for path in packs}
        paths = [there[path] if row >= 0 else path
                 for path, row in zip(self.paths.to_pylist(), self.rows.tolist(), strict=True)]
        return replace(self, paths=pa.array(paths, pa.string()))

    def read(self) -> Iterator[bytes]:
        """The encoded images, one after another.

        Raises:
            OSError: for a file that cannot be read.
        """
        for path, row in zip(self.paths.to_pylist(), self.rows.tolist(), strict=True):
            if row < 0:
                with open(f"{self.root}/{path}", "rb") as file:
                    yield file.read()
            else:
                yield read_packed(Path(self.root) / path, row)


def packed(path: Path, n: int, *, channels: int, image_size: int) -> References:
    """References to all n images of a packed file."""
    import pyarrow as pa

    return References("/", pa.array([str(path)] * n, pa.string()), np.arange(n), channels, image_size)


def pack(path: Path, contents: Iterable[list[bytes]]) -> None:
    """Write encoded images, in batches, as a packed file; whole or not at all."""
    import pyarrow as pa

    schema = pa.schema([(COLUMN, pa.large_binary())])
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for content in contents:
                writer.write_batch(pa.record_batch([pa.array(content, pa.large_binary())], schema=schema))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_packed(path: Path, row: int) -> bytes:
    """The encoded image of one row."""
    ends, batches = _open_packed(str(path))
    batch = int(np.searchsorted(ends, row, side="right"))
    first = int(ends[batch - 1]) if batch else 0
    return batches[batch].column(0)[row - first].as_py()


@lru_cache(maxsize=8)
def _open_packed(path: str) -> tuple[np.ndarray, list[Any]]:
    import pyarrow as pa

    table = pa.ipc.open_file(pa.memory_map(path)).read_all()
    batches = table.to_batches()
    return np.cumsum([len(batch) for batch in batches]), batches
