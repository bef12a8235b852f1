"""Ctrl-C and SIGTERM as KeyboardInterrupt in the main thread, until it is heard.

An exception that is raised within an import, a callback or a destructor may be lost, and with it the
wish to stop; so it is raised again until somebody says that it has arrived.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
REPEAT = 2.0  # seconds
TWIN = 1.0  # seconds: what is sent to all processes of a group arrives here once more through the supervisor

_timers: list[threading.Timer] = []
_deferring = 0
_waiting = False
_first = -TWIN  # when the last wish was first told


def listen() -> None:
    for number in SIGNALS:
        signal.signal(number, _interrupt)
    if sys.unraisablehook is not _tell_unraisable:
        sys.unraisablehook = _tell_unraisable


def _tell_unraisable(lost: Any) -> None:
    """What was lost is raised again, and no news to who has pressed Ctrl-C."""
    if lost.exc_type is not KeyboardInterrupt:
        sys.__unraisablehook__(lost)


@contextmanager
def deferred() -> Iterator[None]:
    """Within, a wish waits for `check` or the end: what is interrupted at any instruction may crash.

    A second one does not wait.

    Raises:
        KeyboardInterrupt: at the end, if one has come.
    """
    global _deferring
    _deferring += 1
    try:
        yield
    finally:
        _deferring -= 1
    check()


def check() -> None:
    """Raises KeyboardInterrupt if a wish was deferred."""
    if _waiting:
        raise KeyboardInterrupt


@contextmanager
def kept() -> Iterator[None]:
    """Libraries that are called within cannot put handlers of their own in the place of ours."""
    usual = signal.signal

    def guarded(number: int, handler: Any) -> Any:
        return signal.getsignal(number) if number in SIGNALS else usual(number, handler)

    signal.signal = guarded
    try:
        yield
    finally:
        signal.signal = usual


def heard() -> None:
    """It has arrived: what is cleaned up from here on is not disturbed."""
    global _waiting
    _waiting = False
    while _timers:
        _timers.pop().cancel()


def _interrupt(*_: Any) -> None:
    global _waiting, _first
    if time.monotonic() - _first < TWIN:
        return
    _first = time.monotonic()
    if _deferring and not _waiting:
        _waiting = True
        return
    heard()
    main = threading.main_thread().ident
    again = threading.Timer(REPEAT, signal.pthread_kill, (main, signal.SIGINT))
    again.daemon = True
    again.start()
    _timers.append(again)
    raise KeyboardInterrupt
