"""The driver in a process of its own, watched by one that knows nothing of Ray.

Ray's core may end its process at any moment, with an exit code of its own and without a word: when a thread
uses it while it shuts down, when its raylet is gone, or when a signal meets it at its start. The process that
was started outlives that: it passes signals on, tells the exit code that was meant, and ends what Ray has
started and has not ended. Linux only; elsewhere the driver runs unwatched.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress

from diffult_ray import interruption, processes

INTERRUPTED = 130
HINT = "interrupted; the same command continues"
DEATH_SIGNAL, SUBREAPER = 1, 36  # of prctl(2)

watched = False  # whether this is a driver whose Ray processes somebody else ends


def supervise(work: Callable[[], int], tidy: Callable[[], None]) -> int:
    """Run the driver `work` in a child process; returns its exit code.

    SIGINT and SIGTERM are passed on to it. A driver that is killed, or that ends without its code, is told of
    in one line; after one that was sent a signal the code is 130. With this process, the driver dies.

    Args:
        work: returns an exit code; 130 if it was interrupted, and has told so.
        tidy: called after a driver that did not come to its end, when nothing of it runs any more.
    """
    if sys.platform != "linux":
        return work()
    receiving, sending = os.pipe()
    signal.pthread_sigmask(signal.SIG_BLOCK, interruption.SIGNALS)
    parent, driver = os.getpid(), os.fork()
    if driver == 0:
        os.close(receiving)
        return _drive(work, parent, sending)
    os.close(sending)
    _prctl(SUBREAPER, 1)
    passed: list[int] = []

    def pass_on(number: int, _: object) -> None:
        passed.append(number)
        with suppress(ProcessLookupError):
            os.kill(driver, number)

    for number in interruption.SIGNALS:
        signal.signal(number, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, interruption.SIGNALS)
    status = _wait(driver)
    _end_the_rest()
    told = _read(receiving)
    code = _code(told, status, bool(passed))
    if code == INTERRUPTED or (told is None and code != 0):
        tidy()
    return code


def _drive(work: Callable[[], int], parent: int, sending: int) -> int:
    """In the child: do the work, and tell the exit code before Ray's own end may change it."""
    global watched
    watched = True
    _prctl(DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:  # it has died before that
        os.kill(os.getpid(), signal.SIGKILL)
    interruption.listen()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, interruption.SIGNALS)
    code = work()
    os.write(sending, bytes([code]))
    if code == INTERRUPTED:  # threads may be within Ray, which is no more to be touched
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    return code


def _code(told: int | None, status: int, signalled: bool) -> int:
    if told is not None:
        return told
    code = os.waitstatus_to_exitcode(status)
    if signalled:
        print(HINT, file=sys.stderr)
        return INTERRUPTED
    if code >= 0:
        return code
    name = signal.Signals(-code).name
    print(f"error: the driver was ended by {name}; the same command continues", file=sys.stderr)
    return 128 - code


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def _wait(driver: int) -> int:
    """The driver's wait status; reaps what it has left to us meanwhile."""
    while True:
        ended, status = os.waitpid(-1, 0)
        if ended == driver:
            return status


def _read(receiving: int) -> int | None:
    os.set_blocking(receiving, False)
    with suppress(BlockingIOError):
        told = os.read(receiving, 1)
        return told[0] if told else None
    return None


def _end_the_rest() -> None:
    """End all processes that the driver has left: they are this one's children now, and theirs will be."""
    while True:
        for pid in processes.children(os.getpid()):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return
