"""A training's state in memory, laid out as the safetensors file that it becomes.

The memory is kept from one snapshot to the next and written past the kernel's page cache. On a virtual
machine whose host takes unused memory back, 0.6 GB of new memory take 0.2 seconds of processor time, as many
new pages of that cache 0.7, and to copy into what is kept and to write it directly 0.05.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Mapping
from contextlib import suppress
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffult_ray import files

if TYPE_CHECKING:
    import torch

NUMBERS = "__json__"
KINDS = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip


class Snapshot:
    """Of one moment at a time, on the CPU, in the format of https://github.com/huggingface/safetensors."""

    def __init__(self) -> None:
        self._memory: mmap.mmap | None = None  # whole pages
        self._size = 0

    def take(self, tensors: Mapping[str, torch.Tensor], numbers: Any) -> Snapshot:
        """Copy tensors of any device, layout and shape, and what is JSON; in place of what was taken before.

        Raises:
            KeyError: for a type of numbers that is not in `KINDS`.
        """
        import torch

        said = torch.frombuffer(bytearray(json.dumps(numbers).encode()), dtype=torch.uint8)
        # The largest numbers first, so that each is at a multiple of its size.
        order = sorted({**tensors, NUMBERS: said}.items(), key=lambda item: -item[1].element_size())
        ends = list(accumulate((each.nbytes for _, each in order), initial=0))
        head = _head(order, ends)
        self._size = len(head) + ends[-1]
        whole = self._room(self._size)
        whole[: len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
        for (_, each), (start, end) in zip(order, pairwise(ends), strict=True):
            place = whole[len(head) + start : len(head) + end]
            place.view(each.dtype).view(each.shape).copy_(each.detach())
        return self

    def write(self, path: str | Path) -> None:
        """Whole or not at all; other threads go on meanwhile. Raises OSError."""
        files.write_pages(path, memoryview(self._memory), self._size)

    def _room(self, size: int) -> torch.Tensor:
        import torch

        pages = math.ceil(size / files.PAGE) * files.PAGE
        if self._memory is None or len(self._memory) != pages:
            self._memory = None  # before there is another
            self._memory = mmap.mmap(-1, pages, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with suppress(AttributeError, OSError):  # not on each system
                self._memory.madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(self._memory, dtype=torch.uint8)


def _head(order: list[tuple[str, torch.Tensor]], ends: list[int]) -> bytes:
    """The length of what follows, and the type, shape and place of each; a multiple of 8 bytes."""
    listed = {
        name: {
            "dtype": KINDS[str(each.dtype).partition(".")[2]],
            "shape": list(each.shape),
            "data_offsets": list(span),
        }
        for (name, each), span in zip(order, pairwise(ends), strict=True)
    }
    text = json.dumps(listed, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
