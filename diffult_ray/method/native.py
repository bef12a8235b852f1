"""What is written in C for the processor at hand, and compiled by the first process that needs it (3 s).

Without a C compiler there is none of it, and its callers go on with torch's own.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock

from diffult_ray import files

SOURCES = [Path(__file__).with_name(name) for name in ("winograd.c", "normalised.c", "rectified.c")]
HEADER = Path(__file__).with_name("lanes.h")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
LANES = 16  # channels at a time
SECONDS = 60.0  # for a compiler, and for another process that compiles the same


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
    try:
        with _folder() as folder:
            return _loaded(folder, command.split())
    except (OSError, subprocess.SubprocessError) as failure:
        told = (getattr(failure, "stderr", None) or str(failure)).strip().splitlines()[0]
        logging.getLogger(__name__).warning("networks stay torch's, as C did not compile: %s", told)
        return None


@contextmanager
def _folder() -> Iterator[Path]:
    """Where the user's processes keep what they have compiled; one of this call where others might change it.

    Whoever can write there could run what they like in these processes.
    """
    kept = Path(tempfile.gettempdir(), f"diffult-native-{os.getuid()}")
    if _is_own(kept):
        yield kept
        return
    with tempfile.TemporaryDirectory(prefix="diffult-native-") as folder:
        yield Path(folder)


def _is_own(folder: Path) -> bool:
    """Whether it is there by now, and nobody else can write to it."""
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        pass
    except OSError:
        return False
    found = folder.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077


def _loaded(folder: Path, command: list[str]) -> ctypes.CDLL:
    """From what an earlier process has compiled of the same, or else compiled now, by one at a time."""
    made = folder / f"{_fingerprint(command)}.so"
    with FileLock(f"{made}.lock", timeout=SECONDS):
        try:
            return ctypes.CDLL(str(made))
        except OSError:  # it is not there, or no library
            with tempfile.TemporaryDirectory(dir=folder) as beside:
                fresh = Path(beside, made.name)
                _told_by([*command, *FLAGS, *map(str, SOURCES), "-o", str(fresh)])
                files.write_bytes(made, fresh.read_bytes())  # on the disk: what is cut off there would kill
            return ctypes.CDLL(str(made))


def _fingerprint(command: list[str]) -> str:
    """Of the sources, the compiler, and the processor as the compiler sees it."""
    digest = hashlib.sha256("\0".join([*command, *FLAGS]).encode())
    for path in (*SOURCES, HEADER):
        digest.update(path.read_bytes())
    digest.update(_told_by([*command, "-march=native", "-dM", "-E", "-"]).encode())
    return digest.hexdigest()[:32]


def _told_by(command: list[str]) -> str:
    done = subprocess.run(
        command, check=True, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SECONDS
    )
    return done.stdout


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
