"""The stages: the only rooms that know both Ray and the method.

A stage is a function of orders and resources. Several orders come together where they share a start:
generators of which the shorter are prefixes of the longest, or pools that one set of actors makes.
It writes whole files into each order's output folder, `summary.json` last, and keeps in the work
folder what an interrupted build goes on from. It does not know where it is stored or why.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Order:
    """One artifact to make: its section of the configuration, its inputs' folders, where it goes."""

    config: Mapping[str, Any]
    inputs: Mapping[str, Path]
    out: Path
    work: Path
