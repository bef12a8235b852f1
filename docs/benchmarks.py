"""Writes docs/BENCHMARKS.md from what benchmarks have printed: a JSON line a figure.

    make bench                              # runs them, and this
    python docs/benchmarks.py FILE ...      # the lines of files, later ones instead of earlier ones
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from string import ascii_uppercase
from typing import Any

HEAD = """# Benchmarks

Made by `make bench` (`python docs/benchmarks.py`) from what the scripts in tests/benchmarks print. A ratio
is of two things measured in turns in one run, as a median with its range; what it is of, each script's first
lines tell. The machines, as letters, are below. [RESULTS.md](RESULTS.md) has the figures that took longer.

| what | figure | n | on | conditions |
|---|---|---|---|---|
"""
TOLD = ("benchmark", "hardware", "versions", "ratio", "base")
KEPT = Path(__file__).parent / "benchmarks.jsonl"


def main(files: list[str]) -> None:
    lines = [line for file in files for line in Path(file).read_text().splitlines() if line.startswith("{")]
    kept = {identity(found): found for found in map(json.loads, lines)}
    KEPT.write_text("".join(json.dumps(found) + "\n" for found in kept.values()))
    page = Path(__file__).parent / "BENCHMARKS.md"
    page.write_text(HEAD + "".join(rows(list(kept.values()))) + "".join(machines(list(kept.values()))))
    print(f"wrote {page}")


def identity(found: Mapping[str, Any]) -> str:
    """The same for two runs of one figure."""
    named = {k: v for k, v in found.items() if isinstance(v, str | int) and not isinstance(v, bool)}
    return json.dumps(named, sort_keys=True)


def rows(every: list[Mapping[str, Any]]) -> Iterator[str]:
    letters = lettered(every)
    for found in every:
        ratio = found.get("ratio")
        figure = f"{shown(ratio)} times" if ratio else "; ".join(measured(found))
        figure += f" {found['base']}" if ratio and "base" in found else ""
        conditions = "; ".join(measured(found)) if ratio else ""
        cells = (found["benchmark"], figure, times(found), letters[found["hardware"]], conditions)
        yield f"| {' | '.join(cells)} |\n"


def lettered(every: list[Mapping[str, Any]]) -> dict[str, str]:
    """Each machine's letter, in the order in which they come."""
    return dict(zip(dict.fromkeys(found["hardware"] for found in every), ascii_uppercase, strict=False))


def times(value: Any) -> str:
    """n of the ratio, or of the first summary in a line; empty without one.

    >>> times({"threads": 2, "seconds": {"plain": {"n": 3, "median": 2.5, "min": 2.0, "max": 3.0}}})
    '3'
    """
    if not isinstance(value, dict):
        return ""
    if "n" in value:
        return str(value["n"])
    return times(value.get("ratio")) or next(filter(None, map(times, value.values())), "")


def measured(found: Mapping[str, Any]) -> Iterator[str]:
    """What else a line tells, in its own words."""
    for name, value in found.items():
        if name in TOLD:
            continue
        name = name.replace("_", " ")
        if not isinstance(value, dict) or "median" in value:
            yield f"{name} {shown(value)}"
        else:
            yield f"{name}: " + ", ".join(f"{k} {shown(v)}" for k, v in value.items())


def shown(value: Any) -> str:
    """
    >>> shown({"n": 3, "median": 2.5, "min": 2.0, "max": 3.0}), shown(True), shown(1234567.0)
    ('2.5 (2 to 3)', 'yes', '1,234,567')
    """
    if isinstance(value, dict) and value["n"] == 1:
        return shown(value["median"])
    if isinstance(value, dict):
        return f"{shown(value['median'])} ({shown(value['min'])} to {shown(value['max'])})"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def machines(every: list[Mapping[str, Any]]) -> Iterator[str]:
    for hardware, letter in lettered(every).items():
        of = [found["versions"] for found in every if found["hardware"] == hardware]
        versions = {name: version for each in of for name, version in each.items()}
        yield f"\n{letter}: {hardware}; " + ", ".join(f"{k} {v}" for k, v in sorted(versions.items())) + ".\n"


if __name__ == "__main__":
    main(sys.argv[1:] or [str(KEPT)])
