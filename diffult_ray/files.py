"""Whole files in folders: written under a temporary name and renamed, so that none is ever half there."""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PAGE = 4096  # bytes; of memory, and a multiple of any disk's blocks
AT_ONCE = 64 << 20  # bytes


@contextmanager
def _whole(path: str | Path, *, lasting: bool = True) -> Iterator[Path]:
    """A temporary path that becomes `path`, in whose folder it is, once it is written.

    Args:
        lasting: whether it has to outlive the machine, for which the disk is waited for.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        if lasting:
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: str | Path, content: bytes, *, lasting: bool = True) -> None:
    """Write a file whole or not at all, creating its folder."""
    with _whole(path, lasting=lasting) as temporary:
        temporary.write_bytes(content)


def remove_temporary(folder: Path, pattern: str = "**/.*.tmp") -> None:
    """Remove what killed writers have left in a folder in which nobody writes at this moment."""
    for path in list(folder.glob(pattern)):
        path.unlink(missing_ok=True)


def missing(folder: str | Path) -> list[Path]:
    """A folder and those above it, as far as they do not exist; deepest first."""
    folder = Path(folder)
    return [p for p in (folder, *folder.parents) if not p.exists()]


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove folders, but for those in which there is something by now."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def write_json(path: str | Path, value: Any, *, lasting: bool = True) -> None:
    """JSON with sorted keys, so that equal values are equal files."""
    write_bytes(path, json.dumps(value, sort_keys=True, indent=1).encode(), lasting=lasting)


def read_json(path: str | Path) -> Any:
    return json.loads(Path(path).read_bytes())


def write_pages(path: str | Path, pages: memoryview, size: int) -> None:
    """Write the first bytes of aligned memory, past the kernel's page cache where the file system can.

    Args:
        pages: [multiple of `PAGE`] bytes, at an address that is one, too; written to without the GIL.
        size: of the file.
    """
    with _whole(path) as temporary:
        try:
            _write(temporary, pages, getattr(os, "O_DIRECT", 0))
        except OSError:  # each file system has its own way to refuse that; anything else comes again
            _write(temporary, pages[:size], 0)
        os.truncate(temporary, size)


def _write(path: Path, content: memoryview, flags: int) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | flags, 0o666)
    try:
        while content:
            content = content[os.write(file, content[:AT_ONCE]) :]
    finally:
        os.close(file)


def write_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Tensors as safetensors, on the CPU and contiguous."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    copies = {
        name: each.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, each in tensors.items()
    }
    with _whole(path) as temporary:
        try:
            save_file(copies, temporary)
        except SafetensorError as error:  # it is the system's error, but for its kind
            number = re.search(r"\(os error (\d+)\)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def read_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load

    return load(Path(path).read_bytes())


def read_state(path: str | Path) -> tuple[dict[str, torch.Tensor], Any]:
    """Tensors and numbers of a `Snapshot`, which are in one file so as to be of one moment."""
    tensors = read_tensors(path)
    return tensors, json.loads(tensors.pop("__json__").numpy().tobytes())
