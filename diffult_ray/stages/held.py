"""What a process keeps from one task for the next: Ray gives it the next one of any stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

MOST = 2  # two pipelines at a time, of images and of their quality, send a process their tasks by turns

_kept: dict[str, Any] = {}  # the one used last is last


def get(name: str, make: Callable[[], Any], resume: Callable[[], object]) -> Any:
    """What was made by that name in this process, if it is still kept; else what `make` makes.

    Args:
        resume: called where another name was asked for since: it may have set up the process otherwise.
    """
    if name not in _kept:
        while len(_kept) >= MOST:
            del _kept[next(iter(_kept))]
        _kept[name] = make()
    elif name != next(reversed(_kept)):
        _kept[name] = _kept.pop(name)
        resume()
    return _kept[name]


def drop() -> None:
    """Keep nothing: other work begins."""
    _kept.clear()
