"""What is written in C for the processor at hand, and compiled by each process that needs it (1.7 s).

Without a C compiler there is none of it, and its callers go on with torch's own.
"""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

SOURCES = [Path(__file__).with_name(name) for name in ("winograd.c", "normalised.c", "rectified.c")]
FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
LANES = 16  # channels at a time


def takes(x: torch.Tensor, *, narrow: bool = False) -> bool:
    """Whether C can work on a tensor: float32 of a processor, without autocast, not under torch.compile.

    Args:
        narrow: what is asked for has a form for bf16, too, with autocast or without.
    """
    plain = x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    fits = x.is_cpu and (plain or (narrow and x.dtype == torch.bfloat16))
    return fits and not torch.compiler.is_compiling() and available()


def compiler() -> str | None:
    """The command of the C compiler at hand: CC, or what is on the path."""
    return os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")


def available() -> bool:
    """Whether it could be compiled; tried once a process."""
    return library() is not None


@cache
def library() -> ctypes.CDLL | None:
    """All functions of the sources, with as many threads as torch has; None without a compiler."""
    command = compiler()
    if command is None:
        return None
    with tempfile.TemporaryDirectory(prefix="diffult-native-") as folder:
        made = str(Path(folder, "native.so"))
        whole = [*command.split(), *FLAGS, *map(str, SOURCES), "-o", made]
        try:
            subprocess.run(whole, check=True, capture_output=True, text=True, timeout=60)
            return ctypes.CDLL(made)
        except (OSError, subprocess.SubprocessError) as failure:
            told = (getattr(failure, "stderr", None) or str(failure)).strip().splitlines()[0]
            logging.getLogger(__name__).warning("networks stay torch's, as C did not compile: %s", told)
            return None


def at(x: torch.Tensor | None) -> ctypes.c_void_p | None:
    """Where a tensor's numbers lie, for as long as it is kept; NULL without one."""
    return None if x is None else ctypes.c_void_p(x.data_ptr())


def sizes(*numbers: int) -> list[ctypes.c_size_t]:
    return [ctypes.c_size_t(n) for n in numbers]


def is_narrow(x: torch.Tensor) -> ctypes.c_int:
    """Whether C reads a tensor as bf16, and not as float."""
    return ctypes.c_int(x.dtype == torch.bfloat16)


def lasts(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last)
