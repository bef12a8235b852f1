"""What the benchmarks share: variants that take turns, ratios with their spread, one JSON line a figure."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from multiprocessing.connection import Connection
from typing import Any


def alternately(
    variants: Mapping[str, Callable[[], object]], repeats: int, inner: int = 1
) -> dict[str, list[float]]:
    """Seconds of `inner` calls of each variant, `repeats` times, in turns; the first turn is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(repeats + 1):
        for name, call in variants.items():
            start = time.perf_counter()
            for _ in range(inner if turn else 1):
                call()
            if turn:
                seconds[name].append((time.perf_counter() - start) / inner)
    return seconds


def alternately_apart(
    makers: Mapping[str, Callable[[], Callable[[], object]]], repeats: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """As `alternately`, each variant in a process of its own that waits while another has its turn.

    Args:
        makers: make a variant in its process, and set threads and memory there; picklable.

    Returns:
        Seconds of each call, and the peak memory of each process in MiB: that of a GPU if it uses one.
    """
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for name, make in makers.items():
        pipes[name], theirs = context.Pipe()
        processes.append(context.Process(target=_wait_for_turns, args=(make, theirs), daemon=True))
        processes[-1].start()
    seconds: dict[str, list[float]] = {name: [] for name in makers}
    for turn in range(repeats + 1):
        for name, pipe in pipes.items():
            pipe.send(True)
            taken = pipe.recv()
            if turn:
                seconds[name].append(taken)
    peaks = {}
    for name, pipe in pipes.items():
        pipe.send(False)
        peaks[name] = pipe.recv()
    for process in processes:
        process.join()
    return seconds, peaks


def _wait_for_turns(make: Callable[[], Callable[[], object]], pipe: Connection) -> None:
    call = make()
    while pipe.recv():
        start = time.perf_counter()
        call()
        pipe.send(time.perf_counter() - start)
    pipe.send(_peak_mib())


def _peak_mib() -> int:
    """Of tensors on the GPU where this process uses one, else of its memory."""
    import torch

    if torch.cuda.is_initialized():
        return round(torch.cuda.max_memory_reserved() / 2**20)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def bf16_matrix_rate(side: int = 8192, products: int = 20) -> float:
    """FLOPs a second of square bf16 matrix products on the GPU, the median of several, of random numbers."""
    import torch

    a, b = (torch.randn(side, side, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for turn in range(products + 3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        torch.matmul(a, b)
        torch.cuda.synchronize()
        if turn >= 3:
            seconds.append(time.perf_counter() - start)
    return 2 * side**3 / statistics.median(seconds)


def ratios(seconds: Mapping[str, Sequence[float]], base: str) -> dict[str, dict[str, float]]:
    """How many times faster than `base` each other variant was, turn by turn."""
    return {
        name: summary([b / own for b, own in zip(seconds[base], taken, strict=True)])
        for name, taken in seconds.items()
        if name != base
    }


def summary(values: Sequence[float], digits: int = 3) -> dict[str, float]:
    """Median and range of n values."""
    return {
        "n": len(values), "median": round(statistics.median(values), digits),
        "min": round(min(values), digits), "max": round(max(values), digits),
    }


def tell(benchmark: str, *, packages: Sequence[str] = ("torch",), **facts: Any) -> None:
    """Print a figure with the hardware and versions that it was taken on."""
    print(json.dumps({
        "benchmark": benchmark, **facts, "hardware": hardware(),
        "versions": {"python": platform.python_version(), **{p: version(p) for p in packages}},
    }), flush=True)


def hardware() -> str:
    """The processor as Linux names it, its instructions, usable cores, and the GPU where torch sees one."""
    import torch

    bf16 = " with bf16" if torch.cpu._is_avx512_bf16_supported() else ""
    amx = ", AMX" if torch.cpu._is_amx_tile_supported() else ""
    instructions = torch.backends.cpu.get_cpu_capability() + bf16 + amx
    told = f"{_processor()} ({instructions}), {len(os.sched_getaffinity(0))} cores"
    return f"{told}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else f"{told}, no GPU"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.machine()
