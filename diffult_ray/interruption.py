"""Ctrl-C and SIGTERM as KeyboardInterrupt in the main thread, until it is heard.

An exception that is raised within an import, a callback or a destructor may be lost, and with it the
wish to stop; so it is raised again until somebody says that it has arrived.
"""

from __future__ import annotations

import signal
import threading
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
REPEAT = 2.0  # seconds

_timers: list[threading.Timer] = []


def listen() -> None:
    """Also again, where a library has put a handler of its own in the place of ours."""
    for number in SIGNALS:
        signal.signal(number, _interrupt)


def heard() -> None:
    """It has arrived: what is cleaned up from here on is not disturbed."""
    while _timers:
        _timers.pop().cancel()


def _interrupt(*_: Any) -> None:
    heard()
    main = threading.main_thread().ident
    again = threading.Timer(REPEAT, signal.pthread_kill, (main, signal.SIGINT))
    again.daemon = True
    again.start()
    _timers.append(again)
    raise KeyboardInterrupt
