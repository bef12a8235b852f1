"""What the benchmarks share: variants that take turns, ratios with their spread, one JSON line a figure."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
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
    """The processor as Linux names it, its usable cores, and the GPU where torch sees one."""
    import torch

    told = f"{_processor()}, {len(os.sched_getaffinity(0))} cores"
    return f"{told}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else f"{told}, no GPU"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.machine()
