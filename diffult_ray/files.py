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


@contextmanager
def _whole(path: str | Path) -> Iterator[Path]:
    """A temporary path that becomes `path`, in whose folder it is, once it is written."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file whole or not at all, creating its folder."""
    with _whole(path) as temporary:
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


def write_json(path: str | Path, value: Any) -> None:
    """JSON with sorted keys, so that equal values are equal files."""
    write_bytes(path, json.dumps(value, sort_keys=True, indent=1).encode())


def read_json(path: str | Path) -> Any:
    return json.loads(Path(path).read_bytes())


def write_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Tensors as safetensors, on the CPU and contiguous."""
    write_packed(path, packed(tensors))


def packed(tensors: Mapping[str, torch.Tensor], numbers: Any = None) -> dict[str, torch.Tensor]:
    """Copies on the CPU, contiguous, and what is JSON as one more: for `write_packed`, perhaps later."""
    import torch

    copies = {
        name: torch.empty(each.shape, dtype=each.dtype, device="cpu").copy_(each.detach())
        for name, each in tensors.items()
    }
    if numbers is not None:
        copies["__json__"] = torch.frombuffer(bytearray(json.dumps(numbers).encode()), dtype=torch.uint8)
    return copies


def write_packed(path: str | Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """What `packed` returned, as safetensors; other threads go on meanwhile."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with _whole(path) as temporary:
        try:
            save_file(dict(tensors), temporary)
        except SafetensorError as error:  # it is the system's error, but for its kind
            number = re.search(r"\(os error (\d+)\)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def read_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load

    return load(Path(path).read_bytes())


def write_state(path: str | Path, tensors: Mapping[str, torch.Tensor], numbers: Any) -> None:
    """Tensors and JSON in one file, so that the two are never of different moments."""
    write_packed(path, packed(tensors, numbers))


def read_state(path: str | Path) -> tuple[dict[str, torch.Tensor], Any]:
    """What `write_state` wrote."""
    tensors = read_tensors(path)
    return tensors, json.loads(tensors.pop("__json__").numpy().tobytes())
