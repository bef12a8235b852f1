"""A wish to stop is not lost, wherever it arrives."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from diffult_ray import interruption


@pytest.fixture(autouse=True)
def handlers(monkeypatch):
    monkeypatch.setattr(interruption, "REPEAT", 0.05)
    before = {number: signal.getsignal(number) for number in interruption.SIGNALS}
    interruption.listen()
    yield
    interruption.heard()
    for number, handler in before.items():
        signal.signal(number, handler)


def send_and_wait(number: int) -> None:
    os.kill(os.getpid(), number)
    threading.Event().wait(10)


@pytest.mark.parametrize("number", interruption.SIGNALS, ids=lambda n: n.name)
def test_it_is_raised_again_where_the_first_was_lost(number):
    with pytest.raises(KeyboardInterrupt):
        send_and_wait(number)
    with pytest.raises(KeyboardInterrupt):
        threading.Event().wait(10)


def test_once_it_is_heard_nothing_disturbs_the_cleaning_up():
    with pytest.raises(KeyboardInterrupt):
        send_and_wait(signal.SIGTERM)
    interruption.heard()
    assert not threading.Event().wait(0.3)
