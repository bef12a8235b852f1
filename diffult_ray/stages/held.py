"""What a process keeps from one task for the next: Ray gives it the next one of any stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_kept: dict[str, Any] = {}


def get(name: str, make: Callable[[], Any]) -> Any:
    """What was made by that name in this process before, if it was the last; else what `make` makes."""
    if name not in _kept:
        drop()
        _kept[name] = make()
    return _kept[name]


def drop() -> None:
    """Keep nothing: other work begins."""
    _kept.clear()
